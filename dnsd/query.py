"""What a DNS query of any bytes asks for, read without dnslib (RFC 1035, 6891, 7873).

Pure. Hostile bytes give a Query or Malformed with the code to answer, in time linear in their length. What is
answered is dnsd.answer's.
"""

from __future__ import annotations

import struct

import msgspec

from dnsd.cookies import is_well_formed
from dnsd.zone import Labels
from ztna.dns import HEADER_BYTES, LABEL_BYTES_MAX, NAME_BYTES_MAX, Code, Type

QUERY_RECORDS_MAX = 8
UDP_PAYLOAD_BYTES_MIN = 512

OPTION_NSID = 3
OPTION_COOKIE = 10
OPTION_KEEPALIVE = 11
OPTION_EDE = 15

QR, AA, TC, RD, RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
OPCODE = 0x7800
DO = 0x8000
RECORD = struct.Struct("!HHIH")
"""Type, class, TTL and length of the data, after a record's name."""

_HEADER = struct.Struct("!HHHHHH")
_QUESTION_TAIL = struct.Struct("!HH")
_OPTION_HEAD = struct.Struct("!HH")
_TYPE_OPT = int(Type.OPT)


class Query(msgspec.Struct):
    """A well-formed query: its flags, its one question, and what its OPT record says.

    The question is empty when all that is asked for is a cookie (RFC 7873 5.4). `reply_options` and
    `reply_flags` are for whoever answers: EDNS options, and header flags beside those of the answer.
    """

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
    options_bytes: int = 0
    cookie: bytes = b""
    wants_nsid: bool = False
    wants_keepalive: bool = False
    reply_options: bytes = b""
    reply_flags: int = 0


class Malformed(Exception):
    """The query cannot be read; it is answered with this code."""

    def __init__(self, code: Code) -> None:
        self.code = code


def read(data: bytes) -> Query:
    """Read a query of at least HEADER_BYTES. Raises Malformed."""
    message_id, flags, questions, answers, authority, additional = _HEADER.unpack_from(data)
    if flags & OPCODE:
        raise Malformed(Code.NOTIMP)
    if questions > 1 or answers or authority or additional > QUERY_RECORDS_MAX:
        raise Malformed(Code.FORMERR)
    position = HEADER_BYTES
    labels: Labels = ()
    kind = class_ = 0
    if questions:
        labels, position = _read_name(data, HEADER_BYTES)
        if len(data) < position + 4:
            raise Malformed(Code.FORMERR)
        kind, class_ = _QUESTION_TAIL.unpack_from(data, position)
        position += 4
    query = Query(message_id, flags, data[HEADER_BYTES:position], labels, kind, class_)
    query.reply_flags = flags & RD
    for _ in range(additional):
        position = _read_additional(data, position, query)
    if position != len(data) or (not questions and not query.cookie):
        raise Malformed(Code.FORMERR)
    return query


def _read_name(data: bytes, position: int) -> tuple[Labels, int]:
    """Read the question's name: no compression there, nothing to point to. Returns the place after it."""
    start = position
    labels: list[str] = []
    while True:
        length = data[position] if position < len(data) else LABEL_BYTES_MAX + 1
        if length > LABEL_BYTES_MAX or position - start >= NAME_BYTES_MAX:
            raise Malformed(Code.FORMERR)
        if length == 0:
            return tuple(labels), position + 1
        # A dot, or any byte beyond ASCII, makes a label that no name of ours has: it is simply not found.
        labels.append(data[position + 1 : position + 1 + length].lower().decode("latin-1"))
        position += 1 + length


def _read_additional(data: bytes, position: int, query: Query) -> int:
    """Pass one additional record, taking in OPT (RFC 6891 6.1.1: only one, at the root)."""
    start, position = position, _pass_name(data, position)
    if len(data) < position + RECORD.size:
        raise Malformed(Code.FORMERR)
    kind, class_, ttl, length = RECORD.unpack_from(data, position)
    position += RECORD.size
    end: int = position + length
    if end > len(data):
        raise Malformed(Code.FORMERR)
    if kind == _TYPE_OPT:
        if query.has_edns or data[start]:
            raise Malformed(Code.FORMERR)
        query.has_edns, query.udp_payload = True, class_
        query.version, query.wants_dnssec = (ttl >> 16) & 0xFF, bool(ttl & DO)
        query.options_bytes = length
        _read_options(data, position, end, query)
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
    raise Malformed(Code.FORMERR)


def _read_options(data: bytes, position: int, end: int, query: Query) -> None:
    """Take in the options we know; others are passed over (RFC 6891 6.1.2)."""
    while position < end:
        if position + _OPTION_HEAD.size > end:
            raise Malformed(Code.FORMERR)
        code, length = _OPTION_HEAD.unpack_from(data, position)
        position += _OPTION_HEAD.size + length
        if position > end:
            raise Malformed(Code.FORMERR)
        if code == OPTION_COOKIE and not query.cookie:
            # RFC 7873 5.2: only the first counts.
            query.cookie = data[position - length : position]
            if not is_well_formed(query.cookie):
                raise Malformed(Code.FORMERR)
        elif code == OPTION_NSID:
            query.wants_nsid = True
        elif code == OPTION_KEEPALIVE:
            query.wants_keepalive = True
