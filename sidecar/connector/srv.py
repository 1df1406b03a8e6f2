"""Follows the SRV names that routes have as backends: asked again by TTL, and the last answer kept for a bound.

What the records mean for a route is sidecar.connector.srv_records'.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sidecar.connector.srv_records import NotYetKnown, backends_of
from sidecar.link.discovery import (
    FAILURE_SECONDS_MAX,
    FAILURE_SECONDS_MIN,
    REFRESH_PART_MAX,
    REFRESH_PART_MIN,
    REFRESH_SECONDS_MAX,
    REFRESH_SECONDS_MIN,
    Asker,
)
from ztna.config import BackendConfig
from ztna.errors import ConfigError, ResolverUnavailable
from ztna.telemetry import SRV_BACKENDS_AGE, logger

_log = logger(__name__)


@dataclass(slots=True)
class _Name:
    """What is known of one name; `answered_at` is of the loop's clock."""

    backends: tuple[BackendConfig, ...] = ()
    answered_at: float | None = None
    problem: str = "not asked yet"
    is_answered: bool = True
    """Whether the last question had an answer; that one had none is told once."""
    task: asyncio.Task[None] | None = None


class SrvNames:
    """The names that are followed; `changed` is called when the backends of one are other ones."""

    def __init__(
        self, resolver: Asker | None, keep_s: float, tasks: asyncio.TaskGroup, changed: Callable[[], None]
    ) -> None:
        self._resolver = resolver
        self._keep_s = keep_s
        self._tasks = tasks
        self._changed = changed
        self._names: dict[str, _Name] = {}
        self._loop = asyncio.get_running_loop()

    def follow(self, names: Iterable[str]) -> None:
        """Follow exactly these from now on."""
        wanted = set(names)
        for name in self._names.keys() - wanted:
            task = self._names.pop(name).task
            if task is not None:
                task.cancel()
        for name in sorted(wanted - self._names.keys()):
            entry = self._names[name] = _Name()
            if self._resolver is None:
                entry.problem = "connector.srv_resolvers names nobody to ask, and /etc/resolv.conf neither"
                continue
            entry.task = self._tasks.create_task(
                self._keep_asking(self._resolver, name, entry), name=f"SRV {name}"
            )

    def backends(self, name: str) -> tuple[BackendConfig, ...]:
        """Return the backends of a name that is followed.

        Raises ConfigError saying why there are none; NotYetKnown while somebody is asked who has not answered yet.
        """
        entry = self._names.get(name)
        if entry is None or not entry.backends:
            text = f"srv://{name}: {entry.problem if entry is not None else 'not followed'}"
            is_awaited = entry is not None and entry.task is not None and entry.answered_at is None
            raise NotYetKnown(text) if is_awaited else ConfigError(text)
        return entry.backends

    def status(self) -> dict[str, object]:
        """Return what /status shows of the names."""
        now = self._loop.time()
        return {
            name: {
                "backends": [str(each.address) for each in entry.backends],
                "age_s": None if entry.answered_at is None else round(now - entry.answered_at, 1),
                "problem": entry.problem or None,
            }
            for name, entry in self._names.items()
        }

    async def _keep_asking(self, resolver: Asker, name: str, entry: _Name) -> None:
        failures = 0
        try:
            while True:
                wait_s = await self._ask(resolver, name, entry)
                failures = failures + 1 if wait_s is None else 0
                if wait_s is None:
                    longest = min(FAILURE_SECONDS_MAX, FAILURE_SECONDS_MIN * 2.0 ** min(failures, 8))
                    wait_s = random.uniform(FAILURE_SECONDS_MIN, longest)
                await asyncio.sleep(wait_s)
        finally:
            SRV_BACKENDS_AGE.remove(name)

    async def _ask(self, resolver: Asker, name: str, entry: _Name) -> float | None:
        """Ask once; return when to ask again, in seconds, None after a failure."""
        try:
            answer = await resolver.srv(name)
        except ResolverUnavailable as error:
            self._not_answered(name, entry, str(error))
            return None
        if answer.stale:
            self._not_answered(name, entry, f"{answer.server} says that its answer is stale")
        else:
            entry.answered_at, entry.is_answered = self._loop.time(), True
            SRV_BACKENDS_AGE.labels(name).set(0)
            problem = "the name has no SRV records" if answer.negative else "no target has an address"
            self._use(name, entry, backends_of(answer.records), problem)
        ttl_s = answer.ttl_s * random.uniform(REFRESH_PART_MIN, REFRESH_PART_MAX)
        return min(REFRESH_SECONDS_MAX, max(REFRESH_SECONDS_MIN, ttl_s))

    def _not_answered(self, name: str, entry: _Name, problem: str) -> None:
        """Keep the last answer to its bound."""
        if entry.is_answered:
            _log.warning("srv_not_answered", name=name, error=problem)
        entry.is_answered = False
        age_s = None if entry.answered_at is None else self._loop.time() - entry.answered_at
        if age_s is not None:
            SRV_BACKENDS_AGE.labels(name).set(age_s)
        if not entry.backends:
            self._use(name, entry, (), problem)
        elif age_s is not None and age_s >= self._keep_s:
            self._use(name, entry, (), f"the last answer is over {self._keep_s:g} s old: {problem}")
        else:
            entry.problem = problem

    def _use(self, name: str, entry: _Name, backends: tuple[BackendConfig, ...], problem: str) -> None:
        before = entry.backends, entry.problem
        entry.backends, entry.problem = backends, "" if backends else problem
        if backends != before[0]:
            _log.info("srv_changed", name=name, backends=len(backends), problem=entry.problem or None)
        if backends != before[0] or (not backends and entry.problem != before[1]):
            self._changed()
