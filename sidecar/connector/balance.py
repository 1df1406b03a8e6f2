"""Which backend of a route gets a flow: its weight, its health, and how it fared with the flows before.

    passing, not ejected > warning, not ejected > ejected > critical

A flow goes to one of the best rank that has any, so that a wrong verdict on all of them costs no more than trying.
A backend is ejected when `eject_after` connections in a row failed, for `eject_s`, and twice as long each time that it
fails again right after; one success and all is forgotten. Pure; `now` is in seconds of one monotonic clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sidecar.connector.health import Verdict
from ztna.sections import Endpoint

EJECT_SECONDS_MAX = 300.0

Method = Literal["round_robin", "least_connections", "source_hash"]

_HASH_BYTES = 8
_HASH_RANGE = 2.0 ** (8 * _HASH_BYTES)
_NONE: Mapping[Endpoint, int] = {}
_EJECTED, _CRITICAL = 2, 3
_RANK: Mapping[Verdict, int] = {"passing": 0, "warning": 1, "critical": _CRITICAL}


@dataclass(frozen=True, slots=True)
class Policy:
    """How a route's backends are chosen."""

    method: Method = "round_robin"
    eject_after: int = 3
    eject_s: float = 10.0


@dataclass(slots=True)
class Standing:
    """How one backend is doing; `flows` run on it or are being dialled."""

    address: Endpoint
    weight: int
    priority: int = 0
    verdict: Verdict = "critical"
    flows: int = 0
    failures: int = 0
    ejections: int = 0
    ejected_until: float = -math.inf
    credit: int = 0

    def is_ejected(self, now: float) -> bool:
        """Whether it is passed over for what it did to earlier flows."""
        return now < self.ejected_until

    def rank(self, now: float) -> int:
        """Return how willingly it is chosen, 0 the most."""
        rank = _RANK[self.verdict]
        return _EJECTED if rank < _EJECTED and self.is_ejected(now) else rank

    def preference(self, now: float) -> tuple[int, int]:
        """Return what is compared: the rank, and among equals the priority (RFC 2782: the lower one first)."""
        return self.rank(now), self.priority


class Balancer:
    """The backends of one route."""

    def __init__(
        self, weights: Mapping[Endpoint, int], policy: Policy, priorities: Mapping[Endpoint, int] = _NONE
    ) -> None:
        """A backend that `priorities` does not name has 0."""
        self._standings: dict[Endpoint, Standing] = {}
        self._leaving: dict[Endpoint, Standing] = {}
        """Those that the route has no more, and that flows run on."""
        self.update(weights, policy, priorities)

    def update(
        self, weights: Mapping[Endpoint, int], policy: Policy, priorities: Mapping[Endpoint, int] = _NONE
    ) -> None:
        """Go on with other backends, weights, priorities or another policy; what stays keeps its standing.

        So does what comes back while flows run on it from before: they end on the count that they began on.
        """
        known, self._policy = self._leaving | self._standings, policy
        self._standings = {}
        for address, weight in weights.items():
            standing = known.pop(address) if address in known else Standing(address, weight)
            self._standings[address] = standing
            standing.weight, standing.priority = weight, priorities.get(address, 0)
        self._leaving = {address: standing for address, standing in known.items() if standing.flows}

    @property
    def is_idle(self) -> bool:
        """Whether no flow runs that it counts."""
        return not self._leaving and not any(each.flows for each in self._standings.values())

    def standings(self) -> Collection[Standing]:
        """Return how each is doing, as configured."""
        return self._standings.values()

    def judge(self, address: Endpoint, verdict: Verdict) -> bool:
        """Take the verdict of a backend's checks in; say whether it is another one."""
        standing = self._standings[address]
        before, standing.verdict = standing.verdict, verdict
        return verdict != before

    def has_better(self, address: Endpoint, now: float) -> bool:
        """Say whether another backend would be chosen rather than this one."""
        own = self._standings[address].preference(now)
        return any(each.preference(now) < own for each in self._standings.values())

    def pick(self, source: str, now: float, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """Choose a backend that was not tried yet for a new flow, and count it; None when all were.

        `source` is who asks, by the name that its certificate proved: with source_hash it stays with one backend.
        """
        left = [each for each in self._standings.values() if each.address not in tried]
        if not left:
            return None
        best = min(each.preference(now) for each in left)
        chosen = self._choose([each for each in left if each.preference(now) == best], source)
        chosen.flows += 1
        return chosen.address

    def ended(self, address: Endpoint) -> None:
        """Take back what pick counted, on a backend that has left since, too."""
        standing = self._standings.get(address) or self._leaving.get(address)
        if standing is not None and standing.flows:
            standing.flows -= 1
            if not standing.flows:
                self._leaving.pop(address, None)

    def succeeded(self, address: Endpoint) -> None:
        """The backend answered a flow."""
        standing = self._standings.get(address)
        if standing is not None and standing.failures:
            standing.failures = standing.ejections = 0
            standing.ejected_until = -math.inf

    def failed(self, address: Endpoint, now: float) -> bool:
        """The backend could not be reached for a flow; say whether it is ejected for that, from now on."""
        standing = self._standings.get(address)
        if standing is None:
            return False
        standing.failures += 1
        if standing.failures < self._policy.eject_after or standing.is_ejected(now):
            return False
        seconds = min(EJECT_SECONDS_MAX, self._policy.eject_s * 2.0 ** min(standing.ejections, 10))
        standing.ejections += 1
        standing.ejected_until = now + seconds
        return True

    def _choose(self, candidates: list[Standing], source: str) -> Standing:
        if self._policy.method == "source_hash":
            return max(candidates, key=lambda each: _affinity(source, each))
        if self._policy.method == "least_connections":
            least = min(each.flows / each.weight for each in candidates)
            candidates = [each for each in candidates if each.flows / each.weight == least]
        return _next_in_turn(candidates)


def _next_in_turn(candidates: Iterable[Standing]) -> Standing:
    """Return the next one by weight, spread evenly: nginx's smooth weighted round robin."""
    candidates = list(candidates)
    for each in candidates:
        each.credit += each.weight
    chosen = max(candidates, key=lambda each: each.credit)
    chosen.credit -= sum(each.weight for each in candidates)
    return chosen


def _affinity(source: str, standing: Standing) -> float:
    """Return a weighted rendezvous score: who loses its backend moves, everybody else stays (Schindelhauer 2005)."""
    digest = hashlib.blake2b(f"{source}\0{standing.address}".encode(), digest_size=_HASH_BYTES).digest()
    drawn = (int.from_bytes(digest, "big") + 0.5) / _HASH_RANGE
    return -standing.weight / math.log(drawn)
