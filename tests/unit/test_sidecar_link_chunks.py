"""sidecar.link.chunks: frames in a buffer are what a reader of the wire takes them for."""

from random import Random

import pytest

from sidecar.link.chunks import (
    DOUBLINGS_MAX,
    PIECE_BYTES,
    SPARE,
    SPARE_CHUNKS_MAX,
    Spare,
    framed,
    pieces_of,
    rooms,
)
from ztna.wire.stream import Data, FrameReader


@pytest.mark.parametrize("size", [1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 1, 8 * PIECE_BYTES])
def test_what_is_read_into_a_chunk_goes_out_as_frames(size: int) -> None:
    chunk, content, at = Spare(8).take(), Random(size).randbytes(size), 0
    for room in rooms(chunk, size):
        room[:] = content[at : at + len(room)]
        at += len(room)
    assert at == size
    frames = framed(chunk, size)
    read = FrameReader().feed(bytes(frames))
    assert b"".join(frame.data for frame in read if isinstance(frame, Data)) == content
    assert [len(piece) for piece in pieces_of(frames)] == [len(room) for room in rooms(chunk, size)]
    assert b"".join(pieces_of(frames)) == content


def test_a_chunk_that_is_given_back_is_taken_again() -> None:
    spare = Spare(2)
    chunk = spare.take()
    spare.give(chunk)
    assert spare.take() is chunk
    assert spare.take() is not chunk


def test_no_more_than_so_many_are_held_ready() -> None:
    spare = Spare(1)
    given = [spare.take() for _ in range(SPARE_CHUNKS_MAX + 5)]
    for chunk in given:
        spare.give(chunk)
    taken = [spare.take() for _ in given]
    assert sum(any(chunk is old for old in given) for chunk in taken) == SPARE_CHUNKS_MAX


def test_there_is_one_store_for_each_doubling() -> None:
    assert [len(spare.take()) // len(SPARE[0].take()) for spare in SPARE] == [
        1 << doublings for doublings in range(DOUBLINGS_MAX + 1)
    ]
