"""Lanes take turns, and who floods one loses from that one."""

from __future__ import annotations

import pytest

from ztna.fair_queue import FairQueue


def drain(queue: FairQueue) -> list[bytes]:
    taken = []
    while queue:
        head = queue[0]
        assert queue.popleft() == head
        taken.append(head)
    return taken


def test_one_lane_is_a_queue_that_gives_up_its_oldest() -> None:
    queue = FairQueue(3)
    assert [queue.put("a", bytes((each,))) for each in range(5)] == [True] * 3 + [False] * 2
    assert len(queue) == 3
    assert list(queue) == [b"\2", b"\3", b"\4"]
    assert drain(queue) == [b"\2", b"\3", b"\4"]
    assert not queue


def test_lanes_take_turns() -> None:
    queue = FairQueue(10)
    for each in (b"a1", b"a2", b"a3"):
        queue.put("a", each)
    queue.put("b", b"b1")
    queue.append(b"control")
    assert drain(queue) == [b"a1", b"b1", b"control", b"a2", b"a3"]


def test_a_flood_takes_no_room_from_a_polite_lane() -> None:
    queue = FairQueue(100)
    for each in range(1000):
        queue.put("flood", b"flood %d" % each)
        if each % 20 == 0:
            queue.put("polite", b"polite %d" % each)
    assert len(queue) == 100
    polite = [each for each in drain(queue) if each.startswith(b"polite")]
    assert polite == [b"polite %d" % each for each in range(0, 1000, 20)]


def test_the_share_of_a_lane_is_what_others_leave() -> None:
    queue = FairQueue(10)
    for each in range(10):
        queue.put("first", b"f%d" % each)
    for each in range(8):
        assert not queue.put("second", b"s%d" % each)
    # Half each: then each newcomer costs its own lane's oldest.
    assert [each[:1] for each in queue].count(b"f") == 5
    assert [each for each in queue if each.startswith(b"s")] == [b"s%d" % each for each in range(3, 8)]


def test_a_lane_that_loses_its_last_is_gone() -> None:
    queue = FairQueue(1)
    queue.put("a", b"a")
    assert not queue.put("b", b"b")
    assert drain(queue) == [b"b"]
    with pytest.raises(IndexError):
        queue[1]
