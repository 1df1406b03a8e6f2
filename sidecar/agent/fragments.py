"""Put fragments of one IP packet together (RFC 791, 3.2; RFC 8200, 4.5): programs may send more than the device's MTU.

Only for what this host's kernel cut: in order or not, never overlapping. Anything else is dropped. Pure: `now` is in
seconds of one monotonic clock.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass, field

from ztna.packet import PACKET_BYTES_MAX

WAIT_SECONDS = 5.0
"""The kernel sends all fragments at once: what has not come by then was lost in the device's queue."""
PACKETS_MAX = 64
BYTES_MAX = 1024 * 1024

_IPV4_BYTES = 20
_IPV6_BYTES = 40
_FRAGMENT_HEADER = 44
_FRAGMENT_HEADER_BYTES = 8
_MORE = 0x2000
_OFFSET = 0x1FFF

Key = tuple[bytes, bytes]


@dataclass(slots=True)
class _Parts:
    since: float
    pieces: dict[int, bytes] = field(default_factory=dict)
    head: bytes = b""
    size: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class _Fragment:
    """`head` is the header that the whole packet has, but for its length and checksum."""

    key: Key
    head: bytes
    offset: int
    has_more: bool
    data: bytes


class Reassembly:
    """The packets that are not whole yet."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Key, _Parts] = OrderedDict()
        self._bytes = 0
        self.dropped = 0
        """How many packets were given up."""

    def take(self, data: bytes, now: float) -> bytes | None:
        """Return a packet that is whole: this one, or one that this fragment completes; else None."""
        fragment = _fragment(data)
        if fragment is None:
            return data
        self._expire(now)
        parts = self._waiting.setdefault(fragment.key, _Parts(now))
        if not self._add(parts, fragment):
            self._give_up(fragment.key)
            return None
        if parts.end is None or parts.size != parts.end or not parts.head:
            self._make_room()
            return None
        del self._waiting[fragment.key]
        self._bytes -= parts.size
        return _whole(parts.head, b"".join(piece for _, piece in sorted(parts.pieces.items())))

    def _add(self, parts: _Parts, fragment: _Fragment) -> bool:
        """Put a fragment to its packet; False when it is none of it."""
        end = fragment.offset + len(fragment.data)
        if fragment.offset in parts.pieces or end > PACKET_BYTES_MAX:
            return False
        if not fragment.has_more:
            if parts.end is not None:
                return False
            parts.end = end
        if fragment.offset == 0:
            parts.head = fragment.head
        parts.pieces[fragment.offset] = fragment.data
        parts.size += len(fragment.data)
        self._bytes += len(fragment.data)
        return parts.end is None or parts.size <= parts.end

    def _expire(self, now: float) -> None:
        while self._waiting:
            key, parts = next(iter(self._waiting.items()))
            if now - parts.since < WAIT_SECONDS:
                return
            self._give_up(key)

    def _make_room(self) -> None:
        while len(self._waiting) > PACKETS_MAX or self._bytes > BYTES_MAX:
            self._give_up(next(iter(self._waiting)))

    def _give_up(self, key: Key) -> None:
        self._bytes -= self._waiting.pop(key).size
        self.dropped += 1


def _fragment(data: bytes) -> _Fragment | None:
    """Take a fragment apart; None when the packet is none, or nothing that can be read (which others refuse)."""
    if len(data) > _IPV4_BYTES and data[0] >> 4 == 4:
        header, bits = (data[0] & 0x0F) * 4, int.from_bytes(data[6:8], "big")
        if not bits & (_MORE | _OFFSET) or not _IPV4_BYTES <= header < len(data):
            return None
        key = (data[4:6] + data[9:10], data[12:20])
        head = data[:6] + b"\0\0" + data[8:10] + b"\0\0" + data[12:header]
        return _Fragment(key, head, (bits & _OFFSET) * 8, bool(bits & _MORE), data[header:])
    start = _IPV6_BYTES + _FRAGMENT_HEADER_BYTES
    if len(data) > start and data[0] >> 4 == 6 and data[6] == _FRAGMENT_HEADER:
        following, bits, number = struct.unpack_from(">BxHI", data, _IPV6_BYTES)
        key = (number.to_bytes(4, "big"), data[8:40])
        head = data[:6] + bytes((following,)) + data[7:_IPV6_BYTES]
        return _Fragment(key, head, bits & ~7, bool(bits & 1), data[start:])
    return None


def _whole(head: bytes, payload: bytes) -> bytes:
    if head[0] >> 4 == 6:
        return head[:4] + len(payload).to_bytes(2, "big") + head[6:] + payload
    counted = head[:2] + (len(head) + len(payload)).to_bytes(2, "big") + head[4:]
    # RFC 791, 3.1; the one's complement sum is the value modulo 0xFFFF (RFC 1071).
    checksum = -(int.from_bytes(counted, "big") % 0xFFFF) % 0xFFFF
    return counted[:10] + checksum.to_bytes(2, "big") + counted[12:] + payload
