"""Buffers of DATA frames as they go over the wire, to read into and write at once (protocol.md, Link: stream carrier).

    | header | piece | header | piece | ... | header | last piece, may be short | unused |

Whose bytes they are, and for how long, is sidecar.link.flow's.
"""

from __future__ import annotations

import struct

from ztna.wire.stream import DATA, HEADER_BYTES

# With its header and what TLS adds to its four records (22 bytes each) a full piece is what the kernel sends in one go:
# 45 segments of 1448 bytes are the most that fit in 64 KiB. A byte more would go alone.
PIECE_BYTES = 45 * 1448 - 4 * 22 - HEADER_BYTES
FRAME_BYTES = HEADER_BYTES + PIECE_BYTES
DOUBLINGS_MAX = 3
"""A local socket that fills what it is read into gets twice the room at the next read, so often: eight full frames.

Each turn costs the same, so bulk goes by few and large ones.
"""
SPARE_CHUNKS_MAX = 16
"""How many buffers of each of the four sizes are held ready: 16 MB in all."""

_HEADER = struct.Struct(">I")


class Chunk(bytearray):
    """A buffer of DATA frames, full ones but for the last. `kept`: the bytes of how many of them wait for their ACK."""

    __slots__ = ("kept", "spare")

    def __init__(self, size: int, spare: Spare) -> None:
        super().__init__(size)
        self.kept = 0
        self.spare = spare


class Spare:
    """Spare buffers for so many full DATA frames, so that the hot path allocates and zeroes none."""

    def __init__(self, frames: int) -> None:
        self._size = frames * FRAME_BYTES
        self._chunks: list[Chunk] = []

    def take(self) -> Chunk:
        """Return one to fill; what it holds is of an earlier use."""
        return self._chunks.pop() if self._chunks else Chunk(self._size, self)

    def give(self, chunk: Chunk) -> None:
        """Take one back that nobody looks into any more."""
        if len(self._chunks) < SPARE_CHUNKS_MAX:
            self._chunks.append(chunk)


SPARE = tuple(Spare(1 << doublings) for doublings in range(DOUBLINGS_MAX + 1))


def rooms(chunk: Chunk, size: int) -> list[memoryview]:
    """Return where so many bytes of DATA go, each piece behind its header."""
    view, found, at = memoryview(chunk), [], HEADER_BYTES
    while size > PIECE_BYTES:
        found.append(view[at : at + PIECE_BYTES])
        at += FRAME_BYTES
        size -= PIECE_BYTES
    found.append(view[at : at + size])
    return found


def framed(chunk: Chunk, size: int) -> memoryview:
    """Return the frames of so many bytes of DATA, which lie where `rooms` said; their headers are written here."""
    at = 0
    while size > PIECE_BYTES:
        _HEADER.pack_into(chunk, at, DATA << 24 | PIECE_BYTES)
        at += FRAME_BYTES
        size -= PIECE_BYTES
    _HEADER.pack_into(chunk, at, DATA << 24 | size)
    return memoryview(chunk)[: at + HEADER_BYTES + size]


def pieces_of(frames: memoryview) -> list[memoryview]:
    """Return the DATA of frames in a chunk."""
    return [frames[at + HEADER_BYTES : at + FRAME_BYTES] for at in range(0, len(frames), FRAME_BYTES)]
