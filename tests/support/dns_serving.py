"""dnsd's servers on real sockets, for programs to ask: each in this process, or as several workers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network

from dnsd.answer import NO_OPTIONS, Answers, Options
from dnsd.feed import Setup
from dnsd.server import Server, configured
from dnsd.serving import Age, renewed
from dnsd.transfer import Publication
from dnsd.workers import Workers
from dnsd.zone import ZoneData
from ztna.config import DnsdConfig, Endpoint, LogConfig
from ztna.runtime import Readiness

LOOPBACK = (IPv4Network("127.0.0.0/8"),)
START_SECONDS = 60.0
ANYWHERE = Endpoint("127.0.0.1", 0)


@dataclass(frozen=True)
class Served:
    """What is answered, and to whom."""

    zone: ZoneData
    age: Age
    options: Options = NO_OPTIONS
    allow: tuple[IPv4Network, ...] = LOOPBACK


@contextlib.contextmanager
def serving(servers: Mapping[str, Server]) -> Iterator[dict[str, int]]:
    """Run every server on the loop of a thread; gives the port of each, on 127.0.0.1."""
    bound = {name: server.listen(ANYWHERE)[1] for name, server in servers.items()}
    with _running(*(server.run() for server in servers.values())):
        yield bound


@contextlib.contextmanager
def serving_by(workers: int, served: Mapping[str, Served]) -> Iterator[dict[str, int]]:
    """Answer as dnsd with so many workers does; gives the port of each, on 127.0.0.1."""
    servers, made = {}, {}
    for name, each in served.items():
        config = DnsdConfig(workers=workers, allow=each.allow, rate_limit=0)
        server = servers[name] = configured(config, {}, Publication())
        server.answers = renewed(Answers(None), each.zone, each.age, each.options, time.time())
        if workers > 1:
            setup = Setup(config, LogConfig(), {}, each.options)
            made[name] = Workers(ANYWHERE, workers, setup, server.adopt, Readiness())
            made[name].show(each.zone, each.age)
    if workers == 1:
        with serving(servers) as bound:
            yield bound
        return
    parts = [*(server.run() for server in servers.values()), *(each.run() for each in made.values())]
    with _running(*parts):
        deadline = time.monotonic() + START_SECONDS
        while not all(len(pids(each)) == workers for each in made.values()):
            assert time.monotonic() < deadline, [each.status({}) for each in made.values()]
            time.sleep(0.05)
        yield {name: each.address[1] for name, each in made.items()}


def pids(workers: Workers) -> list[int]:
    """Return the processes that answer."""
    statuses = workers.status({})["workers"]
    assert isinstance(statuses, list)
    return [each["pid"] for each in statuses if each.get("listening")]


@contextlib.contextmanager
def _running(*parts: Coroutine[None, None, None]) -> Iterator[None]:
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(part)

    task = loop.create_task(run())
    thread = threading.Thread(target=_run_until_cancelled, args=(loop, task))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


def _run_until_cancelled(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
