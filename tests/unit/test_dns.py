"""ztna.dns: the guarded codec and the RFC 2782 choice."""

from __future__ import annotations

import random
import struct
from collections import Counter
from ipaddress import IPv4Address, IPv6Address

import dnslib
import pytest
from dnslib import QTYPE, RR, DNSRecord

from ztna.dns import (
    RECORDS_MAX,
    Code,
    Edns,
    HostData,
    Question,
    Record,
    SoaData,
    SrvData,
    Type,
    decode,
    encode_query,
    encode_response,
    order,
)
from ztna.errors import ProtocolError

HEADER = struct.Struct("!HHHHHH")


def message(
    questions: int = 0, answers: int = 0, authority: int = 0, additional: int = 0, body: bytes = b""
) -> bytes:
    return HEADER.pack(7, 0x8400, questions, answers, authority, additional) + body


def record(kind: int, data: bytes, *, name: bytes = b"\0", class_: int = 1, ttl: int = 5) -> bytes:
    return name + struct.pack("!HHIH", kind, class_, ttl, len(data)) + data


def test_a_query_reads_back_and_offers_its_size() -> None:
    query = decode(encode_query(0x1234, "Web-App.ztna.local", Type.SRV, 1232))
    assert query.id == 0x1234
    assert query.recursion_desired
    assert not query.is_response
    assert query.questions == (Question("web-app.ztna.local", Type.SRV, 1),)
    assert query.edns == Edns(1232, 0, 0, ())


def test_dnslib_agrees_with_our_query() -> None:
    parsed = DNSRecord.parse(encode_query(9, "a.b", Type.TXT, 4096))
    assert (str(parsed.q.qname), parsed.q.qtype, parsed.ar[0].edns_len) == ("a.b.", QTYPE.TXT, 4096)


@pytest.mark.parametrize("name", ["x" * 64 + ".local", ".".join(["abcdefgh"] * 40)])
def test_an_impossible_name_is_refused_when_asking(name: str) -> None:
    with pytest.raises(ProtocolError):
        encode_query(1, name, Type.A, 1232)


def test_each_type_of_data() -> None:
    reply = DNSRecord.question("web.ztna.local", "SRV").reply()
    for line in (
        "web.ztna.local 5 SRV 0 7 4435 C1.connector.ztna.local",
        "web.ztna.local 5 TXT one two",
        "c1.connector.ztna.local 5 A 192.0.2.1",
        "c1.connector.ztna.local 5 AAAA 2001:db8::1",
        "ztna.local 5 SOA ns.ztna.local hostmaster.ztna.local 1 2 3 4 5",
        "ztna.local 5 NS ns.ztna.local",
        "1.2.0.192.in-addr.arpa 5 PTR web.ztna.local",
        "x.ztna.local 5 CNAME web.ztna.local",
        "x.ztna.local 5 MX 10 web.ztna.local",
    ):
        reply.add_answer(*RR.fromZone(line))
    read = decode(reply.pack())
    assert read.is_response
    assert read.authoritative
    assert [answer.data for answer in read.answers] == [
        SrvData(0, 7, 4435, "c1.connector.ztna.local"),
        (b"one", b"two"),
        IPv4Address("192.0.2.1"),
        IPv6Address("2001:db8::1"),
        SoaData("ns.ztna.local", "hostmaster.ztna.local", 1, 2, 3, 4, 5),
        HostData("ns.ztna.local"),
        HostData("web.ztna.local"),
        HostData("web.ztna.local"),
        read.answers[-1].data,
    ]
    assert isinstance(read.answers[-1].data, bytes)


def test_a_dot_inside_a_label_never_reads_as_two_labels() -> None:
    read = decode(message(1, body=b"\x03a.b\x05loc\\l\0" + struct.pack("!HH", 1, 1)))
    assert read.questions[0].name == "a\\046b.loc\\092l"


def test_a_stale_mark_and_an_extended_code() -> None:
    ede = struct.pack("!HHH", 15, 2, 3)
    read = decode(message(additional=1, body=record(41, ede, class_=1232, ttl=0x01_00_8000)))
    assert read.stale
    assert read.code == Code.BADVERS
    assert read.edns == Edns(1232, 0, 0x8000, ((15, b"\x00\x03"),))
    assert not decode(message()).stale
    assert not decode(message(additional=1, body=record(41, struct.pack("!HHH", 15, 2, 22)))).stale


def test_records_of_another_class_or_empty_stay_bytes() -> None:
    read = decode(message(answers=2, body=record(1, b"xy", class_=3) + record(16, b"")))
    assert [answer.data for answer in read.answers] == [b"xy", b""]


def test_compression_is_followed_backwards() -> None:
    body = b"\x03web\x04ztna\0" + struct.pack("!HH", 1, 1) + record(1, b"\1\2\3\4", name=b"\x01x\xc0\x0c")
    assert decode(message(1, 1, body=body)).answers[0].name == "x.web.ztna"


HOSTILE = {
    "empty": b"",
    "header cut": bytes(11),
    "question cut": message(1),
    "question without type": message(1, body=b"\0\0"),
    "label cut": message(1, body=b"\x05ab"),
    "label of type 01": message(1, body=b"\x41" + bytes(80)),
    "name too long": message(1, body=(b"\x3f" + b"a" * 63) * 4 + b"\0" + bytes(4)),
    "pointer cut": message(1, body=b"\xc0"),
    "pointer to itself": message(1, body=b"\xc0\x0c\0\1\0\1"),
    "pointer forwards": message(1, body=b"\xc0\x20" + bytes(40)),
    "pointers in a circle": message(1, body=b"\x01a\xc0\x0c\0\1\0\1"),
    "a thousand pointers": message(
        1,
        body=b"\0"
        + bytes(4)
        + b"".join(struct.pack("!H", 0xC000 | max(12, 15 + 2 * n)) for n in range(1000)),
    ),
    "record cut": message(answers=1, body=b"\0\0\1"),
    "record data cut": message(answers=1, body=b"\0" + struct.pack("!HHIH", 1, 1, 5, 40) + b"abc"),
    "A of five bytes": message(answers=1, body=record(1, b"abcde")),
    "AAAA of four bytes": message(answers=1, body=record(28, b"abcd")),
    "SRV cut": message(answers=1, body=record(33, b"abcd")),
    "TXT running past": message(answers=1, body=record(16, b"\xffabcd")),
    "trailing bytes": message(body=b"x"),
    "too many records": message(answers=RECORDS_MAX + 1),
    "OPT with a name": message(additional=1, body=record(41, b"", name=b"\1x\0")),
    "OPT among the answers": message(answers=1, body=record(41, b"")),
    "OPT in the authority": message(authority=1, body=record(41, b"")),
    "two OPTs": message(additional=2, body=record(41, b"") * 2),
    "option cut": message(additional=1, body=record(41, b"\0\1\0")),
    "option past its end": message(additional=1, body=record(41, b"\0\1\0\5ab")),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_a_chain_of_pointers_is_cut_short() -> None:
    """Legal backward pointers, each to the one before: dnslib alone would recurse for each."""
    offset = 12 + 11
    chain = b"\0" + b"".join(
        struct.pack("!H", 0xC000 | (offset if n == 0 else offset + 1 + 2 * (n - 1))) for n in range(1500)
    )
    body = (
        record(0xFFFE, chain)
        + struct.pack("!H", 0xC000 | (offset + 1 + 2 * 1499))
        + struct.pack("!HHIH", 1, 1, 5, 4)
    )
    with pytest.raises(ProtocolError, match="pointer"):
        decode(message(answers=2, body=body + b"\1\2\3\4"))
    with pytest.raises((RecursionError, dnslib.DNSError)):
        DNSRecord.parse(message(answers=2, body=body + b"\1\2\3\4"))


def test_priorities_come_in_order() -> None:
    records = [SrvData(2, 1, 1, "c"), SrvData(0, 1, 1, "a"), SrvData(1, 1, 1, "b")]
    assert [record.target for record in order(records, lambda n: 0)] == ["a", "b", "c"]


def test_weights_decide_within_a_priority() -> None:
    dice = random.Random(20)
    records = [SrvData(0, 90, 1, "heavy"), SrvData(0, 10, 1, "light")]
    first = Counter(order(records, dice.randrange)[0].target for _ in range(4000))
    assert 3400 < first["heavy"] < 3750


def test_weight_zero_is_rarely_first_and_always_there() -> None:
    dice = random.Random(21)
    records = [SrvData(0, 99, 1, "heavy"), SrvData(0, 0, 1, "zero")]
    firsts = Counter(order(records, dice.randrange)[0].target for _ in range(4000))
    assert 5 < firsts["zero"] < 120
    assert len(order(records, lambda n: n - 1)) == 2


def test_only_zero_weights_are_all_returned_and_nothing_of_nothing() -> None:
    records = [SrvData(0, 0, port, "x") for port in (1, 2, 3)]
    assert sorted(order(records, lambda n: 0)) == records
    assert list(order([], lambda n: 0)) == []


def test_a_response_has_the_records_that_can_stand_in_it() -> None:
    query = decode(encode_query(0x1234, "web-app.ztna.local", Type.A, 1232))
    name = "web-app.ztna.local"
    soa = SoaData("ns.ztna.local", "host.ztna.local", 7, 1, 2, 3, 4)
    records = [
        Record(name, Type.A, 1, 30, IPv4Address("10.100.0.2")),
        Record(name, Type.AAAA, 1, 30, IPv6Address("fd00::1")),
        Record(name, Type.SRV, 1, 30, SrvData(0, 1, 80, name)),
        Record(name, Type.PTR, 1, 30, HostData(name)),
        Record(name, Type.TXT, 1, 30, (b"epoch=1", b"")),
    ]
    strange = [Record(name, 99, 1, 30, b"x")]
    authority = (Record("ztna.local", Type.SOA, 1, 30, soa),)
    message = decode(encode_response(query, Code.NXDOMAIN, [*records, *strange], authority, stale=True))
    assert (message.id, message.is_response, message.code) == (0x1234, True, Code.NXDOMAIN)
    assert (message.answers, message.authority) == (tuple(records), authority)
    assert message.questions == query.questions and message.stale
    assert decode(encode_response(query, Code.BADVERS)).code == Code.BADVERS
    plain = encode_query(1, name, Type.A, 1232)
    without = decode(plain[:10] + bytes(2) + plain[12:-11])
    assert decode(encode_response(without, Code.NOERROR, stale=True)).edns is None


@pytest.mark.parametrize(
    "label", [b".", b"..", b"a.b", b"\\", b"\\046", b"xn--\xff", b"\xff" * 63, b"\0" * 63]
)
def test_every_name_that_was_read_can_be_said_again(label: bytes) -> None:
    name = bytes((len(label),)) + label + b"\x05local\0"
    query = decode(message(1, body=name + struct.pack("!HH", Type.PTR, 1)))
    said = query.questions[0].name
    records = tuple(
        Record(said, kind, 1, 30, data)
        for kind, data in (
            (Type.PTR, HostData(said)),
            (Type.SRV, SrvData(1, 2, 3, said)),
            (Type.SOA, SoaData(said, said, 1, 2, 3, 4, 5)),
        )
    )
    response = encode_response(query, Code.NOERROR, records)
    assert response[12:].startswith(name)
    assert (decode(response).questions, decode(response).answers) == (query.questions, records)


def test_what_no_message_can_hold_is_a_protocol_error() -> None:
    query = decode(encode_query(1, "web-app.ztna.local", Type.TXT, 1232))
    for name in ("x" * 64, ".".join(["x" * 60] * 5)):
        with pytest.raises(ProtocolError, match="no DNS message"):
            encode_response(query, Code.NOERROR, [Record(name, Type.TXT, 1, 30, (b"",))])


def test_a_name_with_an_empty_label_is_no_name() -> None:
    with pytest.raises(ProtocolError, match="empty label"):
        encode_query(1, "a..b", Type.A, 1232)
