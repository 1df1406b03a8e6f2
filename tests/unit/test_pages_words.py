"""Figures in words: coarse ages, decimal sizes, and states with a sign."""

from __future__ import annotations

import pytest

from ztna.pages import words
from ztna.pages.markup import html
from ztna.pages.seen import Port


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (None, "–"),
        (-1, "under 10 s"),
        (9.9, "under 10 s"),
        (19, "10 s"),
        (61, "1 min"),
        (7300, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_ages_are_coarse(seconds: float | None, told: str) -> None:
    assert words.age(seconds) == told


def test_sizes_rates_and_counts() -> None:
    assert [words.size(each) for each in (0, 999, 1500, 2.5e6, 3e9, 4e12)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "3.0 GB", "4.0 TB",
    ]  # fmt: skip
    assert [words.rate(each) for each in (None, 0, 0.25, 1234.5)] == ["–", "0/s", "0.2/s", "1,234/s"]
    assert words.number(65531) == "65,531"
    assert [words.milliseconds(each) for each in (None, 1.26, 12.6)] == ["–", "1.3 ms", "13 ms"]
    assert [words.days(each) for each in (-0.1, 0.5, 90.2)] == ["expired", "12 h", "90 days"]
    assert words.plural(1, "process", "processes") == "1 process"
    assert words.plural(2, "process", "processes") == "2 processes" and words.plural(0, "link") == "0 links"


def test_ports_are_told_with_their_protocol() -> None:
    assert words.ports([Port("tcp", 80), Port("udp", 53)]) == "tcp 80, udp 53"
    assert words.ports([]) == "–"


def test_a_state_has_a_sign_and_a_word_beside_its_colour() -> None:
    assert "mark bad" in html(words.mark("critical")) and "×" in html(words.mark("critical"))
    assert html(words.mark("critical")).endswith("</span>critical</span>")
    assert "mark dim" in html(words.mark("idle")) and html(words.mark("up", "by QUIC")).endswith(
        "by QUIC</span>"
    )
