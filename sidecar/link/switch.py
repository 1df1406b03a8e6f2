"""The path switch under a packet link: one UDP socket, bound at the forwarder, that sends on the best path.

Binds, answers challenges and probes, and hands QUIC packets up as if all came from one address, so that changes of
path are invisible to QUIC. Which path is best is sidecar.link.paths' business; it never looks into a QUIC packet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from sidecar.link.paths import KEEPALIVE_INTERVAL_SECONDS, Paths, is_usable
from ztna.errors import ProtocolError
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
_SIOCGIFADDR = 0x8915
_IFNAME_BYTES = 15
_IFREQ = struct.Struct("256s")


class PathSwitch:
    """Carries the packets of one link; `received` gets (packet, the forwarder's address) in batches.

    `path_changed` is called when another path carries from now on.
    """

    def __init__(
        self,
        bind: ForwarderBind,
        probe_key: Secret,
        received: Callable[[Sequence[tuple[bytes, SockAddr]]], None],
        path_changed: Callable[[], None],
        *,
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
        self._carrying = self.forwarder
        self._allow_private = allow_private
        self._loop = asyncio.get_running_loop()
        self._nonce: bytes | None = None
        # QUIC is taken from these alone: anybody can send to this port, and half-open handshakes are few.
        self._sources: OrderedDict[SockAddr, None] = OrderedDict()
        self._bind_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        any_address = "::" if ":" in self.forwarder[0] else "0.0.0.0"
        self._socket = UdpSocket.open((any_address, 0), self._arrived)
        self._tick()

    @property
    def bind_id(self) -> bytes:
        """Which binding this is."""
        return bytes(self._bind.bind_id)

    def hand_over(
        self,
        received: Callable[[Sequence[tuple[bytes, SockAddr]]], None],
        path_changed: Callable[[], None],
    ) -> None:
        """Deliver to somebody else from now on."""
        self._received, self._path_changed = received, path_changed

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Send QUIC packets on the path that carries now, whatever address QUIC believes in."""
        current = self.paths.current
        self._socket.send([(packet, current) for packet, _ in packets])

    def probe(self, candidates: Iterable[SockAddr]) -> int:
        """Start probing the peer's candidates; return how many may not be probed or found no room."""
        wanted = list(candidates)
        usable = [each for each in wanted if is_usable(each, allow_private=self._allow_private)]
        turned_away = len(wanted) - len(usable) + self.paths.add(usable, time.monotonic())
        if turned_away:
            dropped(_WHERE, "candidate", turned_away)
        self._tick()
        return turned_away

    def local_candidates(self) -> tuple[Address, ...]:
        """Return the addresses a peer may try: the one the forwarder saw, then those of the interfaces."""
        port = self._socket.address[1]
        found = [self.reflexive] if self.reflexive is not None else []
        found += [Address(host, port) for host in _interface_addresses()]
        usable = [
            each for each in found if is_usable((each.ip, each.port), allow_private=self._allow_private)
        ]
        return tuple(dict.fromkeys(usable))[:CANDIDATES_MAX]

    def close(self) -> None:
        """Stop at once; harmless twice."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.bound.cancel()
        self._socket.close()

    def _tick(self) -> None:
        """Send what is due now, and come back when the next thing is."""
        if self._is_closed:
            return
        now = time.monotonic()
        if now >= self._bind_at:
            self._bind_at = now + BIND_RETRY_SECONDS
            self._send_bind()
        probes = self.paths.due(now, _transaction)
        self._socket.send([(probe(self._probe_key, each.transaction), each.address) for each in probes])
        self._look_at_path()
        due_at = min(self._bind_at, self.paths.next_timer() or now + KEEPALIVE_INTERVAL_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(due_at - now, TIMER_FLOOR_SECONDS), self._tick)

    def _look_at_path(self) -> None:
        if self.paths.current != self._carrying:
            self._carrying = self.paths.current
            self._path_changed()

    def _send_bind(self) -> None:
        mac = NO_MAC if self._nonce is None else bind_mac(self._bind.bind_secret, self._nonce)
        self._socket.send([(encode(Bind(self._bind.bind_id, mac)), self.forwarder)])

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
            self._received(quic)

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
            self.reflexive = packet.address
            self._bind_at = time.monotonic() + BIND_REFRESH_SECONDS
            if not self.bound.done():
                self.bound.set_result(None)

    def _probed(self, packet: Probe | ProbeAnswer, source: SockAddr) -> None:
        if not is_genuine(self._probe_key, packet):
            dropped(_WHERE, "forged_probe")
            return
        # The peer sends on a path only after its own probe of it came through here.
        self._sources[source] = None
        self._sources.move_to_end(source)
        if len(self._sources) > SOURCES_MAX:
            self._sources.popitem(last=False)
        if isinstance(packet, ProbeAnswer):
            self.paths.answered(packet.transaction, source, time.monotonic())
            self._look_at_path()
        else:
            self._socket.send([(probe_answer(self._probe_key, packet.transaction), source)])
            # Where a genuine probe comes from is a candidate too (peer-reflexive, RFC 8445 7.3.1.3).
            if is_usable(source, allow_private=self._allow_private):
                self.paths.add((source,), time.monotonic())
                self._tick()


def _transaction() -> bytes:
    return os.urandom(TRANSACTION_BYTES)


def _interface_addresses() -> list[str]:
    """Return the IPv4 address of each interface that has one (netdevice(7): the primary one)."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            # An interface without an IPv4 address answers EADDRNOTAVAIL.
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, _IFREQ.pack(name.encode()[:_IFNAME_BYTES]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    return addresses
