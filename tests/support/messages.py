"""Good messages of every codec, as bytes: the corpus that mutations and properties start from."""

from __future__ import annotations

from ipaddress import IPv4Address

from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import Unreachable, build_echo_request, build_udp, icmp_error
from ztna.reasons import Reason
from ztna.wire import control, datagram, forwarder, stream
from ztna.wire.control import Address, Binary, ForwarderBind, LeaseRef, PeerIdentity, Secret

SESSION = SessionId("00010203040506ff")
WEB = ServiceName("web")
LEASE = LeaseRef(IPv4Address("10.100.0.2"), 1_700_000_000_000)
_ADDRESSES = (Address("192.0.2.7", 4435), Address("2001:db8::7", 4435))
_BIND = ForwarderBind(_ADDRESSES[0], Binary(bytes(range(16))), Secret(b"s" * 32))
_FINGERPRINT = "ab" * 32

PACKETS = (
    build_udp("10.0.0.1", 5353, "10.100.0.2", 53, b"query"),
    build_udp("fd00::1", 5353, "fd00::6464:2", 53, b"query"),
    build_echo_request("10.0.0.1", "10.100.0.2", 7, 8, b"ping"),
    build_echo_request("fd00::1", "fd00::6464:2", 7, 8, b"ping"),
    icmp_error(build_udp("10.0.0.1", 1, "10.100.0.2", 2, b"x"), Unreachable.PORT),
    icmp_error(build_udp("fd00::1", 1, "fd00::2", 2, b"x"), Unreachable.TOO_BIG, 1280),
    bytes.fromhex("46000020000000004006") + bytes(22),
)

DATAGRAMS = tuple(
    map(
        datagram.encode,
        (
            datagram.Qad("203.0.113.5", 54321),
            datagram.Qad("2001:db8::1", 54321),
            datagram.RegisterAgent(b"web"),
            datagram.RegisterConnector(b"web"),
            datagram.Ack(b"test-service"),
            datagram.Nack(datagram.NackStatus.NOT_AUTHORISED, b"web"),
            datagram.ServicePacket(b"web", PACKETS[0]),
            datagram.SessionPacket(SESSION, PACKETS[1]),
            datagram.RawPacket(PACKETS[0]),
        ),
    )
)

FORWARDER_PACKETS = tuple(
    map(
        forwarder.encode,
        (
            forwarder.Bind(bytes(range(16)), bytes(16)),
            forwarder.Challenge(b"noncenon"),
            forwarder.Bound(b"noncenon", _ADDRESSES[0]),
            forwarder.Bound(b"noncenon", _ADDRESSES[1]),
            forwarder.Probe(b"transaction!", bytes(16)),
            forwarder.ProbeAnswer(b"transaction!", bytes(16)),
        ),
    )
)

CONTROL_FRAMES = tuple(
    map(
        control.encode,
        (
            control.Hello(),
            control.Register(
                ConnectorId("rack-7"),
                (control.Offering(WEB, (Port("tcp", 80), Port("udp", 53))),),
                _ADDRESSES[0],
            ),
            control.Registered(WEB),
            control.Refused("web", Reason.NO_GRANT),
            control.Open(1, WEB, LEASE, ConnectorId("rack-7")),
            control.Offered(
                SESSION, WEB, PeerIdentity("alice", _FINGERPRINT), LEASE, _BIND, Secret(b"p" * 32)
            ),
            control.Accepted(SESSION),
            control.Opened(
                1, SESSION, WEB, ConnectorId("rack-7"), _FINGERPRINT, _ADDRESSES[1], _BIND, Secret(b"p" * 32)
            ),
            control.Denied(1, "web", Reason.NO_SUCH_SERVICE),
            control.DialToken(SESSION, Secret(b"t" * 32)),
            control.Carry(SESSION, Secret(b"t" * 32)),
            control.Closed(SESSION, Reason.PEER_GONE),
            control.CandidateOffer(SESSION, _ADDRESSES),
            control.StartPunching(SESSION, _ADDRESSES),
            control.PunchingResult(SESSION, True, _ADDRESSES[0]),
            control.Health(WEB, "passing"),
            control.Conflict(cidr="10.100.0.0/16", with_="docker0"),
            control.Drain(25.0, ("edge-2",)),
        ),
    )
)

_FLOW = "0123456789abcdef" * 2
STREAM_FRAMES = tuple(
    map(
        stream.encode,
        (
            stream.OpenFrame(SESSION, _FLOW, WEB, LEASE, _ADDRESSES[0], _ADDRESSES[0], 65536),
            stream.OpenedFrame(stream.OpenStatus.OK, 65536),
            stream.Data(b"hello"),
            stream.Fin(),
            stream.ResetFrame(1),
            stream.Ack(5),
            stream.ResumeFrame(SESSION, _FLOW, 1, 5, 65536),
            stream.ResumedFrame(5, 65536),
        ),
    )
)
