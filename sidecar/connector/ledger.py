"""The TCP flows of each agent: how many there may be, which one makes room for a newer one, which were idle too long.

Pure; resets nothing itself, `now` is in seconds of one monotonic clock. What moves is sampled at `idle`, about once a
second, so that the bytes of a flow cost nothing here. At a limit an agent loses the flow it used longest ago, if
nothing moved on that for EVICTABLE_SECONDS; a flow in use makes way for nobody, and nobody's for another agent's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ztna.errors import Refused
from ztna.reasons import Reason

EVICTABLE_SECONDS = 60.0

Value = TypeVar("Value")

Key = tuple[str, str]
"""The agent's name, and the flow's id."""


@dataclass(slots=True)
class _Entry(Generic[Value]):
    idle_s: float
    used: float
    value: Value | None = None
    moved: int = 0


class Ledger(Generic[Value]):
    """`moved` returns how many bytes a flow has carried so far."""

    def __init__(self, moved: Callable[[Value], int], *, per_agent: int, total: int) -> None:
        self._moved = moved
        self._per_agent = per_agent
        self._total = total
        self._entries: dict[Key, _Entry[Value]] = {}
        self._agents: dict[str, dict[Key, _Entry[Value]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, key: Key, idle_s: float, now: float) -> Value | None:
        """Keep a place for a flow whose backend is to be dialled; return the flow to reset for it, if any.

        Raises Refused(limit_reached).
        """
        own = self._agents.get(key[0], {})
        is_full = len(own) >= self._per_agent or len(self._entries) >= self._total
        evicted = self._evict(own, now) if is_full else None
        entry = self._entries[key] = _Entry(idle_s, now)
        self._agents.setdefault(key[0], {})[key] = entry
        return evicted

    def began(self, key: Key, value: Value, now: float) -> None:
        """The backend has answered."""
        entry = self._entries[key]
        entry.value, entry.used = value, now

    def ended(self, key: Key) -> None:
        """Forget a flow; again is harmless."""
        if self._entries.pop(key, None) is not None:
            own = self._agents[key[0]]
            del own[key]
            if not own:
                del self._agents[key[0]]

    def idle(self, now: float) -> list[Value]:
        """Return the flows on which nothing moved for their time; they stay until they have ended."""
        return [
            entry.value
            for entry in self._entries.values()
            if entry.value is not None and now - self._used(entry, now) >= entry.idle_s
        ]

    def _evict(self, own: dict[Key, _Entry[Value]], now: float) -> Value:
        candidates = [(self._used(entry, now), key) for key, entry in own.items() if entry.value is not None]
        used, key = min(candidates, default=(now, None))
        value = own[key].value if key is not None else None
        if key is None or value is None or now - used < EVICTABLE_SECONDS:
            raise Refused(Reason.LIMIT_REACHED, f"{len(own)} TCP flows, of {len(self._entries)} in all")
        self.ended(key)
        return value

    def _used(self, entry: _Entry[Value], now: float) -> float:
        assert entry.value is not None
        moved = self._moved(entry.value)
        if moved != entry.moved:
            entry.moved, entry.used = moved, now
        return entry.used
