"""sidecar.agent.stubbing: whose a name is, how long an answer keeps, how it fits."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from sidecar.agent.stubbing import Query, addresses_in, aged, fitting, refusal, tailored, ttl_of
from ztna.dns import (
    Code,
    HostData,
    Message,
    Record,
    SoaData,
    SrvData,
    Type,
    decode,
    encode_query,
    encode_response,
)
from ztna.errors import ProtocolError
from ztna.names import Zone

NAME = "web-app.ztna.local"
ZONE = Zone("ztna.local")


def query(name: str = NAME, kind: Type = Type.A, *, edns: int | None = 4096) -> Query:
    data = encode_query(0x1234, name, kind, edns or 0)
    if edns is None:
        data = data[:10] + b"\x00\x00" + data[12:-11]
    return Query.of(data)


def address(ttl: int, name: str = NAME) -> Record:
    return Record(name, Type.A, 1, ttl, IPv4Address("10.100.0.2"))


def soa(ttl: int, minimum: int) -> Record:
    return Record(
        "ztna.local", Type.SOA, 1, ttl, SoaData("ns.ztna.local", "h.ztna.local", 7, 1, 2, 3, minimum)
    )


def other(
    message: Message, *answers: Record, authority: tuple[Record, ...] = (), code: int = 0, stale: bool = False
) -> bytes:
    return encode_response(message, code, answers, authority, stale=stale)


def test_a_query_is_one_question() -> None:
    data = query().data
    for bad in (data[:5], b"\x12\x34" + bytes(10), other(query().message), data[:2] + b"\x20\x00" + data[4:]):
        with pytest.raises(ProtocolError):
            Query.of(bad)
    # A name that points into the header, which decodes to a root: nothing that programs send.
    pointing = bytes(12)
    with pytest.raises(ProtocolError, match="compressed"):
        Query.of(b"\x00\x00\x00\x00\x00\x01" + pointing[:6] + b"\xc0\x00\x00\x01\x00\x01")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (NAME, True),
        ("ztna.local", True),
        ("2.0.100.10.in-addr.arpa", True),
        ("1.0.ip6.arpa", True),
        ("example.org", False),
        ("notztna.local", False),
        ("arpa", False),
    ],
)
def test_names_of_the_zone_and_reverse_ones_are_ours(name: str, ours: bool) -> None:
    assert query(name).is_of(ZONE) is ours


def test_what_asks_alike_has_the_same_key() -> None:
    assert query("WEB-app.ztna.local").key == query().key
    assert query(edns=None).key != query().key != query(kind=Type.TXT).key
    assert query("WEB-app.ztna.local").name == NAME


@pytest.mark.parametrize(("told", "room"), [(None, 512), (100, 512), (1000, 1000), (4096, 1232)])
def test_a_response_has_the_room_that_the_program_tells_within_bounds(told: int | None, room: int) -> None:
    assert query(edns=told).udp_payload == room


def test_answers_keep_as_long_as_their_shortest_ttl() -> None:
    message = query().message
    assert ttl_of(other(message, address(30), address(20))) == 20
    assert ttl_of(other(message, authority=(soa(60, 10),), code=Code.NXDOMAIN)) == 10
    assert ttl_of(other(message, authority=(soa(5, 10),))) == 5
    assert ttl_of(other(message)) == 0
    assert (
        ttl_of(other(message, authority=(Record("ztna.local", Type.NS, 1, 9, HostData("ns.ztna.local")),)))
        == 0
    )
    assert ttl_of(other(message, address(30), stale=True)) == 0
    assert ttl_of(other(message, address(30), code=Code.SERVFAIL)) == 0
    assert ttl_of(b"nonsense") == 0


def test_a_kept_answer_says_how_long_it_keeps_still() -> None:
    kept = aged(other(query().message, address(30), address(3)), 7)
    assert [each.ttl_s for each in decode(kept).answers] == [7, 3]


def test_a_response_has_the_question_as_it_was_asked() -> None:
    asked = query("wEb-aPP.ztna.local")
    response = tailored(other(query().message, address(30)), asked, 1232)
    assert response[:2] == asked.data[:2] and asked.question in response
    assert decode(response).answers == (address(30),)
    refused = decode(tailored(refusal(asked, Code.REFUSED), asked, None))
    assert (refused.code, refused.id) == (Code.REFUSED, 0x1234)


def test_what_does_not_fit_is_cut_to_nothing_and_said_so() -> None:
    many = other(query().message, *(address(30) for _ in range(100)))
    assert not decode(tailored(many, query(), None)).truncated
    cut = tailored(many, query(), 512)
    message = decode(cut)
    assert message.truncated and message.answers == () and len(cut) <= 512
    assert query().question in cut


def test_what_leads_out_of_the_mesh_is_left_out_of_an_answer() -> None:
    asked = query()
    good = [
        address(30),
        Record(NAME, Type.SRV, 1, 30, SrvData(0, 1, 80, "x.connector.ztna.local")),
        Record("ztna.local", Type.NS, 1, 30, HostData("ns.example.org")),
        Record(NAME, Type.TXT, 1, 30, (b"epoch=1",)),
    ]
    evil = [
        Record(NAME, Type.A, 1, 30, IPv4Address("203.0.113.66")),
        Record(NAME, Type.AAAA, 1, 30, IPv6Address("2001:db8::66")),
        Record(NAME, Type.CNAME, 1, 30, HostData("evil.example.org")),
        Record(NAME, Type.PTR, 1, 30, HostData("evilztna.local")),
        Record(NAME, Type.SRV, 1, 30, SrvData(0, 1, 80, "evil.example.org")),
    ]
    response = other(asked.message, *good, *evil, authority=(soa(30, 10), evil[0]), stale=True)
    message = decode(fitting(response, asked, ZONE, lambda each: str(each) == "10.100.0.2"))
    assert (message.answers, message.authority, message.stale) == (tuple(good), (soa(30, 10),), True)
    assert message.id == asked.message.id


def test_an_answer_to_another_question_is_none() -> None:
    for response in (
        query().data,
        other(query("db.ztna.local").message),
        other(query(kind=Type.TXT).message),
    ):
        with pytest.raises(ProtocolError, match="not an answer"):
            fitting(response, query(), ZONE, lambda each: True)


def test_an_answer_leads_to_the_addresses_in_it_whichever_family_they_are_told_in() -> None:
    beside = Record(NAME, Type.AAAA, 1, 30, IPv6Address("fd00::a64:3"))
    text = Record(NAME, Type.TXT, 1, 30, (b"epoch=1",))
    found = addresses_in(other(query().message, address(30), beside, text))
    assert found == {IPv4Address("10.100.0.2"), IPv4Address("10.100.0.3")}
    assert addresses_in(other(query().message)) == frozenset()
