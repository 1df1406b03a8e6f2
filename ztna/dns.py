"""DNS messages as values, over dnslib, and the choice among SRV records (RFC 2782).

Hostile bytes give a value or ProtocolError, nothing else, in time linear in their length: names are read by
our own bounded reader, because dnslib's recurses once for each compression pointer. Pure; who is asked is
ztna.resolver's, and dnsd's ready-made answers are dnsd.answer's.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import msgspec
from dnslib import AAAA, NS, RD, RR, SOA, SRV, TXT, A, DNSHeader, DNSQuestion, DNSRecord
from dnslib.buffer import BufferError as DnslibBufferError
from dnslib.dns import DNSError
from dnslib.label import DNSBuffer, DNSLabel, DNSLabelError

from ztna.errors import ProtocolError

HEADER_BYTES = 12
NAME_BYTES_MAX = 255
LABEL_BYTES_MAX = 63
POINTERS_PER_NAME_MAX = 16
RECORDS_MAX = 4096
"""Records of one message; 64 KiB hold no more useful ones."""

EDE_STALE_ANSWER = 3
EDE_STALE_NXDOMAIN_ANSWER = 19
_STALE = frozenset({EDE_STALE_ANSWER, EDE_STALE_NXDOMAIN_ANSWER})
_OPTION_EDE = 15
_CLASS_IN = 1
_RESPONSE_PAYLOAD_BYTES = 1232


class Type(IntEnum):
    """The resource record types we know (RFC 1035, 2782, 3596, 6891, 8482, 9460)."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    HINFO = 13
    PTR = 12
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41
    HTTPS = 65
    IXFR = 251
    AXFR = 252
    ANY = 255


class Code(IntEnum):
    """Response codes (RFC 1035 4.1.1, RFC 6891 9, RFC 7873 8)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16
    BADCOOKIE = 23


class SrvData(msgspec.Struct, frozen=True, order=True):
    """RFC 2782. The target is lower case, without the trailing dot; empty is the root: no such service."""

    priority: int
    weight: int
    port: int
    target: str


class SoaData(msgspec.Struct, frozen=True):
    """RFC 1035 3.3.13; the times in seconds."""

    mname: str
    rname: str
    serial: int
    refresh: int
    retry: int
    expire: int
    minimum: int


class HostData(msgspec.Struct, frozen=True):
    """The name that an NS, PTR or CNAME record holds."""

    host: str


Data = IPv4Address | IPv6Address | SrvData | SoaData | HostData | tuple[bytes, ...] | bytes
"""tuple[bytes, ...] is a TXT record's strings; bytes are the data of a type we do not know."""


class Question(msgspec.Struct, frozen=True):
    """What was asked; the name is lower case, without the trailing dot."""

    name: str
    type: int
    class_: int


class Record(msgspec.Struct, frozen=True):
    """One resource record; OPT is not among them, see Edns."""

    name: str
    type: int
    class_: int
    ttl_s: int
    data: Data


class Edns(msgspec.Struct, frozen=True):
    """The OPT record (RFC 6891): what the sender can take, and its options as (code, data)."""

    udp_payload: int
    version: int
    flags: int
    options: tuple[tuple[int, bytes], ...]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One DNS message."""

    id: int
    is_response: bool
    opcode: int
    authoritative: bool
    truncated: bool
    recursion_desired: bool
    code: int
    questions: tuple[Question, ...]
    answers: tuple[Record, ...]
    authority: tuple[Record, ...]
    additional: tuple[Record, ...]
    edns: Edns | None

    @property
    def stale(self) -> bool:
        """Whether the answer is marked as older than it should be (EDE 3 or 19, RFC 8914)."""
        options = self.edns.options if self.edns else ()
        return any(
            code == _OPTION_EDE and len(data) >= 2 and int.from_bytes(data[:2]) in _STALE
            for code, data in options
        )


class _BoundedBuffer(DNSBuffer):  # type: ignore[misc]
    """dnslib's buffer with a name reader that follows few pointers, only backwards, without recursion."""

    data: bytearray
    offset: int

    def decode_name(self, last: int = -1) -> DNSLabel:
        labels: list[bytes] = []
        position: int = self.offset
        lowest, pointers, size = position, 0, 1
        resume: int | None = None
        while True:
            if position >= len(self.data):
                raise ProtocolError("DNS name runs past the end of its message")
            length = self.data[position]
            if length == 0:
                position += 1
                break
            if length >= 0xC0:
                pointers += 1
                target = int.from_bytes(self.data[position : position + 2]) & 0x3FFF
                # RFC 1035 4.1.4: a pointer names a prior occurrence. Each must go below all before it.
                if position + 2 > len(self.data) or target >= lowest or pointers > POINTERS_PER_NAME_MAX:
                    raise ProtocolError("DNS name with a compression pointer that leads nowhere")
                resume = position + 2 if resume is None else resume
                position = lowest = target
                continue
            label = bytes(self.data[position + 1 : position + 1 + length])
            size += length + 1
            if length > LABEL_BYTES_MAX or len(label) < length or size > NAME_BYTES_MAX:
                raise ProtocolError("DNS name with an overlong or cut label")
            labels.append(label)
            position += 1 + length
        self.offset = position if resume is None else resume
        return DNSLabel(labels)


_DATA_TYPES: dict[int, type[RD]] = {
    Type.A: A,
    Type.NS: NS,
    Type.CNAME: NS,
    Type.PTR: NS,
    Type.SOA: SOA,
    Type.TXT: TXT,
    Type.AAAA: AAAA,
    Type.SRV: SRV,
}
"""CNAME and PTR have the layout of NS."""


def decode(data: bytes) -> Message:
    """Read one message.

    Raises ProtocolError for anything that is not a whole DNS message of at most RECORDS_MAX records; bytes
    after the last record are refused too.
    """
    buffer = _BoundedBuffer(data)
    try:
        return _decode(buffer)
    except (DNSError, DnslibBufferError, DNSLabelError, struct.error, ValueError) as error:
        raise ProtocolError(f"not a DNS message: {error}") from None


def _decode(buffer: _BoundedBuffer) -> Message:
    header = DNSHeader.parse(buffer)
    if header.q + header.a + header.auth + header.ar > RECORDS_MAX:
        raise ProtocolError(f"DNS message with more than {RECORDS_MAX} records")
    questions = tuple(_question(buffer) for _ in range(header.q))
    answers, edns_misplaced = _section(buffer, header.a)
    authority, edns_misplaced_too = _section(buffer, header.auth)
    additional, edns = _section(buffer, header.ar)
    if edns_misplaced or edns_misplaced_too or len(edns) > 1:
        raise ProtocolError("DNS message with more than one OPT record, or one out of place")
    if buffer.remaining():
        raise ProtocolError(f"{buffer.remaining()} bytes after the DNS message")
    extended = edns[0][0] << 4 if edns else 0
    return Message(
        id=header.id,
        is_response=bool(header.qr),
        opcode=header.opcode,
        authoritative=bool(header.aa),
        truncated=bool(header.tc),
        recursion_desired=bool(header.rd),
        code=header.rcode | extended,
        questions=questions,
        answers=answers,
        authority=authority,
        additional=additional,
        edns=edns[0][1] if edns else None,
    )


def _question(buffer: _BoundedBuffer) -> Question:
    question = DNSQuestion.parse(buffer)
    return Question(_text(question.qname), question.qtype, question.qclass)


def _section(buffer: _BoundedBuffer, count: int) -> tuple[tuple[Record, ...], list[tuple[int, Edns]]]:
    """Read a section's records, and apart from them its OPT records as (extended rcode, Edns)."""
    records: list[Record] = []
    edns: list[tuple[int, Edns]] = []
    for _ in range(count):
        name = _text(buffer.decode_name())
        kind, class_, ttl, length = buffer.unpack("!HHIH")
        if kind == Type.OPT:
            if name:
                raise ProtocolError("OPT record with a name")
            options = _options(buffer.get(length))
            edns.append((ttl >> 24, Edns(class_, (ttl >> 16) & 0xFF, ttl & 0xFFFF, options)))
            continue
        end = buffer.offset + length
        if end > len(buffer.data):
            raise ProtocolError("DNS record runs past the end of its message")
        # A record of another class, or an empty one (RFC 2136), has not the layout its type says.
        layout = _DATA_TYPES.get(kind, RD) if class_ == _CLASS_IN and length else RD
        data = _value(layout.parse(buffer, length))
        if buffer.offset != end:
            raise ProtocolError(f"DNS record of type {kind} whose length disagrees with its data")
        records.append(Record(name, kind, class_, ttl, data))
    return tuple(records), edns


def _options(data: bytes) -> tuple[tuple[int, bytes], ...]:
    options: list[tuple[int, bytes]] = []
    position = 0
    while position < len(data):
        if position + 4 > len(data):
            raise ProtocolError("EDNS option cut short")
        code, length = struct.unpack_from("!HH", data, position)
        position += 4 + length
        if position > len(data):
            raise ProtocolError("EDNS option runs past the OPT record")
        options.append((code, data[position - length : position]))
    return tuple(options)


def _value(data: Any) -> Data:
    match data:
        case A():
            return IPv4Address(bytes(data.data))
        case AAAA():
            return IPv6Address(bytes(data.data))
        case SRV():
            return SrvData(data.priority, data.weight, data.port, _text(data.target))
        case SOA():
            return SoaData(_text(data.mname), _text(data.rname), *data.times)
        case NS():
            return HostData(_text(data.label))
        case TXT():
            return tuple(data.data)
    return bytes(data.data)


def _text(name: DNSLabel) -> str:
    """Return a name as lower-case text without the trailing dot.

    What is not plain in a label is escaped as `\\ddd` (RFC 1035 5.1), a dot too, which dnslib leaves as it
    is: a label `a.b` must never read like the two labels `a` and `b`.
    """
    return ".".join("".join(map(_PLAIN.__getitem__, label)) for label in name.label)


def _label(name: str) -> DNSLabel:
    """Return the very name that `_text` read: dnslib would take it for one to be encoded by IDNA. Raises ValueError."""
    plain = name.rstrip(".")
    labels = [
        _ESCAPED.sub(lambda escaped: bytes((int(escaped[1]),)), each.encode())
        for each in (plain.split(".") if plain else ())
    ]
    if not all(labels):
        raise ValueError("an empty label")
    return DNSLabel(labels)


_ESCAPED = re.compile(rb"\\([01]\d\d|2[0-4]\d|25[0-5])")
_PLAIN = tuple(
    chr(byte).lower() if chr(byte).isascii() and (chr(byte).isalnum() or byte in b"-_*") else f"\\{byte:03d}"
    for byte in range(256)
)


def is_reverse(name: str) -> bool:
    """Say whether a name, as decoded, is one of those that addresses have (RFC 1035 3.5, RFC 3596 2.5)."""
    return name.endswith((".in-addr.arpa", ".ip6.arpa")) or name in ("in-addr.arpa", "ip6.arpa")


def encode_query(message_id: int, name: str, kind: Type, udp_payload: int) -> bytes:
    """Return a query of class IN with an OPT record that offers `udp_payload` bytes (RFC 6891 6.2.3).

    Recursion is desired, as the resolver asked may stand between us and dnsd.
    Raises ProtocolError when `name` cannot stand in a message.
    """
    header = DNSHeader(id=message_id, bitmap=0, rd=1)
    try:
        packed = bytes(DNSRecord(header, q=DNSQuestion(_label(name), int(kind))).pack())
    except (DNSError, DNSLabelError, ValueError) as error:
        raise ProtocolError(f"no DNS name: {name!r}: {error}") from None
    opt = struct.pack("!BHHIH", 0, Type.OPT, udp_payload, 0, 0)
    return packed[:10] + b"\x00\x01" + packed[12:] + opt


def encode_response(
    query: Message,
    code: int,
    answers: Sequence[Record] = (),
    authority: Sequence[Record] = (),
    *,
    stale: bool = False,
) -> bytes:
    """Return the response to a query of one question, with its id and, if it had one, an OPT record.

    Records of types that we do not know are left out. Raises ProtocolError for what cannot stand in a message, which
    is nothing that `decode` read.
    """
    try:
        return _encode_response(query, code, answers, authority, stale)
    except (DNSError, DNSLabelError, struct.error, ValueError) as error:
        raise ProtocolError(f"no DNS message: {error}") from None


def _encode_response(
    query: Message, code: int, answers: Sequence[Record], authority: Sequence[Record], stale: bool
) -> bytes:
    (question,) = query.questions
    header = DNSHeader(id=query.id, bitmap=0, qr=1, rd=int(query.recursion_desired), ra=1, rcode=code & 0xF)
    record = DNSRecord(header, q=DNSQuestion(_label(question.name), question.type, question.class_))
    for each in answers:
        for packed in _packed(each):
            record.add_answer(packed)
    for each in authority:
        for packed in _packed(each):
            record.add_auth(packed)
    data = bytes(record.pack())
    if query.edns is None:
        return data
    option = struct.pack("!HHH", _OPTION_EDE, 2, EDE_STALE_ANSWER) if stale else b""
    opt = struct.pack("!BHHIH", 0, Type.OPT, _RESPONSE_PAYLOAD_BYTES, code >> 4 << 24, len(option)) + option
    return data[:10] + b"\x00\x01" + data[12:] + opt


def _packed(record: Record) -> list[RR]:
    """Return the record for dnslib, in a list that is empty for what is left out."""
    data = _rdata(record.data)
    if data is None:
        return []
    return [RR(_label(record.name), record.type, record.class_, ttl=record.ttl_s, rdata=data)]


def _rdata(data: Data) -> RD | None:
    match data:
        case IPv4Address():
            return A(str(data))
        case IPv6Address():
            return AAAA(str(data))
        case SrvData():
            return SRV(data.priority, data.weight, data.port, _label(data.target))
        case SoaData():
            times = (data.serial, data.refresh, data.retry, data.expire, data.minimum)
            return SOA(_label(data.mname), _label(data.rname), times)
        case HostData():
            return NS(_label(data.host))
        case tuple():
            return TXT(list(data))
    return None


class Weighted(Protocol):
    """What the choice looks at: an SrvData, or a resolver's SrvRecord."""

    @property
    def priority(self) -> int: ...

    @property
    def weight(self) -> int: ...


W = TypeVar("W", bound=Weighted)


def order(records: Iterable[W], draw: Callable[[int], int]) -> Sequence[W]:
    """Put SRV records into the order in which to try them (RFC 2782, "Usage rules").

    Lowest priority first; within one, each next record is drawn with a chance in proportion to its weight,
    those of weight 0 with a very small one. `draw(n)` returns an integer 0 <= x < n, evenly.
    """
    remaining = sorted(records, key=lambda record: (record.priority, record.weight != 0))
    ordered: list[W] = []
    while remaining:
        group = [record for record in remaining if record.priority == remaining[0].priority]
        running_sums = list(accumulate(record.weight for record in group))
        chosen = group[bisect_left(running_sums, draw(running_sums[-1] + 1))]
        ordered.append(chosen)
        remaining.remove(chosen)
    return ordered
