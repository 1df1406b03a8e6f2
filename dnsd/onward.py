"""Questions handed on to an upstream, and whether what came back answers them.

Pure, and bytes only: an upstream's answer reaches the asker as it is, but for its id. Who is asked, and when
to give up, is dnsd.forwarding's.
"""

from __future__ import annotations

import struct

from dnsd.query import DO, QR, RD, TC, Query
from ztna.dns import HEADER_BYTES, Code, Type

UDP_PAYLOAD_BYTES = 1232
_HEADER = struct.Struct("!HHHHHH")
_OPT = struct.Struct("!BHHIH")
_AD, _CD = 0x0020, 0x0010
_KEPT_FLAGS = RD | _AD | _CD
"""What the asker may wish of the upstream: recursion, and what is to become of DNSSEC (RFC 4035 3.2.2)."""
_USEFUL = frozenset({Code.NOERROR, Code.NXDOMAIN})


def handed_on(query: Query, message_id: int) -> bytes:
    """Return the query for an upstream; EDNS options end here (RFC 7873 4), and its size is one any path carries."""
    header = _HEADER.pack(message_id, query.flags & _KEPT_FLAGS, 1, 0, 0, int(query.has_edns))
    if not query.has_edns:
        return header + query.question
    size = min(query.udp_payload, UDP_PAYLOAD_BYTES)
    return header + query.question + _OPT.pack(0, Type.OPT, size, DO if query.wants_dnssec else 0, 0)


def is_answer(data: bytes, asked: bytes) -> bool:
    """Say whether `data` is the answer to what `handed_on` made: the same id and the same one question."""
    end = asked.index(0, HEADER_BYTES) + 5
    return (
        len(data) >= end
        and data[:2] == asked[:2]
        and bool(data[2] & (QR >> 8))
        and data[4:6] == b"\0\1"
        and data[HEADER_BYTES:end].lower() == asked[HEADER_BYTES:end].lower()
    )


def is_useful(data: bytes) -> bool:
    """Say whether an answer is one to pass on: not an upstream's own trouble, which another may not have."""
    return data[3] & 0xF in _USEFUL


def passed_back(data: bytes, query: Query, limit: int) -> bytes:
    """Return an upstream's answer for the asker, in its own spelling; what is over `limit` is cut to nothing."""
    end = HEADER_BYTES + len(query.question)
    if len(data) > limit:
        flags = int.from_bytes(data[2:4]) | TC
        return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + query.question
    return query.id.to_bytes(2) + data[2:HEADER_BYTES] + query.question + data[end:]
