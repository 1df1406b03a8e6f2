"""Inner IP packets: IPv4 and IPv6 with UDP, ICMP echo and ICMP errors (protocol.md, Inner packets).

Lengths and the IPv4 header checksum must agree and fragments are refused. Checksums of UDP are not
verified on the way in, on purpose: agents with checksum offload hand over packets without one (v1), and
the link has authenticated the bytes. IPv6 extension headers are not carried. Routes nothing.
"""

from __future__ import annotations

import struct
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from ztna.errors import PacketError

PROTOCOL_ICMP = 1
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17
PROTOCOL_ICMPV6 = 58

PACKET_BYTES_MAX = 65_535
TTL = 64
ICMP_ERROR_BYTES_MAX = 576  # RFC 1812 4.3.2.3
ICMPV6_ERROR_BYTES_MAX = 1_280  # RFC 4443 2.4 (c)
ADDRESSES_REMEMBERED = 8_192

ICMP_ECHO_REPLY = 0
ICMP_UNREACHABLE = 3
ICMP_ECHO_REQUEST = 8
ICMPV6_UNREACHABLE = 1
ICMPV6_TOO_BIG = 2
ICMPV6_ECHO_REQUEST = 128
ICMPV6_ECHO_REPLY = 129
# RFC 1122 3.2.2: these tell of an error (4 source quench, 5 redirect, 11 time exceeded, 12 parameter problem)
ICMP_ERRORS = frozenset({3, 4, 5, 11, 12})
ICMPV6_ERROR_MAX = 127  # RFC 4443 2.1

_IPV4_BYTES = 20
_IPV6_BYTES = 40
_UDP_BYTES = 8
_ICMP_BYTES = 8
_DONT_FRAGMENT = 0x4000
_FRAGMENT_BITS = 0xBFFF  # all but DF: reserved bit, more-fragments, offset
_ECHO_REQUESTS = ((4, PROTOCOL_ICMP, ICMP_ECHO_REQUEST), (6, PROTOCOL_ICMPV6, ICMPV6_ECHO_REQUEST))
_ECHO_REPLIES = ((4, PROTOCOL_ICMP, ICMP_ECHO_REPLY), (6, PROTOCOL_ICMPV6, ICMPV6_ECHO_REPLY))

_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_IPV4_UDP = struct.Struct(">BBHHHBBH4s4sHHHH")
_PORTS_LENGTH = struct.Struct(">HHH")
_UDP = struct.Struct(">HHHH")
_ICMP = struct.Struct(">BBHHH")


class Unreachable(Enum):
    """What an ICMP error tells: type and code of IPv4 (RFC 792, 1191, 1812) and of IPv6 (RFC 4443)."""

    NET = ((ICMP_UNREACHABLE, 0), (ICMPV6_UNREACHABLE, 0))
    HOST = ((ICMP_UNREACHABLE, 1), (ICMPV6_UNREACHABLE, 3))
    PORT = ((ICMP_UNREACHABLE, 3), (ICMPV6_UNREACHABLE, 4))
    PROHIBITED = ((ICMP_UNREACHABLE, 13), (ICMPV6_UNREACHABLE, 1))
    TOO_BIG = ((ICMP_UNREACHABLE, 4), (ICMPV6_TOO_BIG, 0))


class Packet(msgspec.Struct, frozen=True, gc=False):
    """A whole packet, taken apart.

    UDP has ports and `payload` is its data. ICMP has no ports but type, code and the two halves of its
    second word (for an echo: identifier and sequence), and `payload` is what follows them. Of any other
    protocol `payload` is all after the IP header.
    """

    version: int
    source: str
    destination: str
    protocol: int
    source_port: int
    destination_port: int
    payload: bytes
    icmp_type: int = 0
    icmp_code: int = 0
    identifier: int = 0
    sequence: int = 0

    @property
    def is_echo_request(self) -> bool:
        """Whether it is an ICMP echo request of its IP version."""
        return (self.version, self.protocol, self.icmp_type) in _ECHO_REQUESTS

    @property
    def is_echo_reply(self) -> bool:
        """Whether it is an ICMP echo reply of its IP version."""
        return (self.version, self.protocol, self.icmp_type) in _ECHO_REPLIES


def parse(data: bytes) -> Packet:
    """Take one packet apart. Raises PacketError for what is no whole, unfragmented packet, nothing else."""
    version = data[0] >> 4 if data else 0
    if version == 4:
        return _parse_ipv4(data)
    if version == 6:
        return _parse_ipv6(data)
    raise PacketError("neither IPv4 nor IPv6")


def build_udp(
    source: str, source_port: int, destination: str, destination_port: int, payload: bytes
) -> bytes:
    """Return a UDP packet with its checksums; both addresses are of one version.

    Raises PacketError when the packet would not fit the length field or an address is none.
    """
    source_bytes, source_sum = _packed(source)
    destination_bytes, destination_sum = _packed(destination)
    length = _UDP_BYTES + len(payload)
    total = _IPV4_BYTES + length
    if total > PACKET_BYTES_MAX:
        raise PacketError(f"UDP payload of {len(payload)} bytes does not fit a packet")
    _check_versions(source_bytes, destination_bytes)
    addresses_sum = source_sum + destination_sum
    # One's complement sum is the value modulo 0xFFFF (RFC 1071 2 (B)), which big integers do in C.
    folded = (
        addresses_sum + PROTOCOL_UDP + 2 * length + source_port + destination_port + _sum(payload)
    ) % 0xFFFF
    # RFC 768: a checksum of zero is sent as 0xFFFF, and 0xFFFF - folded is never zero here.
    checksum = 0xFFFF - folded
    if len(source_bytes) == 16:
        header = _ipv6_header(source_bytes, destination_bytes, PROTOCOL_UDP, length)
        return b"%b%b%b" % (header, _UDP.pack(source_port, destination_port, length, checksum), payload)
    # RFC 1624 3: the checksum of a header is never 0xFFFF.
    ip_checksum = -(_IPV4_UDP_SUM + total + addresses_sum) % 0xFFFF
    return (
        _IPV4_UDP.pack(
            0x45, 0, total, 0, _DONT_FRAGMENT, TTL, PROTOCOL_UDP, ip_checksum,
            source_bytes, destination_bytes, source_port, destination_port, length, checksum,
        )
        + payload
    )  # fmt: skip


def build_echo_request(
    source: str, destination: str, identifier: int, sequence: int, payload: bytes
) -> bytes:
    """Return an ICMP echo request. Raises PacketError as build_udp."""
    return _build_icmp(
        source, destination, (ICMP_ECHO_REQUEST, ICMPV6_ECHO_REQUEST), identifier, sequence, payload
    )


def build_echo_reply(source: str, destination: str, identifier: int, sequence: int, payload: bytes) -> bytes:
    """Return an ICMP echo reply. Raises PacketError as build_udp."""
    return _build_icmp(
        source, destination, (ICMP_ECHO_REPLY, ICMPV6_ECHO_REPLY), identifier, sequence, payload
    )


def echo_reply(request: Packet) -> bytes:
    """Return the answer to an echo request, from the address that was asked."""
    if not request.is_echo_request:
        raise PacketError("not an echo request")
    return build_echo_reply(
        request.destination, request.source, request.identifier, request.sequence, request.payload
    )


def icmp_error(original: bytes, kind: Unreachable, mtu: int = 0) -> bytes:
    """Return the ICMP error that tells the sender of `original`, quoting it, from the address it asked.

    `mtu` in bytes goes with TOO_BIG. Raises PacketError when `original` is no packet or itself an ICMP
    error (RFC 1122 3.2.2, RFC 4443 2.4 (e)).
    """
    packet = parse(original)
    if _is_icmp_error(packet):
        raise PacketError("no ICMP error about an ICMP error")
    if packet.version == 4:
        type_, code = kind.value[0]
        quoted = original[: ICMP_ERROR_BYTES_MAX - _IPV4_BYTES - _ICMP_BYTES]
        word = mtu & 0xFFFF  # RFC 1191 4: the lower half of the second word
    else:
        type_, code = kind.value[1]
        quoted = original[: ICMPV6_ERROR_BYTES_MAX - _IPV6_BYTES - _ICMP_BYTES]
        word = mtu & 0xFFFFFFFF
    return _icmp_packet(packet.destination, packet.source, (type_, code, word >> 16, word & 0xFFFF), quoted)


def _parse_ipv4(data: bytes) -> Packet:
    end = len(data)
    if end < _IPV4_BYTES:
        raise PacketError("truncated IPv4 header")
    first, _, total, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(data)
    start = (first & 0x0F) * 4
    if start < _IPV4_BYTES or start > end:
        raise PacketError("IPv4 header length disagrees")
    if total != end:
        raise PacketError(f"IPv4 total length {total} of {end} bytes")
    if fragment & _FRAGMENT_BITS:
        raise PacketError("IPv4 fragment")
    # The header is not all zero, so a correct one's sum is 0xFFFF, which is 0 modulo 0xFFFF.
    if int.from_bytes(data[:start], "big") % 0xFFFF:
        raise PacketError("IPv4 header checksum is wrong")
    return _parse_transport(4, _text(source), _text(destination), protocol, data, start)


def _parse_ipv6(data: bytes) -> Packet:
    end = len(data)
    if end < _IPV6_BYTES:
        raise PacketError("truncated IPv6 header")
    _, length, protocol, _, source, destination = _IPV6.unpack_from(data)
    if length != end - _IPV6_BYTES:
        raise PacketError(f"IPv6 payload length {length} of {end - _IPV6_BYTES} bytes")
    if protocol in _IPV6_EXTENSIONS:
        raise PacketError("IPv6 fragment" if protocol == 44 else f"IPv6 extension header {protocol}")
    if (
        protocol == PROTOCOL_ICMPV6
        and (int.from_bytes(source + destination, "big") + length + protocol + _sum(data[_IPV6_BYTES:]))
        % 0xFFFF
    ):
        raise PacketError("ICMPv6 checksum is wrong")
    return _parse_transport(6, _text(source), _text(destination), protocol, data, _IPV6_BYTES)


def _parse_transport(
    version: int, source: str, destination: str, protocol: int, data: bytes, start: int
) -> Packet:
    end = len(data)
    if protocol == PROTOCOL_UDP:
        if end - start < _UDP_BYTES:
            raise PacketError("truncated UDP header")
        source_port, destination_port, length = _PORTS_LENGTH.unpack_from(data, start)
        if length != end - start:
            raise PacketError(f"UDP length {length} of {end - start} bytes")
        return Packet(
            version, source, destination, protocol, source_port, destination_port, data[start + 8 :]
        )
    if protocol == (PROTOCOL_ICMP if version == 4 else PROTOCOL_ICMPV6):
        if end - start < _ICMP_BYTES:
            raise PacketError("truncated ICMP header")
        if version == 4 and _sum(data[start:]):
            raise PacketError("ICMP checksum is wrong")
        type_, code, _, identifier, sequence = _ICMP.unpack_from(data, start)
        payload = data[start + _ICMP_BYTES :]
        return Packet(
            version, source, destination, protocol, 0, 0, payload, type_, code, identifier, sequence
        )
    return Packet(version, source, destination, protocol, 0, 0, data[start:])


def _is_icmp_error(packet: Packet) -> bool:
    if packet.version == 4:
        return packet.protocol == PROTOCOL_ICMP and packet.icmp_type in ICMP_ERRORS
    return packet.protocol == PROTOCOL_ICMPV6 and packet.icmp_type <= ICMPV6_ERROR_MAX


def _build_icmp(
    source: str, destination: str, types: tuple[int, int], identifier: int, sequence: int, payload: bytes
) -> bytes:
    type_ = types[0] if len(_packed(source)[0]) == 4 else types[1]
    return _icmp_packet(source, destination, (type_, 0, identifier, sequence), payload)


def _icmp_packet(source: str, destination: str, head: tuple[int, int, int, int], payload: bytes) -> bytes:
    """Build around type, code and the two halves of the second word."""
    source_bytes, source_sum = _packed(source)
    destination_bytes, destination_sum = _packed(destination)
    _check_versions(source_bytes, destination_bytes)
    length = _ICMP_BYTES + len(payload)
    if _IPV4_BYTES + length > PACKET_BYTES_MAX:
        raise PacketError(f"ICMP payload of {len(payload)} bytes does not fit a packet")
    type_, code, high, low = head
    total = (type_ << 8 | code) + high + low + _sum(payload)
    if len(source_bytes) == 16:
        header = _ipv6_header(source_bytes, destination_bytes, PROTOCOL_ICMPV6, length)
        total += source_sum + destination_sum + length + PROTOCOL_ICMPV6
    else:
        header = _ipv4_header(source_bytes, destination_bytes, PROTOCOL_ICMP, length)
    return header + _ICMP.pack(type_, code, 0xFFFF - total % 0xFFFF, high, low) + payload


def _ipv4_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    fields = (0x45, 0, _IPV4_BYTES + length, 0, _DONT_FRAGMENT, TTL, protocol)
    checksum = -_sum(_IPV4.pack(*fields, 0, source, destination)) % 0xFFFF
    return _IPV4.pack(*fields, checksum, source, destination)


def _ipv6_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    return _IPV6.pack(6 << 28, length, protocol, TTL, source, destination)


def _check_versions(source: bytes, destination: bytes) -> None:
    if len(source) != len(destination):
        raise PacketError("one address is IPv4, the other IPv6")


def _sum(data: bytes) -> int:
    """Return the one's complement sum modulo 0xFFFF, the last odd byte padded with zero."""
    folded = int.from_bytes(data, "big") % 0xFFFF
    return (folded << 8) % 0xFFFF if len(data) & 1 else folded


@lru_cache(ADDRESSES_REMEMBERED)
def _packed(address: str) -> tuple[bytes, int]:
    """Return an address's bytes and their sum."""
    try:
        packed = ip_address(address).packed
    except ValueError:
        raise PacketError(f"address {address!r} is none") from None
    return packed, int.from_bytes(packed, "big") % 0xFFFF


@lru_cache(ADDRESSES_REMEMBERED)
def _text(packed: bytes) -> str:
    return str(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))


_IPV4_UDP_SUM = 0x4500 + _DONT_FRAGMENT + (TTL << 8 | PROTOCOL_UDP)
# IANA's IPv6 extension headers: hop-by-hop, routing, fragment, ESP, AH, destination options, mobility...
_IPV6_EXTENSIONS = frozenset({0, 43, 44, 50, 51, 60, 135, 139, 140, 253, 254})
