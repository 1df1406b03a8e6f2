"""dnsd's servers on real sockets, for programs to ask."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping

from dnsd.server import Server
from ztna.config import Endpoint


@contextlib.contextmanager
def serving(servers: Mapping[str, Server]) -> Iterator[dict[str, int]]:
    """Run every server on the loop of a thread; gives the port of each, on 127.0.0.1."""
    loop = asyncio.new_event_loop()
    bound = {name: server.listen(Endpoint("127.0.0.1", 0))[1] for name, server in servers.items()}

    async def serve() -> None:
        await asyncio.gather(*(server.run() for server in servers.values()))

    task = loop.create_task(serve())
    thread = threading.Thread(target=_run_until_cancelled, args=(loop, task))
    thread.start()
    try:
        yield bound
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


def _run_until_cancelled(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
