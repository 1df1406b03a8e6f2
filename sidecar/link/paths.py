"""Which path a packet link sends on: the forwarder at once, a candidate once it is validated (protocol.md, Link).

Pure: `now` is seconds of any one clock, transactions are drawn by the caller. Seals and sends no probe
(sidecar.link.packet does), and is invisible to QUIC.

    candidate --> probing --answer--> valid --3 probes silent--> resting --30 s--> probing
                     |                                              ^
                     +----------------10 s without answer-----------+
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
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
BETTER_RTT_RATIO = 1.5
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


class _State(Enum):
    PROBING = auto()
    VALID = auto()
    RESTING = auto()


@dataclass(slots=True)
class _Candidate:
    address: SockAddr
    state: _State
    due_at: float
    since: float
    silent: int = 0
    rtt: float = 0.0


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

    def add(self, addresses: Iterable[SockAddr], now: float) -> int:
        """Start probing candidates that are not known yet; return how many found no room.

        The caller has sorted out unusable ones (`is_usable`). Naming a resting candidate again starts it again.
        """
        turned_away = 0
        for address in addresses:
            known = self._candidates.get(address)
            if known is not None:
                if known.state is _State.RESTING:
                    self._probe_again(known, now)
            elif address == self.forwarder or len(self._candidates) >= CANDIDATES_TRIED_MAX:
                turned_away += 1
            else:
                self._candidates[address] = _Candidate(address, _State.PROBING, now, now)
        return turned_away

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
        candidate = self._candidates[source]
        candidate.rtt = now - sent[1]
        candidate.silent = 0
        if candidate.state is not _State.VALID:
            candidate.state = _State.VALID
            candidate.due_at = now + KEEPALIVE_INTERVAL_SECONDS
        self._choose()
        return True

    def next_timer(self) -> float | None:
        """Return when `due` has something to do next; None without candidates."""
        return min((candidate.due_at for candidate in self._candidates.values()), default=None)

    def _step(self, candidate: _Candidate, now: float) -> bool:
        """Move a candidate whose time has come; return whether to probe it."""
        if candidate.state is _State.RESTING:
            self._probe_again(candidate, now)
        if candidate.state is _State.PROBING:
            if now - candidate.since >= PROBE_GIVE_UP_SECONDS:
                return self._rest(candidate, now)
            candidate.due_at = now + PROBE_INTERVAL_SECONDS
            return True
        if candidate.silent >= SILENT_PROBES_MAX:
            return self._rest(candidate, now)
        candidate.silent += 1
        last = candidate.silent == SILENT_PROBES_MAX
        candidate.due_at = now + (SILENCE_VERDICT_SECONDS if last else KEEPALIVE_INTERVAL_SECONDS)
        return True

    @staticmethod
    def _probe_again(candidate: _Candidate, now: float) -> None:
        candidate.state, candidate.since, candidate.due_at = _State.PROBING, now, now

    @staticmethod
    def _rest(candidate: _Candidate, now: float) -> bool:
        candidate.state, candidate.due_at = _State.RESTING, now + REST_SECONDS
        return False

    def _remember(self, transaction: bytes, address: SockAddr, now: float) -> None:
        if len(self._transactions) >= TRANSACTIONS_MAX:
            del self._transactions[next(iter(self._transactions))]  # the oldest: its answer is late anyway
        self._transactions[transaction] = (address, now)

    def _choose(self) -> None:
        valid = [candidate for candidate in self._candidates.values() if candidate.state is _State.VALID]
        if not valid:
            self.current = self.forwarder
            return
        best = min(valid, key=lambda candidate: candidate.rtt)
        current = self._candidates.get(self.current)
        if current is None or current.state is not _State.VALID or best.rtt * BETTER_RTT_RATIO < current.rtt:
            self.current = best.address
