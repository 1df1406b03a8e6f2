"""The QUIC DATAGRAMs of relay legs and of the packet carrier: one byte of type, then what it selects.

    01 QAD               01 | IPv4(4) or IPv6(16) | port(2)
    10 register agent    10 | n | service(n)          trailing bytes are ignored
    11 register connector 11 | n | service(n)         trailing bytes are ignored
    12 ACK               12 | 00 | n | service(n)
    13 NACK              13 | status | n | service(n)
    2F service packet    2F | n | service(n) | IP packet
    2E session packet    2E | session(8) | IP packet
    45..4F, 60..6F       a raw IP packet              source: protocol.md, Datagrams

A service here is bytes, compared byte for byte: v1 peers may send what is no ServiceName, and the relay
answers that with a NACK. Does not look into the IP packets; ztna.packet does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from ztna.errors import ProtocolError
from ztna.names import SESSION_ID_BYTES, SessionId

QAD = 0x01
REGISTER_AGENT = 0x10
REGISTER_CONNECTOR = 0x11
ACK = 0x12
NACK = 0x13
SESSION_PACKET = 0x2E
SERVICE_PACKET = 0x2F

SERVICE_BYTES_MAX = 255

_PORT = struct.Struct(">H")


class NackStatus(IntEnum):
    """Why a registration or packet was refused (protocol.md, Datagrams)."""

    NOT_UTF8 = 1
    NOT_AUTHORISED = 2
    NEEDS_V2 = 3
    NO_SUCH_SERVICE = 4
    LIMIT_REACHED = 5


class Qad(msgspec.Struct, frozen=True):
    """QUIC address discovery: the address the relay sees, as canonical text and port."""

    ip: str
    port: int


class RegisterAgent(msgspec.Struct, frozen=True):
    """A v1 agent registers for a service; the bytes are whatever it sent, also none."""

    service: bytes


class RegisterConnector(msgspec.Struct, frozen=True):
    """A v1 connector registers a service; the bytes are whatever it sent, also none."""

    service: bytes


class Ack(msgspec.Struct, frozen=True):
    """The registration stands."""

    service: bytes


class Nack(msgspec.Struct, frozen=True):
    """Refused; the service is empty when it was not UTF-8."""

    status: NackStatus
    service: bytes


class ServicePacket(msgspec.Struct, frozen=True):
    """An IP packet for a service."""

    service: bytes
    packet: bytes


class SessionPacket(msgspec.Struct, frozen=True):
    """An IP packet of exactly one v1 session."""

    session: SessionId
    packet: bytes


class RawPacket(msgspec.Struct, frozen=True):
    """An IP packet with no header of ours."""

    packet: bytes


Datagram = Qad | RegisterAgent | RegisterConnector | Ack | Nack | ServicePacket | SessionPacket | RawPacket


def service_packet(service: bytes, packet: bytes) -> bytes:
    """Return the 2F datagram (hot path). Raises ProtocolError unless the service is 1 to 255 bytes."""
    length = len(service)
    if not 0 < length <= SERVICE_BYTES_MAX:
        raise ProtocolError(f"service of {length} bytes: 1 to {SERVICE_BYTES_MAX}")
    return b"/%c%b%b" % (length, service, packet)


def split_service_packet(data: bytes) -> tuple[bytes, bytes]:
    """Return service and packet of a 2F datagram (hot path). Raises ProtocolError when one is missing."""
    if len(data) < 4 or data[0] != SERVICE_PACKET:
        raise ProtocolError("no service packet")
    end = 2 + data[1]
    if end == 2 or end >= len(data):
        raise ProtocolError("service packet without its service or its packet")
    return data[2:end], data[end:]


def encode(datagram: Datagram) -> bytes:
    """Return the datagram's bytes. Raises ProtocolError for a service or packet that cannot be sent."""
    match datagram:
        case ServicePacket(service, packet):
            return service_packet(service, packet)
        case SessionPacket(session, packet):
            return bytes((SESSION_PACKET,)) + session.to_bytes() + packet
        case RawPacket(packet):
            if not packet or not _is_raw(packet[0]):
                raise ProtocolError("raw packet: neither IPv4 nor IPv6")
            return packet
        case Qad(ip, port):
            return bytes((QAD,)) + ip_address(ip).packed + _PORT.pack(port)
        case RegisterAgent(service):
            return bytes((REGISTER_AGENT,)) + _counted(service)
        case RegisterConnector(service):
            return bytes((REGISTER_CONNECTOR,)) + _counted(service)
        case Ack(service):
            return bytes((ACK, 0)) + _counted(service)
        case _:
            return bytes((NACK, datagram.status)) + _counted(datagram.service)


def decode(data: bytes) -> Datagram:
    """Read one datagram. Raises ProtocolError for anything that is none, and nothing else."""
    if not data:
        raise ProtocolError("empty datagram")
    kind = data[0]
    if kind == SERVICE_PACKET:
        return ServicePacket(*split_service_packet(data))
    if _is_raw(kind):
        return RawPacket(data)
    reader = _READERS.get(kind)
    if reader is None:
        raise ProtocolError(f"datagram of unknown type 0x{kind:02x}")
    return reader(data)


def _is_raw(kind: int) -> bool:
    return 0x45 <= kind <= 0x4F or 0x60 <= kind <= 0x6F


def _counted(service: bytes) -> bytes:
    if len(service) > SERVICE_BYTES_MAX:
        raise ProtocolError(f"service of {len(service)} bytes: at most {SERVICE_BYTES_MAX}")
    return bytes((len(service),)) + service


def _read_service(data: bytes, at: int) -> tuple[bytes, int]:
    """Return the counted service at the offset, and the offset after it."""
    if len(data) <= at:
        raise ProtocolError("truncated datagram: no service length")
    end = at + 1 + data[at]
    if end > len(data):
        raise ProtocolError("truncated datagram: service shorter than its length")
    return data[at + 1 : end], end


def _read_qad(data: bytes) -> Qad:
    if len(data) == 7:
        return Qad(str(IPv4Address(data[1:5])), _PORT.unpack_from(data, 5)[0])
    if len(data) == 19:
        return Qad(str(IPv6Address(data[1:17])), _PORT.unpack_from(data, 17)[0])
    raise ProtocolError(f"QAD of {len(data)} bytes: 7 or 19")


def _read_ack(data: bytes) -> Ack:
    if len(data) < 2 or data[1] != 0:
        raise ProtocolError("ACK without its status 00")
    service, end = _read_service(data, 2)
    _expect_end(data, end)
    return Ack(service)


def _read_nack(data: bytes) -> Nack:
    if len(data) < 2 or data[1] not in _NACK_STATUSES:
        raise ProtocolError("NACK without a status we know")
    service, end = _read_service(data, 2)
    _expect_end(data, end)
    return Nack(NackStatus(data[1]), service)


def _read_session_packet(data: bytes) -> SessionPacket:
    end = 1 + SESSION_ID_BYTES
    if len(data) <= end:
        raise ProtocolError("session packet without its session or its packet")
    return SessionPacket(SessionId.from_bytes(data[1:end]), data[end:])


def _expect_end(data: bytes, end: int) -> None:
    if end != len(data):
        raise ProtocolError(f"{len(data) - end} bytes too many")


_NACK_STATUSES = frozenset(NackStatus)
_READERS: dict[int, Callable[[bytes], Datagram]] = {
    QAD: _read_qad,
    REGISTER_AGENT: lambda data: RegisterAgent(_read_service(data, 1)[0]),
    REGISTER_CONNECTOR: lambda data: RegisterConnector(_read_service(data, 1)[0]),
    ACK: _read_ack,
    NACK: _read_nack,
    SESSION_PACKET: _read_session_packet,
}
