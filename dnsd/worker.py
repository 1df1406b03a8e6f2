"""One of several processes that answer on dnsd's port: `python -m dnsd.worker`, which only dnsd starts.

It has a copy of the names and answers everything but transfers, whose connections dnsd goes on with. It ends when
its channel does, so it never outlives dnsd; signals are dnsd's to hear.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import uvloop

from dnsd import feed
from dnsd.channel import Channel
from dnsd.feed import Connection, Copy, Entries, Listen, Report, Setup, State
from dnsd.limits import TABLE_BYTES
from dnsd.secondaries import are_wanted
from dnsd.server import configured
from dnsd.serving import aged, renewed
from dnsd.settling import Settled
from dnsd.sockets import Sockets
from dnsd.tally import counted
from dnsd.transfer import Publication
from dnsd.zone import ZoneData
from ztna import log_lines
from ztna.errors import ProtocolError
from ztna.telemetry import WORKER_CPU, WORKER_MEMORY

REPORT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Worker:
    """What answers, and the copy of the names it answers from."""

    def __init__(self, channel: Channel, setup: Setup, limits: memoryview) -> None:
        self._channel = channel
        self._publication = Publication()
        self._is_published = are_wanted(setup.config.transfer, setup.keys)
        self._options = setup.options
        self._server = configured(
            setup.config, setup.keys, self._publication, limits=limits, hand_over=self._hand_over
        )
        self._copy = Copy()
        self._state: State | None = None
        self._settled = Settled()
        self._is_listening = False
        self._is_due = asyncio.Event()
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Do as dnsd says until its end of the channel is closed."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            while (received := await self._channel.receive()) is not None:
                self._obey(*received)
            # Nobody is left to answer for.
            raise _Alone

    def _obey(self, data: bytes, sockets: Sequence[socket.socket]) -> None:
        match feed.decode_to_worker(data):
            case Entries() as entries:
                self._copy.learn(entries)
            case State() as state:
                is_first, self._state = self._state is None, state
                self._follow(state)
                if is_first:
                    self._tasks.create_task(self._report(), name="report")
            case Listen() if len(sockets) == len(Sockets._fields):
                for each in sockets:
                    each.setblocking(False)
                self._server.take(Sockets(*sockets))
                self._is_listening = True
                self._is_due.set()
                self._tasks.create_task(self._server.run(), name="dns-server")
            case message:
                raise ProtocolError(f"not expected: {type(message).__name__}")

    def _follow(self, state: State) -> None:
        before = self._copy.zone
        zone = self._copy.follow(state)
        if state.settings is not None:
            self._options = msgspec.structs.replace(self._options, bounds=ZoneData(state.settings, {}, {}))
        if zone is before:
            self._let_age(state)
        else:
            self._renew(state, zone)
            self._settled.grow(len(zone.services))

    def _let_age(self, state: State) -> None:
        if self._copy.zone is not None and aged(self._server.answers, state.age, time.time()):
            self._renew(state, self._copy.zone)

    def _renew(self, state: State, zone: ZoneData) -> None:
        self._server.answers = renewed(self._server.answers, zone, state.age, self._options, time.time())
        if self._is_published:
            # For IXFR over UDP, which says no more than the serial.
            self._publication.zone = self._server.answers.zone
        self._is_due.set()

    async def _hand_over(self, sock: socket.socket, host: str, received: bytes) -> None:
        await self._channel.send(feed.encode(Connection(host, received)), [sock])

    async def _report(self) -> None:
        """Tell each second what was counted, and at once of another zone.

        Names grow old here, too, should dnsd say nothing for long.
        """
        spent = 0.0
        while True:
            if self._state is not None:
                self._let_age(self._state)
            self._server.count()
            now = time.process_time()
            WORKER_CPU.inc(now - spent)
            spent = now
            WORKER_MEMORY.set(_resident_bytes())
            self._is_due.clear()
            zone = self._server.answers.zone
            status = {
                **self._server.status,
                "pid": os.getpid(),
                "listening": int(self._is_listening),
                "serial": zone.serial if zone else 0,
            }
            await self._channel.send(feed.encode(Report(counted(), status)))
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._is_due.wait()


class _Alone(Exception):
    """dnsd has ended, or wants this worker to."""


async def serve(channel: Channel, limits: memoryview) -> None:
    """Be a worker until dnsd's end of the channel is closed."""
    received = await channel.receive()
    if received is None:
        return
    setup = feed.decode_to_worker(received[0])
    if not isinstance(setup, Setup):
        raise ProtocolError(f"not expected first: {type(setup).__name__}")
    log_lines.configure(setup.log)
    try:
        await Worker(channel, setup, limits).run()
    except* (_Alone, BrokenPipeError, ConnectionResetError):
        pass


def main() -> None:
    """Be the worker whose channel and table of limits are these two descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal or an init system tells all of us; dnsd ends us once it has said why.
        signal.signal(number, signal.SIG_IGN)
    # One that stands still does not see its channel end, and would keep its share of the port (prctl(2)).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel, table = map(int, sys.argv[1:])
    limits = memoryview(mmap.mmap(table, TABLE_BYTES))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Channel(socket.socket(fileno=channel)), limits))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


if __name__ == "__main__":
    main()
