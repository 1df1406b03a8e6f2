"""Query bytes in, answer bytes out (RFC 1035, 2308, 5001, 6891, 7873, 8482, 8914), for one state of the zone.

Pure. Whole answers are kept by the bytes of their query, so that a question asked before costs one look-up;
everything else is put together here by hand, as dnslib would cost ten times as much. Sockets, and who may ask,
are dnsd.server's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

import msgspec

from dnsd.cookies import CLIENT_COOKIE_BYTES, COOKIE_BYTES, cookie, is_valid
from dnsd.query import (
    AA,
    DO,
    OPCODE,
    OPTION_COOKIE,
    OPTION_EDE,
    OPTION_KEEPALIVE,
    OPTION_NSID,
    QR,
    RA,
    RD,
    RECORD,
    TC,
    UDP_PAYLOAD_BYTES_MIN,
    Malformed,
    Query,
    read,
)
from dnsd.zone import FRESH_TTL_SECONDS, NO_SUBJECT, Found, Outcome, ZoneData
from ztna.dns import (
    EDE_STALE_ANSWER,
    EDE_STALE_NXDOMAIN_ANSWER,
    HEADER_BYTES,
    Code,
    Data,
    HostData,
    SoaData,
    SrvData,
    Type,
)

READY_ANSWERS_MAX = 262_144
"""Answers kept by their whole query; reaching it starts over."""

UDP_PAYLOAD_BYTES = 1232
"""What we send and take over UDP at most: any path carries it whole (DNS flag day 2020)."""
TCP_PAYLOAD_BYTES = 65_535
TTL_SECONDS_MAX = 0x7FFFFFFF

TCP_IDLE_SECONDS = 10.0
"""How long a connection may be idle; who asks is told (RFC 7828)."""

FORWARD = b""
"""Instead of an answer: this question is for the upstreams."""

EDE_NOT_READY = 14
EDE_PROHIBITED = 18
EDE_NO_REACHABLE_AUTHORITY = 22

STALE_TTL_SECONDS = 5
"""TTL of what Consul no longer confirms, at most: nobody shall hold on to it."""

_HEADER = struct.Struct("!HHHHHH")
_SRV = struct.Struct("!HHH")
_SOA_TIMES = struct.Struct("!IIIII")
_OPT = struct.Struct("!BHHIH")

_IN, _CH = 1, 3
_NAME_IS_THE_QUESTION = b"\xc0\x0c"
_POINTER_MAX = 0x3FFF
_TYPE_OPT = int(Type.OPT)
_HINFO = b"\x07RFC8482\x00"
_NO_OPTIONS = b"\0\0"
_OPTION_HEAD_BYTES = 4
_COOKIE_ENDS = tuple(
    (struct.pack("!HHH", _OPTION_HEAD_BYTES + size, OPTION_COOKIE, size), size)
    for size in (CLIENT_COOKIE_BYTES, COOKIE_BYTES)
)
"""Length of the OPT record's data and head of its one option, and how many bytes follow to the end."""
_COOKIE_FITS_BYTES = UDP_PAYLOAD_BYTES_MIN - 2 - _OPTION_HEAD_BYTES - COOKIE_BYTES
_OUTSIDE = Found(Outcome.OUTSIDE)
_ABOUT_VERSION = (("version", "bind"), ("version", "server"))
_ABOUT_NAME = (("hostname", "bind"), ("id", "server"))
_REFUSED_TYPES = frozenset({Type.IXFR, Type.AXFR})


class Options(msgspec.Struct, frozen=True):
    """What an operator may choose about answers.

    `version` is told to CH TXT version.bind and `nsid` to who asks for it (RFC 5001), empty: neither is.
    `secret` is that of the cookies, empty: none are given. With `forwards`, what is not ours is for upstreams;
    `bounds` is the zone, with or without names, that says what is ours while none is served.
    """

    version: bytes = b""
    nsid: bytes = b""
    secret: bytes = b""
    forwards: bool = False
    bounds: ZoneData | None = None


NO_OPTIONS = Options()


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
        options: Options = NO_OPTIONS,
        now: float = 0.0,
    ) -> None:
        """Answer from `zone`; without one, every question is answered SERVFAIL with the EDE `why_not`."""
        self.zone = zone
        self.now = now
        self._options = options
        self._reply_flags = RA if options.forwards else 0
        self._why_not = why_not
        self._ttl_max_s = STALE_TTL_SECONDS if is_stale else TTL_SECONDS_MAX
        self.confirmed_at = confirmed_at
        self.is_stale = is_stale
        self.ready: dict[bytes, bytes] = {}
        self._ready_by_subject: dict[str, list[bytes]] = {}
        self.malformed = 0
        self.refused = 0

    def answer(
        self, data: bytes, *, over_tcp: bool = False, source: bytes = b"", reserve: int = 0
    ) -> bytes | None:
        """Return the answer to one query of any bytes; None when it deserves none, FORWARD when it is not ours.

        Nothing is said to what is too short for a header or is itself an answer: that could go on for ever.
        `source` are the bytes of the asker's address, for its cookie. `reserve` bytes of what the asker can
        take are left for a signature; such answers are not kept.
        """
        if not over_tcp and not reserve:
            rest = self.ready.get(data[2:])
            if rest is not None:
                return data[:2] + rest
            if (known := self._known_but_for_the_cookie(data, source)) is not None:
                return known
        query = self._read(data)
        if query is None or isinstance(query, bytes):
            return query
        query.reply_options = self._reply_options(query, over_tcp, source)
        limit = (TCP_PAYLOAD_BYTES if over_tcp else udp_limit(query)) - reserve
        answer, is_lasting = self._reply(query, limit)
        is_plain = not over_tcp and not reserve
        if is_lasting and is_plain and query.question[:-4].islower():
            if not query.options_bytes:
                self._keep(query, data[2:], answer[2:])
            elif query.reply_options and query.options_bytes == _OPTION_HEAD_BYTES + len(query.cookie):
                asked = data[2 : -2 - query.options_bytes] + _NO_OPTIONS
                query.reply_options = b""
                self._keep(query, asked, self._reply(query, limit)[0][2:])
        return answer

    def _known_but_for_the_cookie(self, data: bytes, source: bytes) -> bytes | None:
        """Return the ready answer to a query that ends in a cookie, with ours: what BIND and dig send."""
        asked = _without_cookie(data) if self._options.secret else None
        rest = self.ready.get(asked) if asked is not None else None
        # An answer that ends in anything but an empty OPT record, or may get too large, is put together anew.
        if asked is None or rest is None or rest[-2:] != _NO_OPTIONS or len(rest) > _COOKIE_FITS_BYTES:
            return None
        theirs = data[len(asked) + 2 + _OPTION_HEAD_BYTES :]
        option = _option(OPTION_COOKIE, cookie(self._options.secret, theirs, source, int(self.now)))
        return b"".join((data[:2], rest[:-2], len(option).to_bytes(2), option))

    def take_over(self, previous: Answers) -> None:
        """Go on with the ready answers of the state before, except those about what has changed since.

        Without a word when that is not the state that ours follows, or its answers looked otherwise. A kept
        negative answer has the serial of when it was put together; who wants the zone's asks for the SOA.
        """
        ours, theirs = self.zone, previous.zone
        is_next = ours is not None and theirs is not None and ours.follows == theirs.serial
        if ours is None or not is_next or self._look() != previous._look():
            return
        self.ready, self._ready_by_subject = previous.ready, previous._ready_by_subject
        for subject in (NO_SUBJECT, *ours.changed):
            for query in self._ready_by_subject.pop(subject, ()):
                self.ready.pop(query, None)

    def _look(self) -> tuple[object, ...]:
        """Return what else than the zone makes an answer."""
        return self.is_stale, self._options

    def _keep(self, query: Query, asked: bytes, answer: bytes) -> None:
        if len(self.ready) >= READY_ANSWERS_MAX:
            self.ready.clear()
            self._ready_by_subject.clear()
        self.ready[asked] = answer
        subject = self.zone.subject(query.labels) if self.zone is not None else NO_SUBJECT
        self._ready_by_subject.setdefault(subject, []).append(asked)

    def limited(self, data: bytes, source: bytes, *, slips: bool) -> bytes | None:
        """Return what a source hears that has had too many answers: the answer only if its cookie is ours.

        With another cookie it is given ours (RFC 7873 5.2.3). Without any it is told to come by TCP when it
        `slips`, and else nothing: neither is larger than what it sent.
        """
        query = self._read(data)
        if query is None or isinstance(query, bytes):
            return query if slips else None
        limit = udp_limit(query)
        if query.cookie and self._options.secret:
            if is_valid(self._options.secret, query.cookie, source, int(self.now)):
                return self.answer(data, source=source)
            query.reply_options = self._reply_options(query, False, source)
            return _finish(query, Code.BADCOOKIE, limit=limit)
        return _finish(query, Code.NOERROR, TC, limit=limit) if slips else None

    def _read(self, data: bytes) -> Query | bytes | None:
        """Return the query, the answer that says what is wrong with it, or None."""
        if len(data) < HEADER_BYTES or data[2] & 0x80:
            self.malformed += 1
            return None
        try:
            query = read(data)
        except Malformed as error:
            self.malformed += 1
            return _without_question(data, error.code)
        query.reply_flags |= self._reply_flags
        return query

    def _reply_options(self, query: Query, over_tcp: bool, source: bytes) -> bytes:
        """Return the EDNS options that the query's own ask for."""
        if not query.options_bytes:
            return b""
        options, reply = self._options, b""
        if query.cookie and options.secret:
            reply += _option(OPTION_COOKIE, cookie(options.secret, query.cookie, source, int(self.now)))
        if query.wants_nsid and options.nsid:
            reply += _option(OPTION_NSID, options.nsid)
        if query.wants_keepalive and over_tcp:
            # In units of 100 ms (RFC 7828 3.1); over UDP it has no meaning.
            reply += _option(OPTION_KEEPALIVE, int(TCP_IDLE_SECONDS * 10).to_bytes(2))
        return reply

    def _reply(self, query: Query, limit: int) -> tuple[bytes, bool]:
        """Return the answer, and whether the same bytes answer the same query while the zone lasts."""
        if query.version > 0:
            return _finish(query, Code.BADVERS, limit=limit), False
        if not query.question:
            return _finish(query, Code.NOERROR, limit=limit), False
        if query.class_ == _CH:
            return self._about_the_server(query, limit), False
        zone = self.zone or self._options.bounds
        outside = query.class_ != _IN or query.kind in _REFUSED_TYPES
        found = zone.find(query.labels, query.kind) if zone and not outside else _OUTSIDE
        if found.outcome is Outcome.OUTSIDE and not outside and self._options.forwards and query.flags & RD:
            return FORWARD, False
        if self.zone is None:
            return _finish(query, Code.SERVFAIL, limit=limit, ede=self._why_not), False
        if found.outcome is Outcome.OUTSIDE:
            self.refused += 1
            return _finish(query, Code.REFUSED, limit=limit), False
        return self._answer_from(self.zone, query, found, limit)

    def _about_the_server(self, query: Query, limit: int) -> bytes:
        """Answer class CH, where servers by custom tell of themselves (RFC 4892), as far as that is wanted."""
        text = b""
        if query.labels in _ABOUT_VERSION:
            text = self._options.version
        elif query.labels in _ABOUT_NAME:
            text = self._options.nsid
        if not text or query.kind not in (Type.TXT, Type.ANY):
            self.refused += 1
            return _finish(query, Code.REFUSED, limit=limit)
        answers = [pack_record(_NAME_IS_THE_QUESTION, Type.TXT, 0, _strings((text,)), class_=_CH)]
        return _finish(query, Code.NOERROR, AA, answers=answers, limit=limit)

    def _answer_from(self, zone: ZoneData, query: Query, found: Found, limit: int) -> tuple[bytes, bool]:
        ttl_s = min(zone.settings.ttl_s, self._ttl_max_s)
        ede = EDE_STALE_ANSWER if self.is_stale else None
        if found.outcome is Outcome.NXDOMAIN:
            ede = EDE_STALE_NXDOMAIN_ANSWER if self.is_stale else None
            authority = _soa(zone, query, found.apex, self._ttl_max_s)
            return _finish(query, Code.NXDOMAIN, AA, authority=authority, limit=limit, ede=ede), False
        if query.kind == Type.ANY:
            # RFC 8482 4.2: a synthesised HINFO instead of everything.
            answers = [pack_record(_NAME_IS_THE_QUESTION, Type.HINFO, ttl_s, _HINFO)]
            return _finish(query, Code.NOERROR, AA, answers=answers, limit=limit, ede=ede), True
        if found.outcome is Outcome.NODATA:
            authority = _soa(zone, query, found.apex, self._ttl_max_s)
            return _finish(query, Code.NOERROR, AA, authority=authority, limit=limit, ede=ede), True
        if found.outcome is Outcome.FRESH:
            text = str(int(self.confirmed_at)).encode()
            answers = [pack_record(_NAME_IS_THE_QUESTION, Type.TXT, FRESH_TTL_SECONDS, _strings((text,)))]
            return _finish(query, Code.NOERROR, AA, answers=answers, limit=limit, ede=ede), False
        answers, targets = _answers(query, found.records, ttl_s)
        additional = _additional(found, targets, ttl_s)
        return (
            _finish(query, Code.NOERROR, AA, answers=answers, additional=additional, limit=limit, ede=ede),
            True,
        )


def _without_cookie(data: bytes) -> bytes | None:
    """Return what a query without its id is without its cookie, None when it does not end in one alone."""
    for head, size in _COOKIE_ENDS:
        if data[-size - len(head) : -size] == head:
            return data[2 : -size - len(head)] + _NO_OPTIONS
    return None


def prohibited(data: bytes) -> bytes | None:
    """Return the REFUSED for a source that may not ask; None for what deserves no answer."""
    if len(data) < HEADER_BYTES or data[2] & 0x80:
        return None
    try:
        return _finish(read(data), Code.REFUSED, limit=UDP_PAYLOAD_BYTES_MIN, ede=EDE_PROHIBITED)
    except Malformed as error:
        return _without_question(data, error.code)


def failed(query: Query) -> bytes:
    """Return the SERVFAIL to a question that no upstream answered."""
    query.reply_flags |= RA
    return _finish(query, Code.SERVFAIL, limit=UDP_PAYLOAD_BYTES_MIN, ede=EDE_NO_REACHABLE_AUTHORITY)


def udp_limit(query: Query) -> int:
    """Return how many bytes the asker takes over UDP, within our own bound."""
    return min(max(query.udp_payload, UDP_PAYLOAD_BYTES_MIN), UDP_PAYLOAD_BYTES)


# Writing


def _without_question(data: bytes, code: Code) -> bytes:
    flags = int.from_bytes(data[2:4])
    return data[:2] + struct.pack("!HHHHH", QR | flags & (OPCODE | RD) | code, 0, 0, 0, 0)


def _finish(
    query: Query,
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
        answers, authority, additional, flags = (), (), (), flags | TC
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
        QR | flags | query.reply_flags | code & 0xF,
        1 if query.question else 0,
        len(answers),
        len(authority),
        fitting_count + (1 if opt else 0),
    )
    return b"".join((header, query.question, *answers, *authority, *fitting, opt))


def _opt(query: Query, code: Code, ede: int | None) -> bytes:
    if not query.has_edns:
        return b""
    options = (
        query.reply_options if ede is None else query.reply_options + _option(OPTION_EDE, ede.to_bytes(2))
    )
    ttl = (code >> 4) << 24 | (DO if query.wants_dnssec else 0)
    return _OPT.pack(0, _TYPE_OPT, UDP_PAYLOAD_BYTES, ttl, len(options)) + options


def _option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def _soa(zone: ZoneData, query: Query, apex: str, ttl_max_s: int) -> Sequence[bytes]:
    """Return the SOA for a negative answer, its TTL the minimum (RFC 2308 3), `ttl_max_s` at most."""
    # The apex is the end of the question's name: point into it. 5 = the name's last byte, type and class.
    offset = HEADER_BYTES + len(query.question) - 5 - (len(apex) + 1)
    soa = zone.soa(apex)
    return (pack_record(_pointer(offset), Type.SOA, min(soa.minimum, ttl_max_s), pack_data(soa)),)


def _answers(query: Query, records: Sequence[Data], ttl_s: int) -> tuple[list[bytes], dict[str, int]]:
    """Return the records for the question's name, and the offset in the message of each SRV target."""
    answers: list[bytes] = []
    targets: dict[str, int] = {}
    offset = HEADER_BYTES + len(query.question)
    for record in records:
        if isinstance(record, SrvData):
            # After the pointer, the record's head and priority, weight and port comes the target.
            targets.setdefault(record.target, offset + 2 + RECORD.size + _SRV.size)
        answers.append(pack_record(_NAME_IS_THE_QUESTION, query.kind, ttl_s, pack_data(record)))
        offset += len(answers[-1])
    return answers, targets


def _additional(found: Found, targets: dict[str, int], ttl_s: int) -> list[tuple[int, bytes]]:
    """Return the addresses of each target, how many and the records: they go together or not at all."""
    records = []
    for name, addresses in found.additional:
        offset = targets.get(name, _POINTER_MAX + 1)
        owner = _pointer(offset) if offset <= _POINTER_MAX else pack_name(name)
        packed = b"".join(
            pack_record(owner, Type.A if address.version == 4 else Type.AAAA, ttl_s, address.packed)
            for address in addresses
        )
        records.append((len(addresses), packed))
    return records


def pack_record(owner: bytes, kind: int, ttl_s: int, data: bytes, class_: int = _IN) -> bytes:
    """Return one record, of class IN unless another is named."""
    return owner + RECORD.pack(kind, class_, ttl_s, len(data)) + data


def pack_data(record: Data) -> bytes:
    """Return a record's data, no name in it compressed."""
    match record:
        case IPv4Address() | IPv6Address():
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
