"""What programs say of their own health: the checks of kind ttl, each critical when it is not heard in time.

Holds what was pushed last; who pushes is sidecar.connector.local_api, what it means sidecar.connector.health's.
"""

from __future__ import annotations

import asyncio

from sidecar.connector.health import Outcome, Verdict
from ztna.names import ServiceName

OUTPUT_CHARACTERS_MAX = 4_096


class Pushes:
    """The last word of each service's program, with the moment it came."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: dict[ServiceName, tuple[Outcome, float]] = {}
        self._waiting: dict[ServiceName, set[asyncio.Future[None]]] = {}

    def push(self, service: ServiceName, verdict: Verdict, output: str) -> None:
        """Take a program's word, and wake the checks that wait for it."""
        text = output[:OUTPUT_CHARACTERS_MAX] or f"the program says {verdict}"
        outcome = Outcome(verdict != "critical", text, is_warning=verdict == "warning")
        self._heard[service] = (outcome, self._loop.time())
        for future in self._waiting.pop(service, ()):
            if not future.done():
                future.set_result(None)

    def forget(self, service: ServiceName) -> None:
        """Forget a service that is fronted no more."""
        self._heard.pop(service, None)

    def now(self, service: ServiceName, ttl_s: float) -> Outcome:
        """Return the word that holds: the last one, or that none came in its time."""
        heard = self._heard.get(service)
        if heard is None:
            return Outcome(False, f"ttl: nothing was heard of the program yet (within {ttl_s:g} s)")
        outcome, at = heard
        if self._loop.time() - at >= ttl_s:
            return Outcome(False, f"ttl: nothing was heard of the program for {ttl_s:g} s")
        return outcome

    async def changed(self, service: ServiceName, ttl_s: float) -> None:
        """Wait for the next word, or for the end of the last one's time."""
        heard = self._heard.get(service)
        left = None if heard is None else heard[1] + ttl_s - self._loop.time()
        if left is not None and left <= 0:
            left = None  # it is critical by now: only a word changes that
        future = self._loop.create_future()
        waiting = self._waiting.setdefault(service, set())
        waiting.add(future)
        try:
            await asyncio.wait((future,), timeout=left)
        finally:
            waiting.discard(future)
