"""dnsd.limits: so many answers a second for each source."""

from __future__ import annotations

from dnsd.limits import BURST_SECONDS, PLACES_PER_SOURCE, SOURCES_MAX, TABLE_BYTES, Limiter


def source(number: int) -> bytes:
    return number.to_bytes(4)


A, B = source(0x0A000001), source(0)


def test_a_burst_then_the_rate_and_each_source_for_itself() -> None:
    limiter = Limiter(10)
    burst = int(10 * BURST_SECONDS)
    assert [limiter.takes(A, 100.0) for _ in range(burst + 1)] == [True] * burst + [False]
    assert limiter.takes(B, 100.0)
    assert not limiter.takes(A, 100.05)
    assert [limiter.takes(A, 100.35) for _ in range(4)] == [True, True, True, False]
    assert sum(limiter.takes(A, 1e6) for _ in range(2 * burst)) == burst


def test_every_other_refusal_slips() -> None:
    limiter = Limiter(1)
    assert [limiter.slips() for _ in range(4)] == [True, False, True, False]


def test_two_that_share_a_table_share_the_limit() -> None:
    table = memoryview(bytearray(TABLE_BYTES))
    first, second = Limiter(10, table), Limiter(10, table)
    said = [each.takes(A, 5.0) for _ in range(15) for each in (first, second)]
    assert said == [True] * 20 + [False] * 10


def test_sources_that_fall_into_the_same_places_take_the_one_longest_untouched() -> None:
    # The mix of an address repeats its upper half for addresses whose products differ in the lower one only.
    inverse = pow(0x9E3779B1, -1, 2**32)
    found = [source((0x1234_0000 + n) * inverse % 2**32 - 1) for n in range(PLACES_PER_SOURCE + 1)]
    limiter = Limiter(1)
    for now, each in enumerate(found):
        assert [limiter.takes(each, 100.0 + now / 100) for _ in range(3)] == [True, True, False]
    # The first was displaced by the last and starts anew; it displaces the second, the others are remembered.
    assert limiter.takes(found[0], 100.05)
    assert [limiter.takes(each, 100.06) for each in found[2:]] == [False] * (PLACES_PER_SOURCE - 1)


def test_the_last_place_is_followed_by_the_first() -> None:
    inverse = pow(0x9E3779B1, -1, 2**32)
    found = [source((0xFFFF_0000 + n) * inverse % 2**32 - 1) for n in range(2)]
    limiter = Limiter(1, table := memoryview(bytearray(TABLE_BYTES)))
    assert all(limiter.takes(each, 1.0) for each in found)
    keys = table.cast("Q")
    assert [keys[(SOURCES_MAX - 1) * 3], keys[0]] == [int.from_bytes(each) + 1 for each in found]
