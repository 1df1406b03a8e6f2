"""The forwarder's table: which source address is which side of which link, and what to do with its packets.

Pure: packets and sockaddr bytes in, packets and sockaddr bytes out; `now` and random bytes are passed in.
Sends nothing, and reads nothing of a link's QUIC but the fixed bit of byte 0. Source: protocol.md, Forwarder.
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

_NONCE_INPUT = struct.Struct(">qq")

RawAddress = bytes
RawPacket = tuple[bytes, RawAddress]


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


@dataclass(slots=True)
class Link:
    """The two sides of one link."""

    agent: Side
    connector: Side


@dataclass(slots=True)
class LinkTable:
    """Every live link by its key, its sides by bind id and by bound source address."""

    nonce_key: Secret
    """32 random bytes: challenges are derived from it, the source address and the time."""
    drops: Counter[str] = field(default_factory=Counter)
    """Packets not passed on, by why: unknown_source, unbound_peer, malformed, unknown_bind, rate."""
    _links: dict[Hashable, Link] = field(default_factory=dict)
    _sides: dict[bytes, Side] = field(default_factory=dict)
    _routes: dict[RawAddress, Side] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._links)

    @property
    def bound(self) -> int:
        """How many source addresses are bound."""
        return len(self._routes)

    def links(self) -> dict[Hashable, Link]:
        """Return the live links, to be read only."""
        return self._links

    def add(self, key: Hashable, agent: tuple[bytes, Secret], connector: tuple[bytes, Secret]) -> None:
        """Let both sides of a link bind, each with its (id, secret); as many links as there are sessions."""
        link = Link(Side(key, *agent), Side(key, *connector))
        self._links[key] = link
        self._sides[link.agent.bind_id] = link.agent
        self._sides[link.connector.bind_id] = link.connector

    def remove(self, key: Hashable) -> None:
        """End a link: nothing of it is passed on from here. Harmless when it is not there."""
        link = self._links.pop(key, None)
        if link is not None:
            for side in (link.agent, link.connector):
                del self._sides[side.bind_id]
                self._unbind(side)

    def handle(self, packets: Sequence[RawPacket], now: float) -> list[RawPacket]:
        """Return what to send for a batch that was received: copies for the other side, and answers to binds."""
        out: list[RawPacket] = []
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
            side.packets += 1
            side.bytes += len(data)
            out.append((data, onward))
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
                self._unbind(link.agent)
                self._unbind(link.connector)

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
            self.drops["rate"] += 1
            return False
        return True

    def _bind(self, side: Side, source: RawAddress, now: float) -> None:
        side.heard_at = now
        if side.address == source:
            return
        holder = self._routes.get(source)
        if holder is not None:
            # The address proved another side before: a source address is one side of one link.
            self._unbind(holder)
        self._unbind(side)
        side.address = source
        side.moves += 1
        self._routes[source] = side
        peer = self._peer(side)
        peer.onward = source
        side.onward = peer.address

    def _unbind(self, side: Side) -> None:
        if side.address is None:
            return
        del self._routes[side.address]
        side.address = side.onward = None
        link = self._links.get(side.link)
        if link is not None:
            self._peer(side).onward = None

    def _peer(self, side: Side) -> Side:
        link = self._links[side.link]
        return link.connector if side is link.agent else link.agent


def address_of(source: RawAddress) -> Address:
    """Return the address of kernel sockaddr bytes (sockaddr_in or sockaddr_in6)."""
    ip = IPv4Address(source[4:8]) if len(source) == 16 else IPv6Address(source[8:24])
    return Address(str(ip), int.from_bytes(source[2:4]))
