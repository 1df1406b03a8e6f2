"""How long an event loop is kept from its next turn."""

from __future__ import annotations

import asyncio
import time

TICK_SECONDS = 0.001


class Blocking:
    """Watches the running loop from its making until `stop`.

    `longest_cpu_s` is in CPU time of this thread, so that what the machine gives to others meanwhile does not
    count; `longest_s` is what a clock on the wall says.
    """

    def __init__(self) -> None:
        self.longest_cpu_s = self.longest_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._last = time.thread_time(), time.monotonic()
        self._handle = self._loop.call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        self._handle.cancel()

    def _tick(self) -> None:
        cpu, wall = time.thread_time(), time.monotonic()
        self.longest_cpu_s = max(self.longest_cpu_s, cpu - self._last[0])
        self.longest_s = max(self.longest_s, wall - self._last[1] - TICK_SECONDS)
        self._last = cpu, wall
        self._handle = self._loop.call_later(TICK_SECONDS, self._tick)
