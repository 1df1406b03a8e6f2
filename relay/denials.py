"""How denials become lines of the audit log: the first of a kind at once, its repeats as one line with their count.

Who floods a relay with opens could fill its disk else. Every denial is in exactly one line. Pure.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

INTERVAL_SECONDS = 10.0
SERVICES_PER_AGENT_MAX = 32
"""Names of services that one agent is denied in an interval, each with lines of its own: it may make up any."""
KINDS_MAX = 10_000
"""Of agent, service and reason in an interval; what is beyond is told without the agent's name."""
OTHERS = "*"
"""Stands for all the services, or agents, beyond what has a line of its own."""

Kind = tuple[str, str, str]
"""Agent, service, reason."""
Fields = dict[str, object]


@dataclass(slots=True)
class _Repeats:
    until: float
    count: int = 0
    last: Fields = field(default_factory=dict)


class Denials:
    """The kinds of the interval, the oldest first."""

    def __init__(self) -> None:
        self._known: OrderedDict[Kind, _Repeats] = OrderedDict()
        self._kinds_of: Counter[str] = Counter()

    def note(self, kind: Kind, more: Mapping[str, object], now: float) -> Fields | None:
        """Take a denial; return its line, None when it is counted among the repeats."""
        known = self._known.get(kind)
        if known is None:
            has_own = self._kinds_of[kind[0]] < SERVICES_PER_AGENT_MAX and len(self._known) < KINDS_MAX
            if has_own:
                self._known[kind] = _Repeats(now + INTERVAL_SECONDS)
                self._kinds_of[kind[0]] += 1
                return _line(kind, more)
            known = self._shared(kind, now)
        known.count += 1
        known.last = dict(more)
        return None

    def over(self, now: float) -> list[Fields]:
        """Return the lines of the repeats whose interval has ended."""
        out = []
        while self._known and next(iter(self._known.values())).until <= now:
            kind, repeats = self._known.popitem(last=False)
            self._kinds_of[kind[0]] -= 1
            if not self._kinds_of[kind[0]]:
                del self._kinds_of[kind[0]]
            if repeats.count:
                out.append(_line(kind, repeats.last) | {"count": repeats.count})
        return out

    def _shared(self, kind: Kind, now: float) -> _Repeats:
        agent, _, reason = kind
        shared = agent, OTHERS, reason
        if shared not in self._known and len(self._known) >= KINDS_MAX:
            shared = OTHERS, OTHERS, reason
        if shared not in self._known:
            self._known[shared] = _Repeats(now + INTERVAL_SECONDS)
            self._kinds_of[shared[0]] += 1
        return self._known[shared]


def _line(kind: Kind, more: Mapping[str, object]) -> Fields:
    agent, service, reason = kind
    return {"agent": agent, "service": service, "reason": reason, **more}
