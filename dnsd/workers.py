"""The processes that answer beside dnsd's own (SO_REUSEPORT): started, told of the names, summed up, started again.

dnsd keeps the names and the leases, and transfers zones; what a worker does is dnsd.worker's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from dnsd import feed
from dnsd.channel import Channel, pair
from dnsd.feed import Connection, Listen, Report, Setup
from dnsd.limits import TABLE_BYTES
from dnsd.serving import Age
from dnsd.sockets import Sockets, bind, bind_several
from dnsd.tally import Tally
from dnsd.zone import ZoneData
from ztna.config import Endpoint
from ztna.errors import ZtnaError
from ztna.runtime import Readiness
from ztna.telemetry import WORKER_ENDS, WORKERS, logger
from ztna.udp import SockAddr

RESTART_SECONDS_MIN = 0.1
RESTART_SECONDS_MAX = 30.0
"""Each worker that ends soon makes the wait for the next twice as long, up to this."""
SETTLED_SECONDS = 60.0
"""A worker that lived for so long did not end soon."""
SILENT_SECONDS = 30.0
"""A worker that says nothing for so long has come to a standstill, and is killed."""
FOLLOW_SECONDS = 1.0
"""How long a worker may take to answer from a new state before others are told of it; it takes milliseconds."""
END_SECONDS = 2.0
"""How long a worker may take to end once its channel is closed."""

Adopt = Callable[[socket.socket, str, bytes], None]
"""Goes on with a connection: its host, and what was read of it but not answered."""

_OWN = frozenset({"pid", "listening", "serial"})
_log = logger(__name__)


class Workers:
    """So many workers, and what they are to answer from."""

    def __init__(
        self, endpoint: Endpoint, count: int, setup: Setup, adopt: Adopt, readiness: Readiness
    ) -> None:
        """Bind the port for all of them; `adopt` gets connections to transfer on. Raises ZtnaError for a taken port."""
        bound = bind_several(endpoint, count)
        self.address: SockAddr = bound[0].address
        self._setup = feed.encode(setup)
        self._adopt = adopt
        self._readiness = readiness
        self._state: tuple[ZoneData, Age] | None = None
        self._moved = asyncio.Event()
        self._workers = [_Worker(number, sockets) for number, sockets in enumerate(bound, 1)]
        self._table = os.memfd_create("ztna-dnsd-limits")
        os.ftruncate(self._table, TABLE_BYTES)
        self._show_state()

    def show(self, zone: ZoneData, age: Age) -> None:
        """Have every worker answer from this zone as old as it is, as soon as it has time."""
        self._state = zone, age
        for worker in self._workers:
            worker.woken.set()

    async def follow(self) -> None:
        """Wait until every worker answers with the serial shown last, for a worker that does not only so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_SECONDS):
                while not self._all_follow():
                    await self._moved.wait()

    async def run(self) -> None:
        """Keep all workers alive until cancelled; then they end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in self._workers:
                    tasks.create_task(self._keep(worker), name=f"worker {worker.number}")
        finally:
            os.close(self._table)

    def status(self, own: Mapping[str, int]) -> Mapping[str, object]:
        """Return what each worker reports, and the sum of our own counts and of theirs in their present lives."""
        summed = Counter(own)
        for worker in self._workers:
            summed.update({key: value for key, value in worker.status.items() if key not in _OWN})
        return {**summed, "workers": [dict(worker.status) for worker in self._workers]}

    def _all_follow(self) -> bool:
        serial = self._state[0].serial if self._state else 0
        return all(each.status["serial"] == serial for each in self._workers if each.was_given_sockets)

    def _move(self) -> None:
        """Let who waits for workers look again."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def _keep(self, worker: _Worker) -> None:
        pause = RESTART_SECONDS_MIN
        while True:
            started = time.monotonic()
            why = await self._live(worker)
            WORKER_ENDS.inc()
            _log.warning("worker_ended", worker=worker.number, error=why)
            worker.problem = why
            self._show_state()
            if time.monotonic() - started >= SETTLED_SECONDS:
                pause = RESTART_SECONDS_MIN
            await asyncio.sleep(pause)
            pause = min(2 * pause, RESTART_SECONDS_MAX)

    async def _live(self, worker: _Worker) -> str:
        """Start a process, and tell and hear it until it ends; return why it did."""
        ours, theirs = pair()
        channel = Channel(ours)
        process = None
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "dnsd.worker", str(theirs.fileno()), str(self._table)),
                    pass_fds=(theirs.fileno(), self._table),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(self._tell(worker, channel), name=f"worker {worker.number} feed")
                why = await self._hear(worker, channel)
                telling.cancel()
            if why:
                # It would not end by itself, and has a share of what is asked.
                with suppress(ProcessLookupError):
                    process.kill()
        except OSError as error:
            why = str(error)
        finally:
            channel.close()
            if process is not None:
                await _ended(process)
            worker.end()
            self._move()
        return f"{why or 'it ended'}; exit status {process.returncode if process else None}"

    async def _tell(self, worker: _Worker, channel: Channel) -> None:
        """Keep a worker up to date; while it reads, newer states wait, of which only the last is told."""
        told: ZoneData | None = None
        with suppress(OSError):
            await channel.send(self._setup)
            while True:
                worker.woken.clear()
                if self._state is not None:
                    zone, age = self._state
                    for message in feed.update(told, zone, age):
                        await channel.send(message)
                    told = zone
                await worker.woken.wait()

    async def _hear(self, worker: _Worker, channel: Channel) -> str:
        """Hear a worker until it ends; return what is wrong when it did not."""
        try:
            while True:
                # Also one that takes nothing more stands still.
                async with asyncio.timeout(SILENT_SECONDS):
                    received = await channel.receive()
                    if received is None:
                        return ""
                    await self._obey(worker, channel, *received)
        except TimeoutError:
            return f"it said nothing for {SILENT_SECONDS:.0f} s"
        except (OSError, ZtnaError) as error:
            return str(error)

    async def _obey(
        self, worker: _Worker, channel: Channel, data: bytes, sockets: Sequence[socket.socket]
    ) -> None:
        match feed.decode_from_worker(data):
            case Connection(host, pending) if len(sockets) == 1:
                self._adopt(sockets[0], host, pending)
            case Report() as report:
                await self._note(worker, channel, report)

    async def _note(self, worker: _Worker, channel: Channel, report: Report) -> None:
        worker.tally.add(report.counts)
        was_listening = worker.is_listening
        worker.status = report.status
        self._move()
        if worker.is_listening != was_listening:
            worker.problem = ""
            _log.info("worker_listening", worker=worker.number, pid=report.status.get("pid"))
            self._show_state()
        elif not was_listening and not worker.was_given_sockets:
            # It knows the names now. Those of one that ended are closed, so that others had its share till now.
            sockets = worker.sockets or bind(Endpoint(*self.address), shared=True)
            worker.sockets, worker.was_given_sockets = None, True
            await channel.send(feed.encode(Listen()), sockets)
            sockets.close()

    def _show_state(self) -> None:
        listening = [worker for worker in self._workers if worker.is_listening]
        WORKERS.set(len(listening))
        told = f"{len(listening)} of {len(self._workers)} answer"
        told += "".join(f"; worker {each.number}: {each.problem}" for each in self._workers if each.problem)
        if len(listening) == len(self._workers):
            self._readiness.unwarn("workers")
            self._readiness.done("workers")
        elif listening and self._readiness.ready:
            self._readiness.warn("workers", told)
        else:
            self._readiness.awaiting("workers", told)


class _Worker:
    """One place among the workers, and whoever has it now."""

    def __init__(self, number: int, sockets: Sockets) -> None:
        self.number = number
        self.sockets: Sockets | None = sockets
        """Those it is to answer on, bound already; without any, its port is bound once it knows the names."""
        self.was_given_sockets = False
        self.woken = asyncio.Event()
        self.tally = Tally()
        self.status: Mapping[str, int] = {}
        self.problem = ""

    @property
    def is_listening(self) -> bool:
        return bool(self.status.get("listening"))

    def end(self) -> None:
        """Be without a process again."""
        self.tally.end()
        self.tally = Tally()
        self.status = {}
        self.was_given_sockets = False


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for a process whose channel is closed to end, and see to it that it does."""
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
