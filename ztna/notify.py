"""NOTIFY messages (RFC 1996): a primary tells that a zone changed. Pure; what is done then is the hearer's."""

from __future__ import annotations

import struct

from ztna.dns import Code, Type
from ztna.errors import ProtocolError

MESSAGE_BYTES_MAX = 512
"""One question and at most an SOA; a signature is taken off before."""

_HEADER = struct.Struct("!HHHHHH")
_QR, _AA, _OPCODE_MASK, _OPCODE = 0x8000, 0x0400, 0x7800, 4 << 11
_TAIL = struct.pack("!HH", Type.SOA, 1)


def encode(message_id: int, zone: str) -> bytes:
    """Return the NOTIFY of a zone; without an SOA, which is only a hint (RFC 1996 3.7)."""
    labels = zone.encode("ascii").split(b".")
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return _HEADER.pack(message_id, _OPCODE | _AA, 1, 0, 0, 0) + name + _TAIL


def code(data: bytes, message_id: int) -> int | None:
    """Return the response code when this answers our NOTIFY, None when it is anything else."""
    if len(data) < _HEADER.size:
        return None
    answered, flags, *_ = _HEADER.unpack_from(data)
    if answered != message_id or not flags & _QR or flags & _OPCODE_MASK != _OPCODE:
        return None
    return int(flags & 0xF)


def zone_of(data: bytes) -> str:
    """Return the zone that a NOTIFY is about, lower case. Raises ProtocolError for any other message."""
    if not _HEADER.size < len(data) <= MESSAGE_BYTES_MAX:
        raise ProtocolError("no NOTIFY: too short or too long")
    _, flags, questions, *_ = _HEADER.unpack_from(data)
    if flags & (_QR | _OPCODE_MASK) != _OPCODE or questions != 1:
        raise ProtocolError("no NOTIFY of one zone")
    labels: list[bytes] = []
    position = _HEADER.size
    while position < len(data) and data[position]:
        label = data[position + 1 : position + 1 + data[position]]
        if data[position] > 63:
            raise ProtocolError("a NOTIFY whose name is compressed")
        labels.append(label.lower())
        position += 1 + data[position]
    if data[position + 1 : position + 5] != _TAIL:
        raise ProtocolError("a NOTIFY that does not ask for an SOA")
    return b".".join(labels).decode("latin-1")


def answer(data: bytes, code: Code) -> bytes:
    """Return the answer to a NOTIFY that `zone_of` could read: its question and a code (RFC 1996 4.7)."""
    message_id = int.from_bytes(data[:2])
    end = data.index(_TAIL, _HEADER.size) + len(_TAIL)
    return _HEADER.pack(message_id, _QR | _AA | _OPCODE | code, 1, 0, 0, 0) + data[_HEADER.size : end]
