"""dnsd.query: what queries say, and every way in which one can be wrong."""

from __future__ import annotations

import struct

import pytest

from dnsd.query import Malformed, Query, read
from tests.support.dns import query, with_opt
from ztna.dns import Code

GOOD = query("WEB.ztna.local")
COOKIE = struct.pack("!HH8s", 10, 8, b"clientck")


def test_a_plain_query() -> None:
    got = read(GOOD)
    assert (got.id, got.labels, got.kind, got.class_) == (0x1234, ("web", "ztna", "local"), 1, 1)
    assert got.question == GOOD[12:]
    assert not got.has_edns
    assert got.reply_flags == 0x0100


def test_what_edns_says() -> None:
    nsid, keepalive, unknown = (struct.pack("!HH", code, 0) for code in (3, 11, 65001))
    got = read(
        with_opt(GOOD, size=4096, version=1, flags=0x8000, options=nsid + COOKIE + keepalive + unknown)
    )
    assert (got.has_edns, got.udp_payload, got.version, got.wants_dnssec) == (True, 4096, 1, True)
    assert (got.cookie, got.wants_nsid, got.wants_keepalive) == (b"clientck", True, True)


def test_only_the_first_cookie_counts() -> None:
    assert read(with_opt(GOOD, options=COOKIE + struct.pack("!HH3s", 10, 3, b"abc"))).cookie == b"clientck"


def test_a_question_is_not_needed_to_ask_for_a_cookie() -> None:
    empty = GOOD[:4] + bytes(8)
    got = read(with_opt(empty, options=COOKIE))
    assert (got.question, got.labels, got.cookie) == (b"", (), b"clientck")
    for data in (empty, with_opt(empty)):
        with pytest.raises(Malformed):
            read(data)


def test_other_additional_records_are_passed_over() -> None:
    compressed = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes(4)
    named = b"\x01x\0" + struct.pack("!HHIH", 16, 1, 0, 0)
    assert isinstance(read(GOOD[:10] + b"\0\2" + GOOD[12:] + compressed + named), Query)


WRONG = {
    "two questions": GOOD[:4] + b"\0\2" + GOOD[6:],
    "an answer inside": GOOD[:6] + b"\0\1" + GOOD[8:],
    "authority inside": GOOD[:8] + b"\0\1" + GOOD[10:],
    "too many additional": GOOD[:10] + b"\0\x09" + GOOD[12:],
    "name without end": GOOD[:12] + b"\x03web",
    "label of type 01": GOOD[:12] + b"\x41" + bytes(80),
    "compressed question": GOOD[:12] + b"\xc0\x0c\0\1\0\1",
    "name too long": GOOD[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
    "type cut": GOOD[:-3],
    "trailing bytes": GOOD + b"x",
    "additional name cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\x05ab",
    "additional head cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\0\0\1",
    "additional data cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\0" + struct.pack("!HHIH", 1, 1, 0, 9),
    "two OPTs": with_opt(with_opt(GOOD)),
    "OPT with a name": with_opt(GOOD, name=b"\x01x\0"),
    "option cut": with_opt(GOOD, options=b"\0\1\0"),
    "option past its end": with_opt(GOOD, options=b"\0\1\0\5ab"),
    "short cookie": with_opt(GOOD, options=struct.pack("!HH7s", 10, 7, b"clientc")),
    "long cookie": with_opt(GOOD, options=struct.pack("!HH41s", 10, 41, bytes(41))),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_formerr(data: bytes) -> None:
    with pytest.raises(Malformed) as raised:
        read(data)
    assert raised.value.code == Code.FORMERR


def test_another_opcode_is_not_implemented() -> None:
    with pytest.raises(Malformed) as raised:
        read(GOOD[:2] + bytes([GOOD[2] | 5 << 3]) + GOOD[3:])
    assert raised.value.code == Code.NOTIMP
