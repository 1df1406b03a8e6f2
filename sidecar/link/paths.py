"""Which path a packet link sends on: the forwarder at once, a candidate once it is validated (protocol.md, Link).

Pure: `now` is seconds of any one clock, transactions are drawn by the caller. Seals and sends no probe
(sidecar.link.packet does), and is invisible to QUIC.

    candidate --> probing --answer--> valid --3 probes silent--> resting --30 s, 60 s...--> probing
                   ^ |                  |                           ^
                   | +------------------|--10 s without answer------+
                   +--3 probes silent---+ in doubt: a network changed, here or there

A valid path that is in doubt goes on carrying while it is asked at the pace of probing, so that one that still works
is not left, and one that does not is left within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, ip_address
from typing import NamedTuple

SockAddr = tuple[str, int]

CANDIDATES_TRIED_MAX = 16
PROBE_INTERVAL_SECONDS = 0.2
PROBE_GIVE_UP_SECONDS = 10.0
KEEPALIVE_INTERVAL_SECONDS = 1.0
SILENT_PROBES_MAX = 3
SILENCE_VERDICT_SECONDS = 0.8
REST_SECONDS = 30.0
REST_DOUBLINGS_MAX = 4
"""Each rest is twice as long as the one before until there was an answer: most that cannot be reached never can."""
BETTER_RTT_RATIO = 1.5
BETTER_RTT_SECONDS = 0.001
"""Another path takes over when it is faster by both: of two in one building either may be twice as fast at times."""
RTT_WEIGHT = 0.25
"""What a new measurement counts against those before."""
DOUBT_ROUND_TRIPS = 2.0
"""How long at least the answer of a path in doubt is waited for, of its round trips."""
WONDER_SECONDS = 0.3
"""A path that was answered so lately is not doubted because of what the other end does."""
TRANSACTIONS_MAX = 256

_SHARED_ADDRESSES = IPv4Network("100.64.0.0/10")  # RFC 6598: private in all but name


def is_usable(address: SockAddr, *, allow_private: bool) -> bool:
    """Say whether a candidate may be probed.

    Never loopback, link-local, multicast, broadcast or unspecified ones; private ranges only where configured.
    """
    host, port = address
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    if not 0 < port <= 65535:
        return False
    if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return False
    return allow_private if ip.is_private or ip in _SHARED_ADDRESSES else True


class Probe(NamedTuple):
    """A probe to send now."""

    address: SockAddr
    transaction: bytes


class State(StrEnum):
    """What is known of a candidate."""

    PROBING = "probing"
    VALID = "valid"
    RESTING = "resting"


class Seen(NamedTuple):
    """A candidate as it is now; `rtt_s` is None while it was never answered."""

    address: SockAddr
    state: State
    rtt_s: float | None


@dataclass(slots=True)
class _Candidate:
    address: SockAddr
    state: State
    due_at: float
    since: float
    silent: int = 0
    rests: int = 0
    rtt: float | None = None
    heard_at: float = 0.0
    doubted_at: float | None = None


class Paths:
    """The candidates of one link and the choice among them."""

    def __init__(self, forwarder: SockAddr) -> None:
        self.forwarder = forwarder
        self.current = forwarder
        self._candidates: dict[SockAddr, _Candidate] = {}
        self._transactions: dict[bytes, tuple[SockAddr, float]] = {}

    @property
    def is_direct(self) -> bool:
        """Whether packets go straight to the peer now."""
        return self.current != self.forwarder

    @property
    def seen(self) -> list[Seen]:
        """The candidates as they are now."""
        return [Seen(each.address, each.state, each.rtt) for each in self._candidates.values()]

    def add(self, addresses: Iterable[SockAddr], now: float) -> int:
        """Start probing candidates that are not known yet; return how many found no room.

        The caller has sorted out unusable ones (`is_usable`). Naming a resting candidate again starts it again. A new
        one takes the place of the one that has rested longest.
        """
        turned_away = 0
        for address in addresses:
            known = self._candidates.get(address)
            if known is not None:
                known.rests = 0
                if known.state is State.RESTING:
                    self._probe_again(known, now)
            elif address == self.forwarder or not self._has_room():
                turned_away += 1
            else:
                self._candidates[address] = _Candidate(address, State.PROBING, now, now)
        return turned_away

    def doubt(self, now: float) -> None:
        """Believe no longer what was found out: a network changed. Everything is asked again at once."""
        for candidate in self._candidates.values():
            candidate.rests = 0
            if candidate.state is State.VALID:
                candidate.doubted_at, candidate.silent, candidate.due_at = now, 0, now
            else:
                self._probe_again(candidate, now)

    def wonder(self, now: float) -> bool:
        """Doubt the path that carries, unless it was doubted or answered lately; return whether it is."""
        current = self._candidates.get(self.current)
        if current is None or current.doubted_at is not None or now - current.heard_at < WONDER_SECONDS:
            return False
        current.doubted_at, current.silent, current.due_at = now, 0, now
        return True

    def due(self, now: float, draw: Callable[[], bytes]) -> list[Probe]:
        """Return the probes to send at `now`, and fall back when a path went silent; `draw` gives 12 random bytes."""
        probes = []
        for candidate in self._candidates.values():
            if now >= candidate.due_at and self._step(candidate, now):
                transaction = draw()
                self._remember(transaction, candidate.address, now)
                probes.append(Probe(candidate.address, transaction))
        self._choose()
        return probes

    def answered(self, transaction: bytes, source: SockAddr, now: float) -> bool:
        """Take an answer in whose mac was right; False when no such probe went to that address."""
        sent = self._transactions.get(transaction)
        if sent is None or sent[0] != source:
            return False
        del self._transactions[transaction]
        candidate = self._candidates.get(source)
        if candidate is None:
            return False
        rtt = now - sent[1]
        candidate.rtt = rtt if candidate.rtt is None else candidate.rtt + RTT_WEIGHT * (rtt - candidate.rtt)
        if candidate.doubted_at is not None and sent[1] < candidate.doubted_at:
            return True  # it says nothing of now
        candidate.silent, candidate.rests, candidate.heard_at = 0, 0, now
        if candidate.state is not State.VALID or candidate.doubted_at is not None:
            candidate.state, candidate.doubted_at = State.VALID, None
            candidate.due_at = now + KEEPALIVE_INTERVAL_SECONDS
        self._choose()
        return True

    def next_timer(self) -> float | None:
        """Return when `due` has something to do next; None without candidates."""
        return min((candidate.due_at for candidate in self._candidates.values()), default=None)

    def _step(self, candidate: _Candidate, now: float) -> bool:
        """Move a candidate whose time has come; return whether to probe it."""
        if candidate.state is State.VALID and candidate.silent >= SILENT_PROBES_MAX:
            if candidate.doubted_at is None:
                return self._rest(candidate, now)
            self._probe_again(candidate, now)  # the other end may be about to find its way here
        if candidate.state is State.RESTING:
            self._probe_again(candidate, now)
        if candidate.state is State.PROBING:
            if now - candidate.since >= PROBE_GIVE_UP_SECONDS:
                return self._rest(candidate, now)
            candidate.due_at = now + PROBE_INTERVAL_SECONDS
            return True
        candidate.silent += 1
        candidate.due_at = now + self._patience(candidate)
        return True

    @staticmethod
    def _patience(candidate: _Candidate) -> float:
        """Return for how long the answer of a valid path is waited for."""
        if candidate.doubted_at is not None:
            return max(PROBE_INTERVAL_SECONDS, DOUBT_ROUND_TRIPS * (candidate.rtt or 0.0))
        last = candidate.silent == SILENT_PROBES_MAX
        return SILENCE_VERDICT_SECONDS if last else KEEPALIVE_INTERVAL_SECONDS

    @staticmethod
    def _probe_again(candidate: _Candidate, now: float) -> None:
        candidate.state, candidate.since, candidate.due_at = State.PROBING, now, now
        candidate.silent, candidate.rtt, candidate.doubted_at = 0, None, None

    @staticmethod
    def _rest(candidate: _Candidate, now: float) -> bool:
        candidate.state, candidate.since = State.RESTING, now
        candidate.due_at = now + REST_SECONDS * 2**candidate.rests
        candidate.rests = min(candidate.rests + 1, REST_DOUBLINGS_MAX)
        return False

    def _has_room(self) -> bool:
        """Make room for one more where one rests."""
        if len(self._candidates) < CANDIDATES_TRIED_MAX:
            return True
        resting = [each for each in self._candidates.values() if each.state is State.RESTING]
        if not resting:
            return False
        del self._candidates[min(resting, key=lambda each: each.since).address]
        return True

    def _remember(self, transaction: bytes, address: SockAddr, now: float) -> None:
        if len(self._transactions) >= TRANSACTIONS_MAX:
            del self._transactions[next(iter(self._transactions))]  # the oldest: its answer is late anyway
        self._transactions[transaction] = (address, now)

    def _choose(self) -> None:
        valid = {
            each.address: each.rtt or 0.0 for each in self._candidates.values() if each.state is State.VALID
        }
        if not valid:
            self.current = self.forwarder
            return
        best = min(valid, key=lambda address: valid[address])
        if self.current not in valid or _is_better(valid[best], valid[self.current]):
            self.current = best


def _is_better(rtt: float, current: float) -> bool:
    return rtt * BETTER_RTT_RATIO < current and rtt + BETTER_RTT_SECONDS < current
