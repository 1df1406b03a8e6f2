"""The forwarder's table: which source address is which side of which link, and what to do with its packets.

Pure: packets and sockaddr bytes in, packets and sockaddr bytes out; `now` and random bytes are passed in.
Sends nothing, and reads nothing of a link's QUIC but the fixed bit of byte 0. What the kernel forwards instead
(relay.kernel) is told in `take_changed` and counted in `counted`. Source: protocol.md, Forwarder.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from ztna.jsontypes import Secret
from ztna.wire import forwarder as wire
from ztna.wire.control import Address

LINK_IDLE_SECONDS = 60.0
NONCE_SECONDS = 60.0
CHALLENGES_PER_SECOND = 20
"""For each bind id: a peer asks five times a second, and a spoofer gets less than it sends."""
UNLIMITED_BYTES = 1 << 62
BURST_SECONDS = 0.25
BURST_BYTES_MIN = 128 * 1024
"""A link that was quiet may send so much, or BURST_SECONDS of its rate, at once."""
QUOTA_GRANT_BYTES = 256 * 1024
"""A side takes so much of its link's quota at a time."""
ALLOWANCES_MAX = 100_000

_NONCE_INPUT = struct.Struct(">qq")

RawAddress = bytes
RawPacket = tuple[bytes, RawAddress]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one link may carry: bytes a second each way, and bytes both ways in each period; None: any."""

    rate_bytes_per_s: int | None = None
    quota_bytes: int | None = None
    quota_period_s: float = 86_400.0

    @property
    def burst_bytes(self) -> int:
        """How much a link that was quiet may send at once."""
        return max(int((self.rate_bytes_per_s or 0) * BURST_SECONDS), BURST_BYTES_MIN)


@dataclass(slots=True)
class Allowance:
    """What is left of the quota of one pair of peers in a period; it outlives their links."""

    period: int
    left: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was passed on for a link, from its agent (`up`) and from its connector (`down`)."""

    up_packets: int
    up_bytes: int
    down_packets: int
    down_bytes: int


@dataclass(slots=True)
class Side:
    """One end of a link: what proves it, where it is bound, and what came from it."""

    link: Hashable
    bind_id: bytes
    secret: Secret
    address: RawAddress | None = None
    onward: RawAddress | None = None
    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    heard_at: float = 0.0
    packets_at_sweep: int = 0
    moves: int = 0
    challenge_second: int = -1
    challenges: int = 0
    allowance: Allowance | None = None
    """What is left of the quota it shares."""
    budget: int = UNLIMITED_BYTES
    """Bytes it may send before the limits are asked again."""
    filled_at: float = 0.0


@dataclass(slots=True)
class Link:
    """The two sides of one link."""

    agent: Side
    connector: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.agent, self.connector

    @property
    def allowance(self) -> Allowance | None:
        return self.agent.allowance

    @property
    def exhausted(self) -> bool:
        """Whether its quota is used up."""
        return self.allowance is not None and self.allowance.left <= 0


@dataclass(slots=True)
class LinkTable:
    """Every live link by its key, its sides by bind id and by bound source address."""

    nonce_key: Secret
    """32 random bytes: challenges are derived from it, the source address and the time."""
    limits: Limits = Limits()
    drops: Counter[str] = field(default_factory=Counter)
    """Packets not passed on, by why: unknown_source, unbound_peer, malformed, unknown_bind, challenge_rate,
    link_rate, link_quota."""
    passed_bytes: int = 0
    """Passed on so far, for links that have ended too."""
    _links: dict[Hashable, Link] = field(default_factory=dict)
    _sides: dict[bytes, Side] = field(default_factory=dict)
    _routes: dict[RawAddress, Side] = field(default_factory=dict)
    _allowances: dict[Hashable, Allowance] = field(default_factory=dict)
    _changed: set[RawAddress] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._links)

    @property
    def bound(self) -> int:
        """How many source addresses are bound."""
        return len(self._routes)

    def links(self) -> dict[Hashable, Link]:
        """Return the live links, to be read only."""
        return self._links

    def traffic(self, key: Hashable) -> Traffic | None:
        """Return what was passed on for a link, None when there is no such link."""
        link = self._links.get(key)
        if link is None:
            return None
        up, down = link.sides
        return Traffic(up.packets, up.bytes, down.packets, down.bytes)

    def add(
        self,
        key: Hashable,
        agent: tuple[bytes, Secret],
        connector: tuple[bytes, Secret],
        peers: Hashable,
        now: float,
    ) -> None:
        """Let both sides of a link bind, each with its (id, secret); as many links as there are sessions.

        `peers` says between whom: their links share one quota, also one after the other.
        """
        link, allowance = Link(Side(key, *agent), Side(key, *connector)), self._allow(peers, now)
        for side in link.sides:
            side.allowance = allowance
            if self.limits.rate_bytes_per_s is not None or allowance is not None:
                side.budget = 0
        self._links[key] = link
        self._sides[link.agent.bind_id] = link.agent
        self._sides[link.connector.bind_id] = link.connector

    def remove(self, key: Hashable) -> None:
        """End a link: nothing of it is passed on from here. Harmless when it is not there."""
        link = self._links.pop(key, None)
        if link is not None:
            for side in link.sides:
                del self._sides[side.bind_id]
                self._unbind(side, link)
                if link.allowance is not None:
                    link.allowance.left += side.budget

    @property
    def has_changed(self) -> bool:
        """Whether `take_changed` has something to tell."""
        return bool(self._changed)

    def take_changed(self) -> dict[RawAddress, RawAddress | None]:
        """Return where the sources whose way changed since the last call go now; None: nothing is passed on."""
        changed, self._changed = self._changed, set()
        return {source: self._onward(source) for source in changed}

    def side_at(self, source: RawAddress) -> Side | None:
        """Return the side that is bound at an address."""
        return self._routes.get(source)

    def counted(self, side: Side, packets: int, size: int) -> None:
        """Hear what else was passed on for a side, by the kernel; its packets cost quota like any.

        The side may have moved, or its link ended, since.
        """
        side.packets += packets
        side.bytes += size
        self.passed_bytes += size
        if side.allowance is not None:
            side.allowance.left -= size
            link = self._links.get(side.link)
            if link is not None and link.exhausted:
                self._way_changed(link)

    def charge(self, key: Hashable, size: int) -> bool:
        """Take what went for a link by another way, over TCP, off its quota; False when that is used up."""
        link = self._links.get(key)
        if link is None or link.allowance is None:
            return True
        link.allowance.left -= size
        if link.exhausted:
            self._way_changed(link)
        return not link.exhausted

    def handle(self, packets: Sequence[RawPacket], now: float) -> list[RawPacket]:
        """Return what to send for a batch that was received: copies for the other side, and answers to binds."""
        out: list[RawPacket] = []
        passed = 0
        routes = self._routes
        for packet in packets:
            data, source = packet
            side = routes.get(source)
            if side is None or not data or not data[0] & wire.QUIC_FIXED_BIT:
                self._handle_other(data, source, side, now, out)
                continue
            onward = side.onward
            if onward is None:
                side.dropped += 1
                self.drops["unbound_peer"] += 1
                continue
            size = len(data)
            side.budget -= size
            if side.budget < 0 and not self._replenish(side, size, now):
                continue
            side.packets += 1
            side.bytes += size
            passed += size
            out.append((data, onward))
        self.passed_bytes += passed
        return out

    def sweep(self, now: float) -> None:
        """Unbind the sides of links that have been idle for LINK_IDLE_SECONDS; call it every few seconds.

        The clock is not asked for each packet: a side whose counter moved since the last sweep was heard now.
        """
        for side in list(self._routes.values()):
            if side.packets != side.packets_at_sweep:
                side.packets_at_sweep = side.packets
                side.heard_at = now
        for link in self._links.values():
            if now - max(link.agent.heard_at, link.connector.heard_at) >= LINK_IDLE_SECONDS:
                self._unbind(link.agent, link)
                self._unbind(link.connector, link)
        self._renew_allowances(now)

    def _allow(self, peers: Hashable, now: float) -> Allowance | None:
        """Return the quota that links between these peers share, None when there is no limit."""
        quota = self.limits.quota_bytes
        if quota is None:
            return None
        if peers not in self._allowances and len(self._allowances) >= ALLOWANCES_MAX:
            # The one that was made first: who is many enough to get there could as well wait for the next period.
            del self._allowances[next(iter(self._allowances))]
        return self._allowances.setdefault(peers, Allowance(self._period(now), quota))

    def _renew_allowances(self, now: float) -> None:
        """Begin a new period where the last is over; pairs without a link are forgotten."""
        period = self._period(now)
        if not self._allowances or all(each.period == period for each in self._allowances.values()):
            return
        for link in self._links.values():
            allowance = link.allowance
            if allowance is not None and allowance.period != period:
                allowance.period, allowance.left = period, self.limits.quota_bytes or 0
            self._way_changed(link)
        self._allowances = {key: each for key, each in self._allowances.items() if each.period == period}

    def _period(self, now: float) -> int:
        return int(now / self.limits.quota_period_s)

    def _replenish(self, side: Side, size: int, now: float) -> bool:
        """Let a side send on as the limits allow; False when the packet of `size` bytes may not pass."""
        link, rate = self._links[side.link], self.limits.rate_bytes_per_s
        grant = UNLIMITED_BYTES
        if rate is not None:
            grant = min(self.limits.burst_bytes, int((now - side.filled_at) * rate))
            side.filled_at = now
        if link.allowance is not None:
            grant = max(0, min(grant, link.allowance.left, QUOTA_GRANT_BYTES))
            link.allowance.left -= grant
        side.budget += grant
        if side.budget >= 0:
            return True
        side.budget += size
        side.dropped += 1
        self.drops["link_quota" if link.exhausted else "link_rate"] += 1
        return False

    def _handle_other(
        self, data: bytes, source: RawAddress, side: Side | None, now: float, out: list[RawPacket]
    ) -> None:
        if data[: wire.HEAD_BYTES] != wire.BIND:
            self.drops["malformed" if side else "unknown_source"] += 1
            return
        if len(data) != wire.BIND_BYTES:
            self.drops["malformed"] += 1
            return
        claimed = self._sides.get(data[4:20])
        if claimed is None:
            self.drops["unknown_bind"] += 1
            return
        mac = data[20:]
        nonces = self._nonces(claimed, source, now)
        for nonce in nonces:
            if wire.proves_bind(claimed.secret, nonce, mac):
                self._bind(claimed, source, now)
                out.append((wire.encode(wire.Bound(nonce, address_of(source))), source))
                return
        if self._may_challenge(claimed, now):
            out.append((wire.encode(wire.Challenge(nonces[0])), source))

    def _nonces(self, side: Side, source: RawAddress, now: float) -> list[bytes]:
        """Return the nonces that a bind from this source may prove, the one to challenge with first.

        They change when the side moves, so that a bind caught before cannot be played back to move it again;
        only the repeats from where it is bound may still prove the nonce that brought it there.
        """
        period = int(now / NONCE_SECONDS)
        moves = (side.moves, side.moves - 1) if side.address == source else (side.moves,)
        return [self._nonce(source, each, move) for move in moves for each in (period, period - 1)]

    def _nonce(self, source: RawAddress, period: int, moves: int) -> bytes:
        message = source + _NONCE_INPUT.pack(period, moves)
        return hmac.digest(self.nonce_key, message, hashlib.sha256)[: wire.NONCE_BYTES]

    def _may_challenge(self, side: Side, now: float) -> bool:
        second = int(now)
        if side.challenge_second != second:
            side.challenge_second, side.challenges = second, 0
        side.challenges += 1
        if side.challenges > CHALLENGES_PER_SECOND:
            self.drops["challenge_rate"] += 1
            return False
        return True

    def _bind(self, side: Side, source: RawAddress, now: float) -> None:
        side.heard_at = now
        if side.address == source:
            return
        holder = self._routes.get(source)
        if holder is not None:
            # The address proved another side before: a source address is one side of one link.
            self._unbind(holder, self._links[holder.link])
        link = self._links[side.link]
        self._unbind(side, link)
        side.address = source
        side.moves += 1
        self._routes[source] = side
        peer = link.connector if side is link.agent else link.agent
        peer.onward = source
        side.onward = peer.address
        self._way_changed(link)

    def _unbind(self, side: Side, link: Link) -> None:
        if side.address is None:
            return
        self._way_changed(link)
        del self._routes[side.address]
        side.address = None
        link.agent.onward = link.connector.onward = None

    def _way_changed(self, link: Link) -> None:
        self._changed.update(side.address for side in link.sides if side.address is not None)

    def _onward(self, source: RawAddress) -> RawAddress | None:
        side = self._routes.get(source)
        return None if side is None or self._links[side.link].exhausted else side.onward


def address_of(source: RawAddress) -> Address:
    """Return the address of kernel sockaddr bytes (sockaddr_in or sockaddr_in6)."""
    ip = IPv4Address(source[4:8]) if len(source) == 16 else IPv6Address(source[8:24])
    return Address(str(ip), int.from_bytes(source[2:4]))
