"""The path switch under a packet link: a UDP socket, bound at the forwarder, that sends on the best path.

Binds, answers challenges and probes, and hands QUIC packets up as if all came from one address, so that changes of
path are invisible to QUIC. Which path is best is sidecar.link.paths' business; it never looks into a QUIC packet.

Candidates of the other family than the forwarder's have a socket of their own, made when one is there to try: a
dual-stack socket would have all addresses twice, and IPv4 in IPv6 clothes. No socket is bound to an address, so that
each outlives those that this host has.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from sidecar.link.paths import KEEPALIVE_INTERVAL_SECONDS, Paths, is_usable
from ztna.errors import ProtocolError, ZtnaError
from ztna.telemetry import dropped
from ztna.udp import SockAddr, UdpSocket
from ztna.wire.control import CANDIDATES_MAX, Address, ForwarderBind, Secret
from ztna.wire.forwarder import (
    NO_MAC,
    TRANSACTION_BYTES,
    Bind,
    Bound,
    Challenge,
    Probe,
    ProbeAnswer,
    bind_mac,
    decode,
    encode,
    is_genuine,
    probe,
    probe_answer,
)

BIND_RETRY_SECONDS = 0.2
BIND_REFRESH_SECONDS = 15.0
SOURCES_MAX = 64
"""How many addresses that proved the probe key are remembered: more than a peer can have candidates."""
TIMER_FLOOR_SECONDS = 0.001

_WHERE = "packet_carrier"
_ANY = {False: "0.0.0.0", True: "::"}


class PathSwitch:
    """Carries the packets of one link; `received` gets (packet, the forwarder's address) in batches.

    `path_changed` is called when another path carries from now on, and `candidates_changed` when the peer is to hear
    of other candidates than it did. `addresses` are those of this host's interfaces.
    """

    def __init__(
        self,
        bind: ForwarderBind,
        probe_key: Secret,
        received: Callable[[Sequence[tuple[bytes, SockAddr]]], None],
        path_changed: Callable[[], None],
        candidates_changed: Callable[[], None] = lambda: None,
        *,
        addresses: Callable[[], Sequence[str]] = tuple,
        allow_private: bool,
    ) -> None:
        self.forwarder: SockAddr = (bind.address.ip, bind.address.port)
        self.reflexive: Address | None = None
        self.bound: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paths = Paths(self.forwarder)
        self._bind = bind
        self._probe_key = bytes(probe_key)
        self._received = received
        self._path_changed = path_changed
        self._candidates_changed = candidates_changed
        self._addresses = addresses
        self._must_tell = False
        self._carrying = self.forwarder
        self._allow_private = allow_private
        self._loop = asyncio.get_running_loop()
        self._nonce: bytes | None = None
        # QUIC is taken from these alone: anybody can send to this port, and half-open handshakes are few.
        self._sources: OrderedDict[SockAddr, None] = OrderedDict()
        self._bind_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        # By whether it is IPv6.
        self._sockets: dict[bool, UdpSocket] = {}
        self._out = self._socket(self.forwarder)
        self._tick()

    @property
    def bind_id(self) -> bytes:
        """Which binding this is."""
        return bytes(self._bind.bind_id)

    def hand_over(
        self,
        received: Callable[[Sequence[tuple[bytes, SockAddr]]], None],
        path_changed: Callable[[], None],
        candidates_changed: Callable[[], None],
    ) -> None:
        """Deliver to somebody else from now on."""
        self._received, self._path_changed = received, path_changed
        self._candidates_changed = candidates_changed

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Send QUIC packets on the path that carries now, whatever address QUIC believes in."""
        current = self._carrying
        self._out.send([(packet, current) for packet, _ in packets])

    def probe(self, candidates: Iterable[SockAddr]) -> int:
        """Start probing the peer's candidates; return how many may not be probed or found no room."""
        wanted = list(candidates)
        usable = [each for each in wanted if self._can_reach(each)]
        turned_away = len(wanted) - len(usable) + self.paths.add(usable, time.monotonic())
        if turned_away:
            dropped(_WHERE, "candidate", turned_away)
        self._tick()
        return turned_away

    def local_candidates(self) -> tuple[Address, ...]:
        """Return the addresses a peer may try: the one the forwarder saw, then those of the interfaces."""
        found = [self.reflexive] if self.reflexive is not None else []
        for host in self._addresses():
            if self._can_reach((host, 1)):
                found.append(Address(host, self._socket((host, 0)).address[1]))
        usable = [
            each for each in found if is_usable((each.ip, each.port), allow_private=self._allow_private)
        ]
        return tuple(dict.fromkeys(usable))[:CANDIDATES_MAX]

    def network_changed(self) -> None:
        """Take nothing for granted: bind again, and ask every candidate; the peer hears of ours when we are bound."""
        self._must_tell = True
        self._bind_at = time.monotonic()
        self.paths.doubt(self._bind_at)
        self._tick()

    def close(self) -> None:
        """Stop at once; harmless twice."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.bound.cancel()
        for each in self._sockets.values():
            each.close()

    def _socket(self, to: SockAddr) -> UdpSocket:
        """Return the socket of an address's family, made at the first use. Raises ZtnaError, OSError."""
        is_ipv6 = ":" in to[0]
        if is_ipv6 not in self._sockets:
            self._sockets[is_ipv6] = UdpSocket.open((_ANY[is_ipv6], 0), self._arrived)
        return self._sockets[is_ipv6]

    def _can_reach(self, candidate: SockAddr) -> bool:
        """Say whether a candidate may be probed, and there is a socket to do it with."""
        if self._is_closed or not is_usable(candidate, allow_private=self._allow_private):
            return False
        try:
            self._socket(candidate)
        except (ZtnaError, OSError):
            return False  # this host has no such family, or no descriptor left
        return True

    def _tick(self) -> None:
        """Send what is due now, and come back when the next thing is."""
        if self._is_closed:
            return
        now = time.monotonic()
        if now >= self._bind_at:
            self._bind_at = now + BIND_RETRY_SECONDS
            self._send_bind()
        probes = self.paths.due(now, _transaction)
        for each in probes:
            self._socket(each.address).send([(probe(self._probe_key, each.transaction), each.address)])
        self._look_at_path()
        due_at = min(self._bind_at, self.paths.next_timer() or now + KEEPALIVE_INTERVAL_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(due_at - now, TIMER_FLOOR_SECONDS), self._tick)

    def _look_at_path(self) -> None:
        if self.paths.current != self._carrying:
            self._carrying = self.paths.current
            self._out = self._socket(self._carrying)
            self._path_changed()

    def _send_bind(self) -> None:
        mac = NO_MAC if self._nonce is None else bind_mac(self._bind.bind_secret, self._nonce)
        self._socket(self.forwarder).send([(encode(Bind(self._bind.bind_id, mac)), self.forwarder)])

    def _arrived(self, packets: list[tuple[bytes, SockAddr]]) -> None:
        forwarder = self.forwarder
        quic: list[tuple[bytes, SockAddr]] = []
        for data, source in packets:
            if not data or not data[0] & 0x40:
                self._other(data, source)
            elif source == forwarder or source in self._sources:
                quic.append((data, forwarder))
            else:
                dropped(_WHERE, "unknown_source")
        if quic and not self._is_closed:
            if self._carrying != forwarder and packets[-1][1] == forwarder:
                self._strayed()
            self._received(quic)

    def _strayed(self) -> None:
        """The peer sends by the forwarder, and we do not: it may know that the path is dead before we do."""
        if self.paths.wonder(time.monotonic()):
            self._tick()

    def _other(self, data: bytes, source: SockAddr) -> None:
        try:
            packet = decode(data)
        except ProtocolError:
            dropped(_WHERE, "malformed")
            return
        if isinstance(packet, Probe | ProbeAnswer):
            self._probed(packet, source)
        elif source != self.forwarder:
            dropped(_WHERE, "not_the_forwarder")
        elif isinstance(packet, Challenge):
            # A forwarder that was restarted, or moved us, asks anew; the same nonce was answered already.
            if packet.nonce != self._nonce:
                self._nonce = packet.nonce
                self._send_bind()
        elif isinstance(packet, Bound) and packet.nonce == self._nonce:
            # A NAT was restarted, for one: nothing that it let through before is let through now.
            is_moved = self.reflexive is not None and self.reflexive != packet.address
            self.reflexive = packet.address
            self._bind_at = time.monotonic() + BIND_REFRESH_SECONDS
            if not self.bound.done():
                self.bound.set_result(None)
            elif self._must_tell or is_moved:
                self._must_tell = False
                self._candidates_changed()

    def _probed(self, packet: Probe | ProbeAnswer, source: SockAddr) -> None:
        if not is_genuine(self._probe_key, packet):
            dropped(_WHERE, "forged_probe")
            return
        now = time.monotonic()
        if source not in self._sources:
            # The peer may have moved, and then what was found out of its old place is worth nothing.
            self.paths.doubt(now)
        # The peer sends on a path only after its own probe of it came through here.
        self._sources[source] = None
        self._sources.move_to_end(source)
        if len(self._sources) > SOURCES_MAX:
            self._sources.popitem(last=False)
        if isinstance(packet, ProbeAnswer):
            self.paths.answered(packet.transaction, source, now)
            self._look_at_path()
        else:
            self._socket(source).send([(probe_answer(self._probe_key, packet.transaction), source)])
            # Where a genuine probe comes from is a candidate too (peer-reflexive, RFC 8445 7.3.1.3).
            if self._can_reach(source):
                self.paths.add((source,), now)
                self._tick()


def _transaction() -> bytes:
    return os.urandom(TRANSACTION_BYTES)
