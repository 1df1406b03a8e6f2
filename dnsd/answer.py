"""Query bytes in, answer bytes out (RFC 1035, 2308, 6891, 8482, 8914), for one state of the zone.

Pure. Whole answers are kept by the bytes of their query, so that a question asked before costs one look-up;
everything else is put together here by hand, as dnslib would cost ten times as much. Sockets, and who may ask,
are dnsd.server's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address

import msgspec

from dnsd.zone import FRESH_TTL_SECONDS, Found, Labels, Outcome, ZoneData
from ztna.dns import (
    EDE_STALE_ANSWER,
    EDE_STALE_NXDOMAIN_ANSWER,
    HEADER_BYTES,
    LABEL_BYTES_MAX,
    NAME_BYTES_MAX,
    Code,
    Data,
    HostData,
    SoaData,
    SrvData,
    Type,
)

READY_ANSWERS_MAX = 131_072
"""Answers kept by their whole query; reaching it starts over."""

UDP_PAYLOAD_BYTES = 1232
"""What we send and take over UDP at most: any path carries it whole (DNS flag day 2020)."""
UDP_PAYLOAD_BYTES_MIN = 512
TCP_PAYLOAD_BYTES = 65_535
TTL_SECONDS_MAX = 0x7FFFFFFF
QUERY_RECORDS_MAX = 8

EDE_NOT_READY = 14
EDE_PROHIBITED = 18
EDE_NO_REACHABLE_AUTHORITY = 22

STALE_TTL_SECONDS = 5
"""TTL of what Consul no longer confirms, at most: nobody shall hold on to it."""

_HEADER = struct.Struct("!HHHHHH")
_QUESTION_TAIL = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_SRV = struct.Struct("!HHH")
_SOA_TIMES = struct.Struct("!IIIII")
_OPT = struct.Struct("!BHHIH")

_QR, _AA, _TC, _RD = 0x8000, 0x0400, 0x0200, 0x0100
_OPCODE = 0x7800
_DO = 0x8000
_IN = 1
_NAME_IS_THE_QUESTION = b"\xc0\x0c"
_POINTER_MAX = 0x3FFF
_OPTION_EDE = 15
_TYPE_OPT = int(Type.OPT)
_HINFO = b"\x07RFC8482\x00"
_REFUSED_TYPES = frozenset({Type.IXFR, Type.AXFR})


class _Query(msgspec.Struct):
    """A well-formed query: its flags, its one question, and what its OPT record says."""

    id: int
    flags: int
    question: bytes
    labels: Labels
    kind: int
    class_: int
    has_edns: bool = False
    udp_payload: int = UDP_PAYLOAD_BYTES_MIN
    version: int = 0
    wants_dnssec: bool = False
    has_options: bool = False


class _Malformed(Exception):
    """The query cannot be read; it is answered with this code."""

    def __init__(self, code: Code) -> None:
        self.code = code


class Answers:
    """Answers from one state of the zone; a new state or another `is_stale` takes a new object.

    `ready` maps a query without its first two bytes (the id) to its answer without them: the hot path looks
    there first. `malformed` and `refused` count queries since the start of this object.
    """

    def __init__(
        self,
        zone: ZoneData | None,
        *,
        confirmed_at: float = 0.0,
        is_stale: bool = False,
        why_not: int = EDE_NOT_READY,
    ) -> None:
        """Answer from `zone`; without one, every question is answered SERVFAIL with the EDE `why_not`."""
        self.zone = zone
        self._why_not = why_not
        self._ttl_max_s = STALE_TTL_SECONDS if is_stale else TTL_SECONDS_MAX
        self.confirmed_at = confirmed_at
        self.is_stale = is_stale
        self.ready: dict[bytes, bytes] = {}
        self.malformed = 0
        self.refused = 0

    def answer(self, data: bytes, *, over_tcp: bool = False, reserve: int = 0) -> bytes | None:
        """Return the answer to one query of any bytes; None when it deserves none.

        `reserve` bytes of what the asker can take are left for a signature; such answers are not kept.

        Nothing is said to what is too short for a header or is itself an answer: that could go on for ever.
        """
        if not over_tcp and not reserve:
            rest = self.ready.get(data[2:])
            if rest is not None:
                return data[:2] + rest
        if len(data) < HEADER_BYTES or data[2] & 0x80:
            self.malformed += 1
            return None
        try:
            query = _read(data)
        except _Malformed as error:
            self.malformed += 1
            return _without_question(data, error.code)
        limit = (TCP_PAYLOAD_BYTES if over_tcp else _udp_limit(query)) - reserve
        answer, is_lasting = self._reply(query, limit)
        if (
            is_lasting
            and not over_tcp
            and not reserve
            and not query.has_options
            and query.question[:-4].islower()
        ):
            if len(self.ready) >= READY_ANSWERS_MAX:
                self.ready.clear()
            self.ready[data[2:]] = answer[2:]
        return answer

    def _reply(self, query: _Query, limit: int) -> tuple[bytes, bool]:
        """Return the answer, and whether the same bytes answer the same query while the zone lasts."""
        if query.version > 0:
            return _finish(query, Code.BADVERS, limit=limit), False
        if self.zone is None:
            return _finish(query, Code.SERVFAIL, limit=limit, ede=self._why_not), False
        outside = query.class_ != _IN or query.kind in _REFUSED_TYPES
        found = Found(Outcome.OUTSIDE) if outside else self.zone.find(query.labels, query.kind)
        if found.outcome is Outcome.OUTSIDE:
            self.refused += 1
            return _finish(query, Code.REFUSED, limit=limit), False
        return self._answer_from(self.zone, query, found, limit)

    def _answer_from(self, zone: ZoneData, query: _Query, found: Found, limit: int) -> tuple[bytes, bool]:
        ttl_s = min(zone.settings.ttl_s, self._ttl_max_s)
        ede = EDE_STALE_ANSWER if self.is_stale else None
        if found.outcome is Outcome.NXDOMAIN:
            ede = EDE_STALE_NXDOMAIN_ANSWER if self.is_stale else None
            authority = _soa(zone, query, found.apex, self._ttl_max_s)
            return _finish(query, Code.NXDOMAIN, _AA, authority=authority, limit=limit, ede=ede), False
        if query.kind == Type.ANY:
            # RFC 8482 4.2: a synthesised HINFO instead of everything.
            answers = [pack_record(_NAME_IS_THE_QUESTION, Type.HINFO, ttl_s, _HINFO)]
            return _finish(query, Code.NOERROR, _AA, answers=answers, limit=limit, ede=ede), True
        if found.outcome is Outcome.NODATA:
            authority = _soa(zone, query, found.apex, self._ttl_max_s)
            return _finish(query, Code.NOERROR, _AA, authority=authority, limit=limit, ede=ede), True
        if found.outcome is Outcome.FRESH:
            text = str(int(self.confirmed_at)).encode()
            answers = [pack_record(_NAME_IS_THE_QUESTION, Type.TXT, FRESH_TTL_SECONDS, _strings((text,)))]
            return _finish(query, Code.NOERROR, _AA, answers=answers, limit=limit, ede=ede), False
        answers, targets = _answers(query, found.records, ttl_s)
        additional = _additional(found, targets, ttl_s)
        return (
            _finish(query, Code.NOERROR, _AA, answers=answers, additional=additional, limit=limit, ede=ede),
            True,
        )


def prohibited(data: bytes) -> bytes | None:
    """Return the REFUSED for a source that may not ask; None for what deserves no answer."""
    if len(data) < HEADER_BYTES or data[2] & 0x80:
        return None
    try:
        return _finish(_read(data), Code.REFUSED, limit=UDP_PAYLOAD_BYTES_MIN, ede=EDE_PROHIBITED)
    except _Malformed as error:
        return _without_question(data, error.code)


def _udp_limit(query: _Query) -> int:
    return min(max(query.udp_payload, UDP_PAYLOAD_BYTES_MIN), UDP_PAYLOAD_BYTES)


# Reading


def _read(data: bytes) -> _Query:
    """Read a query of at least HEADER_BYTES. Raises _Malformed."""
    message_id, flags, questions, answers, authority, additional = _HEADER.unpack_from(data)
    if flags & _OPCODE:
        raise _Malformed(Code.NOTIMP)
    if questions != 1 or answers or authority or additional > QUERY_RECORDS_MAX:
        raise _Malformed(Code.FORMERR)
    labels, position = _read_name(data, HEADER_BYTES)
    if len(data) < position + 4:
        raise _Malformed(Code.FORMERR)
    kind, class_ = _QUESTION_TAIL.unpack_from(data, position)
    position += 4
    query = _Query(message_id, flags, data[HEADER_BYTES:position], labels, kind, class_)
    for _ in range(additional):
        position = _read_additional(data, position, query)
    if position != len(data):
        raise _Malformed(Code.FORMERR)
    return query


def _read_name(data: bytes, position: int) -> tuple[Labels, int]:
    """Read the question's name: no compression there, nothing to point to. Returns the place after it."""
    start = position
    labels: list[str] = []
    while True:
        length = data[position] if position < len(data) else LABEL_BYTES_MAX + 1
        if length > LABEL_BYTES_MAX or position - start >= NAME_BYTES_MAX:
            raise _Malformed(Code.FORMERR)
        if length == 0:
            return tuple(labels), position + 1
        # A dot, or any byte beyond ASCII, makes a label that no name of ours has: it is simply not found.
        labels.append(data[position + 1 : position + 1 + length].lower().decode("latin-1"))
        position += 1 + length


def _read_additional(data: bytes, position: int, query: _Query) -> int:
    """Pass one additional record, taking in OPT (RFC 6891 6.1.1: only one, at the root)."""
    start, position = position, _pass_name(data, position)
    if len(data) < position + _RECORD.size:
        raise _Malformed(Code.FORMERR)
    kind, class_, ttl, length = _RECORD.unpack_from(data, position)
    position += _RECORD.size
    end: int = position + length
    if end > len(data):
        raise _Malformed(Code.FORMERR)
    if kind == _TYPE_OPT:
        if query.has_edns or data[start]:
            raise _Malformed(Code.FORMERR)
        _check_options(data, position, end)
        query.has_edns, query.udp_payload = True, class_
        query.version, query.wants_dnssec = (ttl >> 16) & 0xFF, bool(ttl & _DO)
        query.has_options = length > 0
    return end


def _pass_name(data: bytes, position: int) -> int:
    """Return the place after a name that nobody reads."""
    while position < len(data):
        length = data[position]
        if length == 0:
            return position + 1
        if length >= 0xC0:
            return position + 2
        position += 1 + length
    raise _Malformed(Code.FORMERR)


def _check_options(data: bytes, position: int, end: int) -> None:
    while position < end:
        if position + 4 > end:
            raise _Malformed(Code.FORMERR)
        position += 4 + int.from_bytes(data[position + 2 : position + 4])
    if position != end:
        raise _Malformed(Code.FORMERR)


# Writing


def _without_question(data: bytes, code: Code) -> bytes:
    flags = int.from_bytes(data[2:4])
    return data[:2] + struct.pack("!HHHHH", _QR | flags & (_OPCODE | _RD) | code, 0, 0, 0, 0)


def _finish(
    query: _Query,
    code: Code,
    flags: int = 0,
    *,
    answers: Sequence[bytes] = (),
    authority: Sequence[bytes] = (),
    additional: Sequence[tuple[int, bytes]] = (),
    limit: int,
    ede: int | None = None,
) -> bytes:
    """Put a message of at most `limit` bytes together.

    Additional records are left out first, without a word (RFC 2181 9); when the rest does not fit it is all
    left out and TC set.
    """
    opt = _opt(query, code, ede)
    room = limit - HEADER_BYTES - len(query.question) - len(opt)
    room -= sum(map(len, answers)) + sum(map(len, authority))
    if room < 0:
        answers, authority, additional, flags = (), (), (), flags | _TC
    fitting: list[bytes] = []
    fitting_count = 0
    for count, records in additional:
        room -= len(records)
        if room < 0:
            break
        fitting.append(records)
        fitting_count += count
    header = _HEADER.pack(
        query.id,
        _QR | flags | query.flags & _RD | code & 0xF,
        1,
        len(answers),
        len(authority),
        fitting_count + (1 if opt else 0),
    )
    return b"".join((header, query.question, *answers, *authority, *fitting, opt))


def _opt(query: _Query, code: Code, ede: int | None) -> bytes:
    if not query.has_edns:
        return b""
    option = b"" if ede is None else struct.pack("!HHH", _OPTION_EDE, 2, ede)
    ttl = (code >> 4) << 24 | (_DO if query.wants_dnssec else 0)
    return _OPT.pack(0, _TYPE_OPT, UDP_PAYLOAD_BYTES, ttl, len(option)) + option


def _soa(zone: ZoneData, query: _Query, apex: str, ttl_max_s: int) -> Sequence[bytes]:
    """Return the SOA for a negative answer, its TTL the minimum (RFC 2308 3), `ttl_max_s` at most."""
    # The apex is the end of the question's name: point into it. 5 = the name's last byte, type and class.
    offset = HEADER_BYTES + len(query.question) - 5 - (len(apex) + 1)
    soa = zone.soa(apex)
    return (pack_record(_pointer(offset), Type.SOA, min(soa.minimum, ttl_max_s), pack_data(soa)),)


def _answers(query: _Query, records: Sequence[Data], ttl_s: int) -> tuple[list[bytes], dict[str, int]]:
    """Return the records for the question's name, and the offset in the message of each SRV target."""
    answers: list[bytes] = []
    targets: dict[str, int] = {}
    offset = HEADER_BYTES + len(query.question)
    for record in records:
        if isinstance(record, SrvData):
            # After the pointer, the record's head and priority, weight and port comes the target.
            targets.setdefault(record.target, offset + 2 + _RECORD.size + _SRV.size)
        answers.append(pack_record(_NAME_IS_THE_QUESTION, query.kind, ttl_s, pack_data(record)))
        offset += len(answers[-1])
    return answers, targets


def _additional(found: Found, targets: dict[str, int], ttl_s: int) -> list[tuple[int, bytes]]:
    """Return the addresses of each target, how many and the records: they go together or not at all."""
    records = []
    for name, addresses in found.additional:
        offset = targets.get(name, _POINTER_MAX + 1)
        owner = _pointer(offset) if offset <= _POINTER_MAX else pack_name(name)
        packed = b"".join(pack_record(owner, Type.A, ttl_s, address.packed) for address in addresses)
        records.append((len(addresses), packed))
    return records


def pack_record(owner: bytes, kind: int, ttl_s: int, data: bytes) -> bytes:
    """Return one record of class IN."""
    return owner + _RECORD.pack(kind, _IN, ttl_s, len(data)) + data


def pack_data(record: Data) -> bytes:
    """Return a record's data, no name in it compressed."""
    match record:
        case IPv4Address():
            return record.packed
        case SrvData(priority, weight, port, target):
            # RFC 2782: the target is not compressed.
            return _SRV.pack(priority, weight, port) + pack_name(target)
        case HostData(host):
            return pack_name(host)
        case SoaData():
            times = (record.serial, record.refresh, record.retry, record.expire, record.minimum)
            return pack_name(record.mname) + pack_name(record.rname) + _SOA_TIMES.pack(*times)
        case tuple():
            return _strings(record)
    raise TypeError(f"no zone holds {record!r}")


def _strings(texts: Sequence[bytes]) -> bytes:
    return b"".join(bytes((len(text),)) + text for text in texts)


def pack_name(text: str) -> bytes:
    """Return a name as it stands in a message, uncompressed."""
    return b"".join(bytes((len(label),)) + label.encode() for label in text.split(".")) + b"\0"


def _pointer(offset: int) -> bytes:
    return (0xC000 | offset).to_bytes(2)
