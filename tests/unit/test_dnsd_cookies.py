"""dnsd.cookies: ours are known again, and nothing else is."""

from __future__ import annotations

import pytest

from dnsd.cookies import AHEAD_SECONDS_MAX, LIFETIME_SECONDS, cookie, is_valid, is_well_formed

SECRET, ADDRESS, NOW = b"s" * 32, bytes((192, 0, 2, 1)), 1_700_000_000
OURS = cookie(SECRET, b"clientck", ADDRESS, NOW)


def test_ours_is_known_again_while_it_is_young() -> None:
    assert OURS[:12] == b"clientck\1\0\0\0"
    assert len(OURS) == 24
    for now in (NOW, NOW + LIFETIME_SECONDS, NOW - AHEAD_SECONDS_MAX):
        assert is_valid(SECRET, OURS, ADDRESS, now)
    for now in (NOW + LIFETIME_SECONDS + 1, NOW - AHEAD_SECONDS_MAX - 1):
        assert not is_valid(SECRET, OURS, ADDRESS, now)


def test_time_may_wrap() -> None:
    late = cookie(SECRET, b"clientck", ADDRESS, 0xFFFFFFFF)
    assert is_valid(SECRET, late, ADDRESS, 0x100000004)


@pytest.mark.parametrize(
    "option",
    [
        OURS[:8],
        OURS[:-1] + bytes((OURS[-1] ^ 1,)),
        b"CLIENTCK" + OURS[8:],
        OURS[:8] + b"\2" + OURS[9:],
        OURS + b"\0",
        cookie(b"t" * 32, b"clientck", ADDRESS, NOW),
        cookie(SECRET, b"clientck", bytes(4), NOW),
    ],
)
def test_others_are_not(option: bytes) -> None:
    assert not is_valid(SECRET, option, ADDRESS, NOW)


def test_lengths() -> None:
    assert [length for length in range(50) if is_well_formed(bytes(length))] == [8, *range(16, 41)]
