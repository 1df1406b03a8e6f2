"""A million mutations of DNS messages: what dnsd is asked, and what a resolver is answered."""

from __future__ import annotations

import struct

import pytest

from dnsd.answer import Answers, prohibited
from tests.support.dns import catalog, instance, lease, query, zone
from tests.support.mutations import survive
from ztna.dns import Type, decode, encode_query
from ztna.errors import ProtocolError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SERVICES = catalog(
    instance("web", "c1"),
    instance("web", "c2", address="192.0.2.2"),
    *(instance("big", f"c{n}") for n in range(90)),
)
ANSWERS = Answers(zone(SERVICES, {"web": lease("10.100.1.2")}), is_stale=True)
NAMES = ("web", "big", "nobody", "_web._tcp", "_fresh", "c1.connector", "_services._dns-sd._udp")
KINDS = ("A", "AAAA", "SRV", "TXT", "PTR", "ANY")
COOKIE = struct.pack("!HH8s", 10, 8, b"abcdefgh")
QUERIES = [
    *(query(f"{name}.ztna.local", kind) for name in NAMES for kind in KINDS),
    *(encode_query(9, f"{name}.ztna.local", kind, 1232) for name in NAMES for kind in (Type.A, Type.SRV)),
    encode_query(9, "web.ztna.local", Type.A, 512)[:-2] + struct.pack("!H", len(COOKIE)) + COOKIE,
    query("2.1.100.10.in-addr.arpa", "PTR"),
    query("example.com"),
    query("ztna.local", "SOA"),
]
REPLIES = [
    answer
    for asked in QUERIES
    if (answer := ANSWERS.answer(asked, over_tcp=True)) is not None and len(answer) < 2000
]


class _NotAnswered(Exception):
    """Nothing, or an error, came back: the mutation was refused."""


def test_queries(capsys: pytest.CaptureFixture[str]) -> None:
    """dnsd answers anything with nothing or with a message that begins as an answer to it must."""

    def act(data: bytes) -> None:
        over_tcp = len(data) % 2 == 1
        answer = ANSWERS.answer(data, over_tcp=over_tcp)
        stranger = prohibited(data)
        if answer is None:
            assert stranger is None
            raise _NotAnswered
        assert stranger is not None
        assert answer[:2] == stranger[:2] == data[:2]
        assert answer[2] & 0x80
        assert len(answer) <= (65_535 if over_tcp else 1232)
        if answer[3] & 0xF:
            raise _NotAnswered

    survive(capsys, "dns query", QUERIES, act, _NotAnswered)


def test_replies(capsys: pytest.CaptureFixture[str]) -> None:
    survive(capsys, "dns reply", REPLIES, decode, ProtocolError)
