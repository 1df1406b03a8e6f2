"""One source is one host's addresses, and has a share of the handshakes under way."""

from __future__ import annotations

from ztna.sources import HalfOpen, source_of


def test_one_host_is_one_source() -> None:
    assert source_of("2001:db8:1:2:3::4") == source_of("2001:db8:1:2::5%eth0") != source_of("2001:db8:1:3::4")
    assert source_of("192.0.2.1") != source_of("192.0.2.2")


def test_one_source_has_its_share_and_all_have_the_total() -> None:
    half_open = HalfOpen(total=8, per_source=4)
    for number in range(4):
        assert not half_open.full("one")
        half_open.begin(number, "one")
    assert half_open.full("one")
    assert not half_open.full("other")
    for number in range(4, 8):
        half_open.begin(number, f"source {number}")
    assert (len(half_open), 7 in half_open, 8 in half_open) == (8, True, False)
    assert half_open.full("other")


def test_what_ends_makes_room_once() -> None:
    half_open = HalfOpen(total=8, per_source=2)
    half_open.begin("a", "one")
    half_open.begin("b", "one")
    assert half_open.full("one")
    half_open.end("a")
    half_open.end("a")
    half_open.end("never there")
    assert not half_open.full("one")
    half_open.end("b")
    assert len(half_open) == 0
    assert not half_open.wants_proof("one")


def test_a_quarter_of_either_asks_for_proof() -> None:
    half_open = HalfOpen(total=100, per_source=8)
    half_open.begin(0, "one")
    assert not half_open.wants_proof("one")
    half_open.begin(1, "one")
    # Whoever writes that address on packets cannot fill its share.
    assert half_open.wants_proof("one")
    assert not half_open.wants_proof("other")
    for number in range(2, 25):
        half_open.begin(number, f"source {number}")
    assert half_open.wants_proof("other")
