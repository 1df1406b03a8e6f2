"""Single leases that are to be read anew at once, as their epoch turned out to be old: one by one, to a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ztna.names import ServiceName
from ztna.telemetry import dropped

READS_WAITING_MAX = 64

_WHERE = "agent_leases"


class Rereading:
    """`read` reads one; that nothing can be read now is its own matter."""

    def __init__(self, read: Callable[[ServiceName], Awaitable[None]]) -> None:
        self._read = read
        self._wanted: asyncio.Queue[ServiceName] = asyncio.Queue(READS_WAITING_MAX)

    def want(self, service: ServiceName) -> None:
        """Have one read soon; beyond READS_WAITING_MAX at once the asker's own deadline answers."""
        try:
            self._wanted.put_nowait(service)
        except asyncio.QueueFull:
            dropped(_WHERE, "reads_full")

    async def run(self) -> None:
        """Read what is wanted until cancelled."""
        while True:
            await self._read(await self._wanted.get())
