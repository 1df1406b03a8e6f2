"""What programs send into the TUN device: UDP and pings to what is published, and ICMP errors for the rest.

TCP is redirected before it comes here (sidecar.agent.redirect): what comes of it belongs to no connection, and is
dropped. Flows are sidecar.agent.datagrams'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_address

from sidecar.agent.fragments import Reassembly
from sidecar.agent.listeners import PacketPort, Receive, VirtualPort, Write
from ztna.errors import PacketError
from ztna.packet import PROTOCOL_UDP, Packet, Unreachable, icmp_error, parse
from ztna.telemetry import dropped

_WHERE = "agent_tun"


class Tunnel:
    """The published ports by what packets have; pings have port 0."""

    def __init__(self, write: Write, receive: Receive) -> None:
        self._write = write
        self._receive = receive
        self._udp: dict[tuple[str, int], PacketPort] = {}
        self._pings: dict[str, PacketPort] = {}
        self._addresses: frozenset[str] = frozenset()
        self._fragments = Reassembly()
        self._given_up = 0
        self._loop = asyncio.get_running_loop()

    @property
    def bound(self) -> frozenset[VirtualPort]:
        """What is published."""
        return frozenset(port.at for port in (*self._udp.values(), *self._pings.values()))

    def apply(self, wanted: Iterable[VirtualPort]) -> None:
        """Publish UDP and pings as wanted, and nothing else; TCP ports only tell which addresses are somebody's."""
        wanted = frozenset(wanted)
        self._addresses = frozenset(at.at for at in wanted)
        mine = {at for at in wanted if at.protocol != "tcp"}
        before = {port.at: port for port in (*self._udp.values(), *self._pings.values())}
        for at in before.keys() - mine:
            before[at].close()
        ports = [before.get(at) or PacketPort(at, self._write) for at in mine]
        self._udp = {port.at.called: port for port in ports if port.at.protocol == "udp"}
        self._pings = {port.at.at: port for port in ports if port.at.protocol == "icmp"}

    def received(self, data: bytes) -> None:
        """Take what a program sent."""
        whole = self._fragments.take(data, self._loop.time())
        if self._fragments.dropped != self._given_up:
            dropped(_WHERE, "fragments", self._fragments.dropped - self._given_up)
            self._given_up = self._fragments.dropped
        if whole is None:
            return
        try:
            packet = parse(whole)
            if ip_address(packet.destination).is_multicast:
                raise PacketError("multicast")  # never answered with an error (RFC 1122, 3.2.2)
            if not self._pass_on(packet):
                self._write(icmp_error(whole, self._why_not(packet)))
        except PacketError:
            # Multicast and neighbour discovery of the kernel's own too, which have no place here.
            dropped(_WHERE, "not_carried")

    def _pass_on(self, packet: Packet) -> bool:
        """Hand a datagram or ping to its port; False when it has none. Raises PacketError for other traffic."""
        if packet.protocol == PROTOCOL_UDP:
            port = self._udp.get((packet.destination, packet.destination_port))
            if port is not None:
                self._receive(port, packet.payload, (packet.source, packet.source_port))
            return port is not None
        if packet.is_echo_request:
            port = self._pings.get(packet.destination)
            if port is not None:
                data = packet.sequence.to_bytes(2, "big") + packet.payload
                self._receive(port, data, (packet.source, packet.identifier))
            return port is not None
        raise PacketError("neither UDP nor a ping")

    def _why_not(self, packet: Packet) -> Unreachable:
        if packet.destination not in self._addresses:
            return Unreachable.HOST
        return Unreachable.PORT if packet.protocol == PROTOCOL_UDP else Unreachable.PROHIBITED
