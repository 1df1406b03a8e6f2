"""dnsd.onward: what an upstream is asked, and what of its words comes back."""

from __future__ import annotations

import struct

import pytest

from dnsd.onward import handed_on, is_answer, is_useful, passed_back
from dnsd.query import read
from tests.support.dns import query, with_opt
from ztna.dns import Type, decode

ASKED = read(query("Example.com", message_id=7))
OURS = handed_on(ASKED, 99)
ANSWER = OURS[:2] + b"\x81\x80\0\1\0\0\0\0\0\0" + OURS[12:].lower()


def test_edns_ends_here_but_for_size_and_dnssec() -> None:
    plain = decode(OURS)
    assert (plain.id, plain.questions[0].name, plain.questions[0].type) == (99, "example.com", Type.A)
    assert (plain.edns, plain.recursion_desired) == (None, True)
    cookie = struct.pack("!HH8s", 10, 8, b"clientck")
    rich = decode(handed_on(read(with_opt(query("x.com"), size=4096, flags=0x8000, options=cookie)), 1))
    assert rich.edns is not None
    assert (rich.edns.udp_payload, rich.edns.flags, rich.edns.options) == (1232, 0x8000, ())
    small = decode(handed_on(read(with_opt(query("x.com"), size=600)), 1))
    assert small.edns is not None
    assert (small.edns.udp_payload, small.edns.flags) == (600, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (ANSWER, True),
        (ANSWER + b"more", True),
        (ANSWER[:-1], False),
        (b"\0\1" + ANSWER[2:], False),
        (OURS, False),
        (ANSWER[:4] + b"\0\2" + ANSWER[6:], False),
        (ANSWER.replace(b"example", b"exampel"), False),
        (b"", False),
    ],
)
def test_only_an_answer_to_our_question_is_one(data: bytes, expected: bool) -> None:
    assert is_answer(data, OURS) is expected


def test_an_upstreams_own_trouble_is_not_useful() -> None:
    codes = [is_useful(ANSWER[:3] + bytes((0x80 | code,)) + ANSWER[4:]) for code in (0, 3, 2, 5, 4)]
    assert codes == [True, True, False, False, False]


def test_it_comes_back_with_the_askers_id_and_spelling() -> None:
    back = passed_back(ANSWER + b"rest", ASKED, 512)
    assert back == b"\0\7" + ANSWER[2:12] + ASKED.question + b"rest"
    cut = decode(passed_back(ANSWER + bytes(600), ASKED, 512))
    assert (cut.id, cut.truncated, cut.answers) == (7, True, ())
