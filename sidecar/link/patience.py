"""Wait a while for what others do, in looks: time in which this very process was held up does not count.

The timer of a busy loop runs before what came meanwhile is read. A plain timeout ends every attempt where each turn
takes long, and as what was ended is begun anew, the turns stay long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LOOK_SECONDS = 0.1


@asynccontextmanager
async def patience(seconds: float, news: Callable[[], object] = lambda: None) -> AsyncIterator[None]:
    """Raise TimeoutError as asyncio.timeout does, `seconds` after `news()` last said something else."""
    loop = asyncio.get_running_loop()
    looks = max(2, round(seconds / LOOK_SECONDS))
    left, said = looks, news()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal left, said, timer
        before, said = said, news()
        left = left - 1 if said == before else looks
        if left:
            timer = loop.call_later(LOOK_SECONDS, look)
        else:
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(LOOK_SECONDS, look)
        try:
            yield
        finally:
            timer.cancel()
