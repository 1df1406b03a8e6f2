"""What a stub resolver has to know of DNS messages: whose a name is, how long an answer keeps, how it fits. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import msgspec

from ztna.dns import (
    Code,
    HostData,
    Message,
    Record,
    SoaData,
    SrvData,
    Type,
    decode,
    encode_response,
    is_reverse,
)
from ztna.errors import ProtocolError
from ztna.names import Zone

UDP_PAYLOAD_BYTES_MIN = 512
UDP_PAYLOAD_BYTES_MAX = 1232

IsOurs = Callable[[IPv4Address | IPv6Address], bool]
"""Says whether an address may be one of a service."""

_HEADER_BYTES = 12
_TRUNCATED = 0x02
_KEPT_CODES = frozenset({Code.NOERROR, Code.NXDOMAIN})


@dataclass(frozen=True, slots=True)
class Query:
    """A query of a program: one question. `question` are its bytes as they came, letters in whatever case."""

    data: bytes
    message: Message
    question: bytes

    @classmethod
    def of(cls, data: bytes) -> Query:
        """Read a query. Raises ProtocolError for what is none, or asks more or less than one thing."""
        message = decode(data)
        if message.is_response or message.opcode or len(message.questions) != 1:
            raise ProtocolError("not a DNS query with one question")
        end = _HEADER_BYTES
        while data[end]:
            if data[end] >= 0xC0:
                raise ProtocolError("a compressed name in a question")
            end += 1 + data[end]
        return cls(data, message, data[_HEADER_BYTES : end + 5])

    @property
    def name(self) -> str:
        """What is asked about."""
        return self.message.questions[0].name

    @property
    def key(self) -> bytes:
        """What has the same answer: the question in lower case, and whether EDNS is spoken."""
        return self.question.lower() + (b"" if self.message.edns is None else b"e")

    @property
    def udp_payload(self) -> int:
        """How many bytes a response over UDP may have (RFC 6891, 6.2.5; DNS flag day 2020)."""
        told = self.message.edns.udp_payload if self.message.edns is not None else UDP_PAYLOAD_BYTES_MIN
        return min(max(told, UDP_PAYLOAD_BYTES_MIN), UDP_PAYLOAD_BYTES_MAX)

    def is_of(self, zone: Zone) -> bool:
        """Say whether the name is of the zone, or a reverse one."""
        return _is_below(self.name, zone) or is_reverse(self.name)


def fitting(response: bytes, query: Query, zone: Zone, is_ours: IsOurs) -> bytes:
    """Return what a relay answered without what leads out of the mesh: into other zones, to addresses not `is_ours`.

    So a relay that was stolen cannot have this host's programs call hosts of its choice. Raises ProtocolError for what
    is no answer to the query.
    """
    message = decode(response)
    if not message.is_response or message.questions != query.message.questions:
        raise ProtocolError("not an answer to this question")
    answers = [each for each in message.answers if _stays(each, zone, is_ours)]
    authority = [each for each in message.authority if isinstance(each.data, SoaData)]
    return encode_response(query.message, message.code, answers, authority, stale=message.stale)


def _stays(record: Record, zone: Zone, is_ours: IsOurs) -> bool:
    match record.data:
        case IPv4Address() | IPv6Address():
            return is_ours(record.data)
        case HostData(host) | SrvData(target=host):
            return _is_below(host, zone) or record.type == Type.NS
    return True


def _is_below(name: str, zone: Zone) -> bool:
    return name == zone or name.endswith(f".{zone}")


def addresses_in(response: bytes) -> frozenset[IPv4Address]:
    """Return the IPv4 addresses that a response leads to; of an IPv6 one, the one it stands beside (32 bits)."""
    found = (each.data for each in decode(response).answers)
    return frozenset(
        IPv4Address(int(address) & 0xFFFF_FFFF)
        for address in found
        if isinstance(address, IPv4Address | IPv6Address)
    )


def refusal(query: Query, code: Code) -> bytes:
    """Return a response without records."""
    return encode_response(query.message, code)


def ttl_of(response: bytes) -> int:
    """Return for how many seconds a response may be kept (RFC 2308, 5 for what there is not); 0 is not at all."""
    try:
        message = decode(response)
    except ProtocolError:
        return 0
    if message.code not in _KEPT_CODES or message.stale:
        return 0
    if message.answers:
        return min(each.ttl_s for each in message.answers)
    return min(
        (min(each.ttl_s, each.data.minimum) for each in message.authority if isinstance(each.data, SoaData)),
        default=0,
    )


def aged(response: bytes, left_s: int) -> bytes:
    """Return a kept response whose records say that they keep for at most `left_s` seconds more."""
    message = decode(response)
    records = [msgspec.structs.replace(each, ttl_s=min(each.ttl_s, left_s)) for each in message.answers]
    return encode_response(message, message.code, records, message.authority)


def tailored(response: bytes, query: Query, room: int | None) -> bytes:
    """Return the response with the query's id and the question as it was asked, truncated to `room` bytes.

    A question has the same length in whatever case; what points into it goes on to do so.
    """
    end = _HEADER_BYTES + len(query.question)
    data = query.data[:2] + response[2:_HEADER_BYTES] + query.question + response[end:]
    if room is None or len(data) <= room:
        return data
    empty = encode_response(query.message, Code.NOERROR)
    return (
        query.data[:2]
        + bytes([empty[2] | _TRUNCATED])
        + empty[3:_HEADER_BYTES]
        + query.question
        + empty[end:]
    )
