"""The table of UDP flows: (session, inner 5-tuple) -> whatever carries that one flow (design decision 6).

There is no lookup by less than the whole key, so a reply cannot find the flow of another asker. Pure; opens and
closes nothing, `now` is in seconds of one monotonic clock. At its own limit an agent loses the flow it used longest
ago; at the limit of the process it may only trade in its own, so nobody's flow falls to another agent's load.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ztna.errors import Refused
from ztna.names import SessionId
from ztna.reasons import Reason

Value = TypeVar("Value")

RelayConnection = tuple[str, int]
"""A relay's name and which connection to it: a session ends with the connection that offered it."""
SessionKey = tuple[RelayConnection, SessionId]


class FlowKey(NamedTuple):
    """One inner 5-tuple in one session."""

    session: SessionKey
    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(slots=True)
class _Entry(Generic[Value]):
    agent: str
    value: Value
    idle_s: float
    used: float


class FlowTable(Generic[Value]):
    """Flows by their whole key, each agent's in the order of last use."""

    def __init__(self, *, per_agent: int, total: int) -> None:
        self._per_agent = per_agent
        self._total = total
        self._entries: dict[FlowKey, _Entry[Value]] = {}
        self._agents: dict[str, OrderedDict[FlowKey, None]] = {}
        self._sessions: dict[SessionKey, dict[FlowKey, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def use(self, key: FlowKey, now: float) -> Value | None:
        """Return the flow and mark it used, None when there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = now
        self._agents[entry.agent].move_to_end(key)
        return entry.value

    def make_room(self, agent: str) -> list[Value]:
        """Return the flows to end before `agent` may add one; they are out of the table already.

        Raises Refused(limit_reached) when the table is full of the flows of others.
        """
        own = self._agents.get(agent)
        if own is not None and len(own) >= self._per_agent:
            return [self._remove(next(iter(own)))]
        if len(self._entries) < self._total:
            return []
        if own is None:
            raise Refused(Reason.LIMIT_REACHED, f"{self._total} flows")
        return [self._remove(next(iter(own)))]

    def add(self, key: FlowKey, agent: str, value: Value, *, idle_s: float, now: float) -> None:
        """Add a flow after make_room; its key must be new."""
        if key in self._entries:
            raise ValueError(f"flow {key} is in the table")
        self._entries[key] = _Entry(agent, value, idle_s, now)
        self._agents.setdefault(agent, OrderedDict())[key] = None
        self._sessions.setdefault(key.session, {})[key] = None

    def discard(self, key: FlowKey) -> Value | None:
        """Take one flow out, if it is there."""
        return self._remove(key) if key in self._entries else None

    def end_session(self, session: SessionKey) -> list[Value]:
        """Take all flows of a session out."""
        return [self._remove(key) for key in list(self._sessions.get(session, ()))]

    def move_session(self, old: SessionKey, new: SessionKey) -> tuple[dict[FlowKey, Value], list[Value]]:
        """Give the flows of a session to another one of the same agent; return those, and those it had already."""
        moved: dict[FlowKey, Value] = {}
        ended: list[Value] = []
        for key in list(self._sessions.get(old, ())):
            entry = self._entries[key]
            value = self._remove(key)
            heir = key._replace(session=new)
            if heir in self._entries:
                ended.append(value)
                continue
            self.add(heir, entry.agent, value, idle_s=entry.idle_s, now=entry.used)
            moved[heir] = value
        return moved, ended

    def expire(self, now: float) -> list[Value]:
        """Take out the flows that were idle for their time."""
        idle = [key for key, entry in self._entries.items() if now - entry.used >= entry.idle_s]
        return [self._remove(key) for key in idle]

    def end_all(self) -> list[Value]:
        """Take everything out."""
        return [self._remove(key) for key in list(self._entries)]

    def _remove(self, key: FlowKey) -> Value:
        entry = self._entries.pop(key)
        own = self._agents[entry.agent]
        del own[key]
        if not own:
            del self._agents[entry.agent]
        same = self._sessions[key.session]
        del same[key]
        if not same:
            del self._sessions[key.session]
        return entry.value
