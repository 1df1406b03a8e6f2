"""UDP flows and pings of local programs: one inner flow for each local address and port at each virtual port.

Pings have an identifier where UDP has the program's port, and 0 for the virtual one.

Builds the inner packets, waits (bounded) for session and link, and lets a reply go to the asker alone. Links are
sidecar.agent.links', sessions sidecar.agent.sessions'.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, ip_address

from sidecar.agent.broker import Broker
from sidecar.agent.commands import Cause, Session
from sidecar.agent.lanes import AnyLink, Lanes
from sidecar.agent.listeners import Datagrammed, VirtualPort
from ztna.errors import PacketError
from ztna.names import ServiceName
from ztna.packet import (
    PROTOCOL_ICMP,
    PROTOCOL_UDP,
    Packet,
    Unreachable,
    build_echo_request,
    build_udp,
    icmp_error,
    parse,
)
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr

STAND_INS = 0xF0000000
"""240.0.0.0/4 (RFC 1112, 4), from which no program asks: there stands the asker of an IPv6 flow in inner packets,
which are IPv4 as leases are. One address a flow, so that no two can be taken for each other."""
STAND_INS_MASK = 0x0FFFFFFF
WAITING_PACKETS_PER_FLOW_MAX = 64
WAITING_BYTES_MAX = 16 * 1024 * 1024
SWEEP_SECONDS = 1.0
SETTLE_SECONDS = 0.5
"""How long a session that was left is kept: what is under way on its relay's forwarder arrives until then."""
MOVE_SECONDS = 5.0
"""How long a flow that lost its relay waits for its connector to turn up at another, before it takes any."""

_WHERE = "agent_udp"
_log = logger(__name__)


@dataclass(slots=True, eq=False)
class _Flow:
    number: int
    port: Datagrammed
    source: SockAddr
    inner: SockAddr
    used_at: float
    session: Session | None = None
    link: AnyLink | None = None
    is_ready: bool = False
    waiting: list[bytes] = field(default_factory=list)


class Datagrams:
    """All UDP and ping flows of an agent. How many there may be is the sessions' limit."""

    def __init__(self, broker: Broker, lanes: Lanes, *, idle_s: float) -> None:
        self._broker = broker
        self._lanes = lanes
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._flows: dict[tuple[Datagrammed, SockAddr], _Flow] = {}
        self._inner: dict[tuple[ServiceName, SockAddr, SockAddr], _Flow] = {}
        self._waiting_bytes = 0

    @property
    def flows(self) -> int:
        """How many flows there are."""
        return len(self._flows)

    def received(self, port: Datagrammed, data: bytes, source: SockAddr) -> None:
        """Carry a datagram of a local program, or keep it until its flow has a session and a link."""
        flow = self._flows.get((port, source))
        if flow is None:
            self._begin(port, source, data)
            return
        at = port.at
        packet = _inner_packet(flow.inner, at, data)
        flow.used_at = self._loop.time()
        if flow.is_ready and flow.link is not None and flow.link.is_ready:
            flow.link.send(at.service, packet)
        else:
            self._wait(flow, packet)

    def packet_received(self, link: AnyLink, service: ServiceName, data: bytes) -> None:
        """Take a packet that came on a link: a reply or an ICMP error for exactly one of its flows."""
        try:
            packet = parse(data)
            if packet.protocol == PROTOCOL_ICMP and not packet.is_echo_reply:
                self._icmp_received(link, service, packet)
                return
        except PacketError:
            dropped(_WHERE, "malformed")
            return
        asker, data = (packet.destination, packet.destination_port), packet.payload
        if packet.is_echo_reply:
            asker, data = (packet.destination, packet.identifier), _numbered(packet)
        flow = self._flow_of(link, service, (packet.source, packet.source_port), asker)
        if flow is None or packet.protocol != _PROTOCOLS[flow.port.at.protocol]:
            dropped(_WHERE, "no_such_flow")
            return
        flow.used_at = self._loop.time()
        flow.port.send(data, flow.source)

    def link_ready(self, link: AnyLink) -> None:
        """Send what waited for the link."""
        for flow in self._of(link):
            self._flush(flow, link)

    def riders(self, link: AnyLink) -> Iterator[Session]:
        """Yield the session of each flow on a link."""
        return (flow.session for flow in self._of(link) if flow.session is not None)

    def switch(self, session: Session, link: AnyLink) -> None:
        """Have the flows of a session ride another link from now on."""
        for flow in self._on(session):
            flow.link, flow.is_ready = link, False
            if link.is_ready:
                self._flush(flow, link)

    def link_failed(self, link: AnyLink) -> None:
        """The link cannot be made or has gone: its flows ask for another connector."""
        for flow in self._of(link):
            self._retry(flow)

    def session_unfit(self, session: Session) -> None:
        """The connector at the end of the link may not serve this session: its flows ask for another."""
        for flow in self._on(session):
            self._retry(flow)

    def session_ended(self, session: Session) -> None:
        """Forget the session's flows: the next datagram of each begins a new one."""
        for flow in self._on(session):
            self._end(flow)

    def leave(self, session: Session) -> None:
        """Move the session's flows to another relay; meanwhile they use what they have, if that still works."""
        for flow in self._on(session):
            self._broker.move(flow.number, session.opened.connector_id, MOVE_SECONDS)

    async def run(self) -> None:
        """Forget flows that are idle or whose port was closed, until cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self._idle_s / 2))
            self.sweep()

    def sweep(self) -> None:
        """Forget flows that are idle or whose port was closed."""
        latest = self._loop.time() - self._idle_s
        for flow in [each for each in self._flows.values() if each.used_at < latest or each.port.is_closed]:
            self._end(flow)

    # --- a flow's life

    def _begin(self, port: Datagrammed, source: SockAddr, data: bytes) -> None:
        at, number = port.at, self._broker.number()
        inner = source
        if at.family == socket.AF_INET6 or (at.service, at.leased, source) in self._inner:
            # No IPv4 address to go by, or a socket that calls the service at another of its addresses, too.
            inner = (str(IPv4Address(STAND_INS | number & STAND_INS_MASK)), source[1])
        flow = _Flow(number, port, source, inner, self._loop.time())
        self._flows[port, source] = flow
        self._inner[at.service, at.leased, inner] = flow
        self._wait(flow, _inner_packet(inner, at, data))
        self._broker.want(flow.number, at.service, partial(self._ready, flow), partial(self._failed, flow))

    def _ready(self, flow: _Flow, session: Session) -> None:
        if self._flows.get((flow.port, flow.source)) is not flow:
            return  # it ended in the same turn
        link = self._lanes.of(session, flow.session if flow.session is not session else None, flow.link)
        if link is None:
            self._retry(flow)
            return
        flow.session, flow.link, flow.is_ready = session, link, False
        if link.is_ready:
            self._flush(flow, link)

    def _flush(self, flow: _Flow, link: AnyLink) -> None:
        flow.is_ready = True
        if flow.session is not None and link.carries(flow.session):
            self._loop.call_later(SETTLE_SECONDS, self._settle, flow, flow.session)
        for packet in self._take_waiting(flow):
            link.send(flow.port.at.service, packet)

    def _settle(self, flow: _Flow, session: Session) -> None:
        """Give back what a flow moved away from, unless it has moved on meanwhile."""
        if flow.session is session:
            self._broker.settle(flow.number)

    def _retry(self, flow: _Flow) -> None:
        flow.session, flow.link, flow.is_ready = None, None, False
        self._broker.retry(flow.number, Cause.FAILED)

    def _failed(self, flow: _Flow, reason: Reason) -> None:
        waiting = self._take_waiting(flow)
        _log.debug("flow_refused", service=flow.port.at.service, source=flow.source, reason=reason)
        dropped(_WHERE, "no_session", len(waiting))
        self._end(flow)
        if waiting:
            _tell(flow, Unreachable.PORT if flow.port.at.protocol == "udp" else Unreachable.HOST)

    def _end(self, flow: _Flow) -> None:
        self._flows.pop((flow.port, flow.source), None)
        at = flow.port.at
        key = (at.service, at.leased, flow.inner)
        if self._inner.get(key) is flow:
            del self._inner[key]
        self._take_waiting(flow)
        self._broker.release(flow.number)

    def _wait(self, flow: _Flow, packet: bytes) -> None:
        full = self._waiting_bytes + len(packet) > WAITING_BYTES_MAX
        if full or len(flow.waiting) >= WAITING_PACKETS_PER_FLOW_MAX:
            dropped(_WHERE, "waiting_full")
            return
        flow.waiting.append(packet)
        self._waiting_bytes += len(packet)

    def _take_waiting(self, flow: _Flow) -> list[bytes]:
        waiting, flow.waiting = flow.waiting, []
        self._waiting_bytes -= sum(map(len, waiting))
        return waiting

    # --- finding flows

    def _on(self, session: Session) -> list[_Flow]:
        return [flow for flow in self._flows.values() if flow.session is session]

    def _of(self, link: AnyLink) -> list[_Flow]:
        return [flow for flow in self._flows.values() if flow.link is link]

    def _flow_of(self, link: AnyLink, service: ServiceName, at: SockAddr, asker: SockAddr) -> _Flow | None:
        """Return the flow between a virtual port and a local program, if it or its session is on this very link."""
        flow = self._inner.get((service, at, asker))
        if flow is None or flow.link is link:
            return flow
        # It rides another link by now: this is what was under way.
        return flow if flow.session is not None and flow.session.key in link.sessions else None

    def _icmp_received(self, link: AnyLink, service: ServiceName, packet: Packet) -> None:
        """Pass an ICMP error on to the program whose packet it quotes. Raises PacketError."""
        quoted = packet.payload
        # The quotation may be cut short, so its lengths need not agree: only addresses and ports are read.
        header = (quoted[0] & 0x0F) * 4 if quoted else 0
        if not 20 <= header <= len(quoted) - 8 or quoted[0] >> 4 != 4 or quoted[9] not in _QUOTED_AT:
            raise PacketError("an ICMP packet that quotes neither a UDP packet nor a ping")
        kind = _KINDS.get((packet.icmp_type, packet.icmp_code))
        if kind is None:
            raise PacketError(f"an ICMP packet of type {packet.icmp_type} and code {packet.icmp_code}")
        asked_by, asked = (
            0 if at is None else int.from_bytes(quoted[header + at : header + at + 2], "big")
            for at in _QUOTED_AT[quoted[9]]
        )
        asker, at = (str(ip_address(quoted[12:16])), asked_by), (str(ip_address(quoted[16:20])), asked)
        flow = self._flow_of(link, service, at, asker)
        if flow is None or quoted[9] != _PROTOCOLS[flow.port.at.protocol]:
            dropped(_WHERE, "no_such_flow")
            return
        _tell(flow, kind, packet.sequence)


_PROTOCOLS = {"udp": PROTOCOL_UDP, "icmp": PROTOCOL_ICMP}
_QUOTED_AT: dict[int, tuple[int, int | None]] = {PROTOCOL_UDP: (0, 2), PROTOCOL_ICMP: (4, None)}
"""Where a quoted packet has the asker's port and the virtual one after its IP header; a ping has its identifier."""
_KINDS = {kind.value[0]: kind for kind in Unreachable}


def _inner_packet(inner: SockAddr, at: VirtualPort, data: bytes) -> bytes:
    """Return what goes to the connector for a datagram, or for a ping's sequence number and data."""
    if at.protocol == "udp":
        return build_udp(*inner, *at.leased, data)
    return build_echo_request(inner[0], at.ip, inner[1], int.from_bytes(data[:2], "big"), data[2:])


def _numbered(packet: Packet) -> bytes:
    return packet.sequence.to_bytes(2, "big") + packet.payload


def _tell(flow: _Flow, kind: Unreachable, mtu: int = 0) -> None:
    """Tell a flow's program what became of its packets, where its port can; `mtu` goes with TOO_BIG."""
    at, source = flow.port.at, flow.source
    try:
        if at.protocol == "udp":
            called = build_udp(*source, *at.called, b"")
        else:
            called = build_echo_request(source[0], at.at, source[1], 0, b"")
        flow.port.tell(icmp_error(called, kind, mtu if kind is Unreachable.TOO_BIG else 0))
    except PacketError:
        dropped(_WHERE, "not_told")
