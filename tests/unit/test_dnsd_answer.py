"""dnsd.answer: bytes in, bytes out, judged by dnslib."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Network

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from msgspec.structs import replace

import dnsd.answer
from dnsd.answer import (
    EDE_NO_REACHABLE_AUTHORITY,
    EDE_NOT_READY,
    EDE_PROHIBITED,
    FORWARD,
    Answers,
    Options,
    failed,
    prohibited,
)
from dnsd.cookies import is_valid
from dnsd.query import read
from dnsd.zone import SRV_RECORDS_MAX, Settings, rebuilt
from tests.support.dns import SETTINGS, ask, catalog, instance, lease, query, told, with_opt, zone
from ztna.dns import Code, Type, decode, encode_query
from ztna.errors import ProtocolError

SERVICES = catalog(instance("web", "c1"), instance("web", "c2", address="192.0.2.2"), instance("db"))
LEASES = {"web": lease("10.100.1.2", epoch=42)}


@pytest.fixture
def answers() -> Answers:
    return Answers(zone(SERVICES, LEASES), confirmed_at=1_700_000_000.7)


# What is told


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("web.ztna.local", "A", ["A 10.100.1.2"]),
        ("web.ztna.local", "TXT", ['TXT "ports=tcp:8080","epoch=42"']),
        ("web.ztna.local", "ANY", ["HINFO \\# 9 0752464338343832" + "00"]),
        ("_web._tcp.ztna.local", "SRV", ["SRV 0 1 8080 web.ztna.local."]),
        ("c2.connector.ztna.local", "A", ["A 192.0.2.2"]),
        ("2.1.100.10.in-addr.arpa", "PTR", ["PTR web.ztna.local."]),
        ("_fresh.ztna.local", "TXT", ['TXT "1700000000"']),
        ("ztna.local", "NS", ["NS ns.ztna.local."]),
        ("ztna.local", "SOA", ["SOA ns.ztna.local. hostmaster.ztna.local. 7 60 10 86400 10"]),
    ],
)
def test_answers_are_authoritative_and_right(
    answers: Answers, name: str, kind: str, expected: list[str]
) -> None:
    for over_tcp in (False, True):
        record = ask(answers, query(name, kind), over_tcp=over_tcp)
        assert told(record) == expected
        assert (record.header.id, record.header.qr, record.header.aa, record.header.tc) == (0x1234, 1, 1, 0)
        assert (record.header.rd, record.header.ra, record.header.rcode) == (1, 0, RCODE.NOERROR)
        assert str(record.q.qname) == f"{name}."


def test_srv_records_bring_the_addresses_of_their_targets(answers: Answers) -> None:
    record = ask(answers, query("web.ztna.local", "SRV"))
    assert sorted(told(record)) == [
        "SRV 0 1 4435 c1.connector.ztna.local.",
        "SRV 0 1 4435 c2.connector.ztna.local.",
    ]
    assert {(str(rr.rname), str(rr.rdata)) for rr in record.ar} == {
        ("c1.connector.ztna.local.", "192.0.2.1"),
        ("c2.connector.ztna.local.", "192.0.2.2"),
    }


def test_our_own_decoder_agrees(answers: Answers) -> None:
    answer = answers.answer(encode_query(7, "web.ztna.local", Type.SRV, 1232))
    assert answer is not None
    message = decode(answer)
    assert [record.data for record in message.additional] == [
        IPv4Address("192.0.2.1"),
        IPv4Address("192.0.2.2"),
    ]
    assert message.edns is not None
    assert not message.stale


@pytest.mark.parametrize(
    ("name", "kind", "code", "owner"),
    [
        ("nobody.ztna.local", "A", RCODE.NXDOMAIN, "ztna.local."),
        ("web.ztna.local", "AAAA", RCODE.NOERROR, "ztna.local."),
        ("ztna.local", "A", RCODE.NOERROR, "ztna.local."),
        ("9.9.100.10.in-addr.arpa", "PTR", RCODE.NXDOMAIN, "100.10.in-addr.arpa."),
    ],
)
def test_negative_answers_carry_the_soa(
    answers: Answers, name: str, kind: str, code: int, owner: str
) -> None:
    record = ask(answers, query(name, kind))
    (soa,) = record.auth
    assert (record.header.rcode, record.header.aa, record.rr) == (code, 1, [])
    assert (str(soa.rname), soa.rtype, soa.ttl) == (owner, QTYPE.SOA, 10)


@pytest.mark.parametrize(
    ("name", "kind"), [("example.com", "A"), ("local", "NS"), ("web.ztna.local", "AXFR"), ("", "NS")]
)
def test_what_is_not_ours_is_refused(answers: Answers, name: str, kind: str) -> None:
    record = ask(answers, query(name, kind))
    assert (record.header.rcode, record.header.aa, record.rr, record.auth) == (RCODE.REFUSED, 0, [], [])
    assert answers.refused == 1


def test_another_class_is_refused(answers: Answers) -> None:
    chaos = query("version.bind", "TXT")[:-1] + b"\x03"
    assert ask(answers, chaos).header.rcode == RCODE.REFUSED


def test_case_is_echoed_and_does_not_matter(answers: Answers) -> None:
    answer = answers.answer(query("WeB.zTNA.locaL"))
    assert answer is not None
    assert b"\x03WeB\x04zTNA\x05locaL\x00" in answer
    assert told(DNSRecord.parse(answer)) == ["A 10.100.1.2"]
    assert answers.ready == {}


def test_labels_of_any_bytes_are_only_not_found(answers: Answers) -> None:
    for label in (b"a.b", b"\xff\xfe", b"\0", b"web\0"):
        question = bytes((len(label),)) + label + b"\x04ztna\x05local\0" + b"\0\1\0\1"
        assert answers.answer(query("x")[:12] + question)[3] & 15 == RCODE.NXDOMAIN  # type: ignore[index]


def test_ipv6_addresses_come_with_their_own_type() -> None:
    dual = Answers(zone(SERVICES, LEASES, replace(SETTINGS, ula=IPv6Network("fd12:3456:789a::/96"))))
    assert told(ask(dual, query("web.ztna.local", "AAAA"))) == ["AAAA fd12:3456:789a::a64:102"]
    record = ask(dual, query("_web._tcp.ztna.local", "SRV"))
    assert [(QTYPE[rr.rtype], str(rr.rdata)) for rr in record.ar] == [
        ("A", "10.100.1.2"),
        ("AAAA", "fd12:3456:789a::a64:102"),
    ]


# The same question again


def test_the_same_query_is_answered_from_the_table_with_its_own_id(answers: Answers) -> None:
    first = ask(answers, query("web.ztna.local", message_id=1))
    assert len(answers.ready) == 1
    second = answers.answer(query("web.ztna.local", message_id=2))
    assert second is not None
    assert (first.header.id, second[:2]) == (1, b"\0\2")
    assert told(DNSRecord.parse(second)) == ["A 10.100.1.2"]


def test_only_what_lasts_is_kept(answers: Answers) -> None:
    for name, kind in (
        ("nobody.ztna.local", "A"),
        ("_fresh.ztna.local", "TXT"),
        ("example.com", "A"),
    ):
        ask(answers, query(name, kind))
    ask(answers, with_opt(query("web.ztna.local"), options=b"\0\x0a\0\x08abcdefgh"))
    ask(answers, query("web.ztna.local"), over_tcp=True)
    assert answers.ready == {}
    for name, kind in (("web.ztna.local", "A"), ("web.ztna.local", "AAAA"), ("web.ztna.local", "ANY")):
        ask(answers, query(name, kind))
    assert len(answers.ready) == 3


def test_the_table_is_bounded(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.answer, "READY_ANSWERS_MAX", 2)
    for kind in ("A", "AAAA", "TXT"):
        ask(answers, query("web.ztna.local", kind))
    assert len(answers.ready) == 1


def test_freshness_moves_without_a_new_zone(answers: Answers) -> None:
    answers.confirmed_at = 1_800_000_000.2
    assert told(ask(answers, query("_fresh.ztna.local", "TXT"))) == ['TXT "1800000000"']


# EDNS


def test_edns_is_answered_with_edns_and_do_is_echoed(answers: Answers) -> None:
    answer = decode(answers.answer(with_opt(query("web.ztna.local"), flags=0x8000)) or b"")
    assert answer.edns is not None
    assert (answer.edns.udp_payload, answer.edns.version, answer.edns.flags) == (1232, 0, 0x8000)
    assert decode(answers.answer(query("web.ztna.local")) or b"").edns is None


def test_an_unknown_version_is_badvers(answers: Answers) -> None:
    answer = decode(answers.answer(with_opt(query("web.ztna.local"), version=1)) or b"")
    assert (answer.code, answer.answers) == (Code.BADVERS, ())


COOKIE = struct.pack("!HH8s", 10, 8, b"clientck")
CLIENT = bytes((192, 0, 2, 9))


def plain_options(**chosen: object) -> Answers:
    """Answers of an operator who has chosen something."""
    options = Options(**chosen)  # type: ignore[arg-type]
    return Answers(zone(SERVICES, LEASES), options=options, now=1_700_000_000.5)


def edns_options(data: bytes | None) -> dict[int, bytes]:
    message = decode(data or b"")
    assert message.edns is not None
    return dict(message.edns.options)


def test_a_cookie_is_answered_with_ours_which_is_known_again() -> None:
    answers = plain_options(secret=b"s" * 32)
    asked = with_opt(query("web.ztna.local"), options=COOKIE)
    first = edns_options(answers.answer(asked, source=CLIENT))[10]
    assert is_valid(b"s" * 32, first, CLIENT, 1_700_000_000)
    bare = with_opt(asked[:4] + bytes(8), options=COOKIE)
    answer = answers.answer(bare, source=CLIENT)
    assert edns_options(answer)[10] == first
    message = decode(answer or b"")
    assert (message.code, message.questions) == (Code.NOERROR, ())
    assert 10 not in edns_options(plain_options().answer(asked, source=CLIENT))


def test_a_cookie_does_not_make_a_known_question_dear() -> None:
    answers = plain_options(secret=b"s" * 32)
    plain = with_opt(query("web.ztna.local"))
    asked = with_opt(query("web.ztna.local", message_id=5), options=COOKIE)
    slowly = answers.answer(asked, source=CLIENT)
    assert len(answers.ready) == 1
    assert answers.answer(asked, source=CLIENT) == slowly
    ours = edns_options(slowly)[10]
    whole = with_opt(query("web.ztna.local", message_id=5), options=struct.pack("!HH", 10, len(ours)) + ours)
    assert answers.answer(whole, source=CLIENT) == slowly
    assert answers.answer(whole, source=bytes(4)) != slowly
    answers.zone = None
    assert answers.answer(asked, source=CLIENT) == slowly
    assert edns_options(answers.answer(plain)) == {}
    assert told(ask(answers, plain)) == ["A 10.100.1.2"]


def test_a_cookie_stays_within_what_the_asker_takes_and_beside_other_options() -> None:
    services = catalog(*(instance("web", f"connector-{n}") for n in range(9)))
    answers = Answers(zone(services, {}), options=Options(secret=b"s" * 32))
    asked = with_opt(query("web.ztna.local", "SRV"), size=512, options=COOKIE)
    for _ in range(2):
        answer = answers.answer(asked, source=CLIENT)
        assert answer is not None
        assert len(answer) <= 512
        assert list(edns_options(answer)) == [10]
    stale = Answers(zone(SERVICES, LEASES), is_stale=True, options=Options(secret=b"s" * 32))
    for _ in range(2):
        assert set(edns_options(stale.answer(with_opt(query("web.ztna.local"), options=COOKIE)))) == {10, 15}
    both = with_opt(query("web.ztna.local"), options=b"\0\x03\0\0" + COOKIE)
    without = len(stale.ready)
    stale.answer(both)
    assert len(stale.ready) == without


def test_nsid_and_keepalive_are_told_to_who_asks() -> None:
    asked = with_opt(query("web.ztna.local"), options=b"\0\x03\0\0\0\x0b\0\0")
    answers = plain_options(nsid=b"dns-1")
    assert edns_options(answers.answer(asked)) == {3: b"dns-1"}
    assert edns_options(answers.answer(asked, over_tcp=True)) == {3: b"dns-1", 11: b"\0\x64"}
    assert edns_options(answers.answer(with_opt(query("web.ztna.local")))) == {}
    assert edns_options(plain_options().answer(asked)) == {}


def chaos(name: str, kind: str = "TXT") -> bytes:
    return query(name, kind)[:-1] + b"\x03"


def test_the_server_tells_of_itself_only_when_it_shall() -> None:
    shall = plain_options(version=b"ztna-dnsd 1", nsid=b"dns-1")
    assert told(ask(shall, chaos("version.bind"))) == ['TXT "ztna-dnsd 1"']
    assert told(ask(shall, chaos("VERSION.server", "ANY"))) == ['TXT "ztna-dnsd 1"']
    assert told(ask(shall, chaos("id.server"))) == ['TXT "dns-1"']
    refused = [ask(shall, chaos("version.bind", "A")), ask(shall, chaos("web.ztna.local"))]
    refused += [ask(plain_options(), chaos(name)) for name in ("version.bind", "hostname.bind")]
    assert {record.header.rcode for record in refused} == {RCODE.REFUSED}


def test_who_had_too_many_answers_hears_little_unless_its_cookie_is_ours() -> None:
    answers = plain_options(secret=b"s" * 32)
    asked = query("web.ztna.local", "SRV")
    slip = answers.limited(asked, CLIENT, slips=True)
    assert slip is not None
    assert (len(slip), slip[2] & 0x02, slip[3] & 15) == (len(asked), 0x02, 0)
    assert answers.limited(asked, CLIENT, slips=False) is None
    bad = answers.limited(with_opt(asked, options=COOKIE), CLIENT, slips=False)
    assert decode(bad or b"").code == Code.BADCOOKIE
    ours = edns_options(bad)[10]
    known = with_opt(asked, options=struct.pack("!HH", 10, len(ours)) + ours)
    assert len(decode(answers.limited(known, CLIENT, slips=False) or b"").answers) == 2
    assert decode(answers.limited(known, bytes(4), slips=False) or b"").code == Code.BADCOOKIE
    for junk in (asked[:-1], b"", asked[:2] + b"\x80" + asked[3:]):
        assert answers.limited(junk, CLIENT, slips=False) is None
    assert answers.limited(asked[:-1], CLIENT, slips=True) == answers.answer(asked[:-1])
    assert plain_options().limited(with_opt(asked, options=COOKIE), CLIENT, slips=False) is None


def test_what_is_not_ours_is_for_the_upstreams_when_there_are_some() -> None:
    here = zone(SERVICES, LEASES)
    forwarding = Options(forwards=True, bounds=here)
    for answers in (Answers(here, options=forwarding), Answers(None, options=forwarding)):
        assert answers.answer(query("example.com")) == FORWARD
        assert answers.answer(query("")) == FORWARD
        not_desired = query("example.com")
        not_desired = not_desired[:2] + b"\0" + not_desired[3:]
        for kept in (not_desired, query("example.com", "AXFR"), chaos("example.com")):
            answer = answers.answer(kept)
            assert answer is not None
            assert answer[3] & 15 in (RCODE.REFUSED, RCODE.SERVFAIL)
    assert ask(Answers(here, options=forwarding), query("web.ztna.local")).header.ra == 1
    unserved = Answers(None, options=forwarding).answer(query("web.ztna.local"))
    assert unserved is not None
    assert unserved[3] & 15 == RCODE.SERVFAIL


def test_a_question_that_no_upstream_answered_failed() -> None:
    answer = failed(read(with_opt(query("example.com"))))
    assert (decode(answer).code, edns_options(answer)) == (Code.SERVFAIL, {15: b"\0\x16"})


def test_stale_answers_are_soon_forgotten() -> None:
    lasting = Settings(SETTINGS.domain, SETTINGS.pool, 300, 300)
    answers = Answers(zone(SERVICES, LEASES, lasting), is_stale=True)
    record = ask(answers, query("web.ztna.local", "SRV"))
    assert {rr.ttl for rr in (*record.rr, *record.ar)} == {5}
    assert ask(answers, query("nobody.ztna.local")).auth[0].ttl == 5
    fresh = Answers(zone(SERVICES, LEASES, lasting))
    assert ask(fresh, query("web.ztna.local")).rr[0].ttl == 300


def test_names_that_are_too_old_are_not_served_and_why() -> None:
    answers = Answers(None, why_not=EDE_NO_REACHABLE_AUTHORITY)
    answer = answers.answer(encode_query(1, "web.ztna.local", Type.A, 1232))
    assert decode(answer or b"").code == Code.SERVFAIL
    assert edns_options(answer) == {15: b"\0\x16"}


def test_other_additional_records_are_passed_over(answers: Answers) -> None:
    data = query("web.ztna.local")
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes(4)
    named = b"\x01x\0" + struct.pack("!HHIH", 16, 1, 0, 0)
    data = data[:10] + b"\0\2" + data[12:] + record + named
    assert told(ask(answers, with_opt(data))) == ["A 10.100.1.2"]


def test_stale_answers_say_so_to_who_can_read_it() -> None:
    answers = Answers(zone(SERVICES, LEASES), is_stale=True)
    for name, kind in (
        ("web.ztna.local", Type.A),
        ("web.ztna.local", Type.AAAA),
        ("nobody.ztna.local", Type.A),
        ("_fresh.ztna.local", Type.TXT),
    ):
        assert decode(answers.answer(encode_query(1, name, kind, 1232)) or b"").stale
    assert told(ask(answers, query("web.ztna.local"))) == ["A 10.100.1.2"]


def test_before_the_first_zone_everything_fails_as_not_ready() -> None:
    answer = decode(Answers(None).answer(encode_query(1, "web.ztna.local", Type.A, 1232)) or b"")
    assert answer.code == Code.SERVFAIL
    assert answer.edns is not None
    assert answer.edns.options == ((15, struct.pack("!H", EDE_NOT_READY)),)


# Sizes


def many() -> Answers:
    """A service with far more connectors than a datagram holds."""
    return Answers(
        zone(catalog(*(instance("web", f"c{n}", address=f"192.0.2.{n % 250}") for n in range(600))), {})
    )


@pytest.mark.parametrize(
    ("size", "limit"), [(None, 512), (100, 512), (900, 900), (1232, 1232), (65535, 1232)]
)
def test_what_is_too_large_for_udp_is_truncated_whole(size: int | None, limit: int) -> None:
    data = query("web.ztna.local", "SRV")
    answer = many().answer(data if size is None else with_opt(data, size=size))
    assert answer is not None
    assert len(answer) <= limit
    record = DNSRecord.parse(answer)
    assert (record.header.tc, record.rr, str(record.q.qname)) == (1, [], "web.ztna.local.")


def test_over_tcp_all_records_come_with_as_many_addresses_as_fit() -> None:
    record = ask(many(), query("web.ztna.local", "SRV"), over_tcp=True)
    assert (record.header.tc, len(record.rr)) == (0, SRV_RECORDS_MAX)
    assert len(record.ar) == SRV_RECORDS_MAX
    assert {str(rr.rname) for rr in record.ar} == {str(rr.rdata.target) for rr in record.rr}


def test_addresses_are_left_out_before_anything_is_truncated() -> None:
    nine = Answers(zone(catalog(*(instance("web", f"c{n}") for n in range(9))), {}))
    record = ask(nine, query("web.ztna.local", "SRV"))
    assert (record.header.tc, len(record.rr)) == (0, 9)
    assert 0 < len(record.ar) < 9


def test_a_connector_with_two_addresses_brings_both() -> None:
    both = catalog(instance("web", "c1"), instance("db", "c1", address="192.0.2.9"))
    record = ask(Answers(zone(both, {})), query("web.ztna.local", "SRV"))
    assert [str(rr.rdata) for rr in record.ar] == ["192.0.2.1", "192.0.2.9"]
    assert record.header.ar == 2


# Hostile


@pytest.mark.parametrize(
    "data", [b"", b"\x12\x34", bytes(11), query("web.ztna.local")[:2] + b"\x80" + bytes(30)]
)
def test_what_deserves_no_answer_gets_none(answers: Answers, data: bytes) -> None:
    assert answers.answer(data) is None
    assert prohibited(data) is None
    assert answers.malformed == 1


GOOD = query("web.ztna.local")
MALFORMED = {
    "no question": GOOD[:4] + bytes(8),
    "two questions": GOOD[:4] + b"\0\2" + GOOD[6:],
    "an answer inside": GOOD[:6] + b"\0\1" + GOOD[8:],
    "authority inside": GOOD[:8] + b"\0\1" + GOOD[10:],
    "too many additional": GOOD[:10] + b"\0\x09" + GOOD[12:],
    "name cut": GOOD[:14],
    "name without end": GOOD[:12] + b"\x03web",
    "type cut": GOOD[:-3],
    "compressed question": GOOD[:12] + b"\xc0\x0c\0\1\0\1",
    "label of type 01": GOOD[:12] + b"\x41" + bytes(80),
    "name too long": GOOD[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
    "trailing bytes": GOOD + b"x",
    "additional missing": GOOD[:10] + b"\0\1" + GOOD[12:],
    "additional name cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\x05ab",
    "additional head cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\0\0\1",
    "additional data cut": GOOD[:10] + b"\0\1" + GOOD[12:] + b"\0" + struct.pack("!HHIH", 1, 1, 0, 9),
    "two OPTs": with_opt(with_opt(GOOD)),
    "OPT with a name": with_opt(GOOD, name=b"\x01x\0"),
    "option cut": with_opt(GOOD, options=b"\0\1\0"),
    "option past its end": with_opt(GOOD, options=b"\0\1\0\5ab"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_queries_are_formerr(answers: Answers, data: bytes) -> None:
    for answer in (answers.answer(data), prohibited(data)):
        assert answer is not None
        assert (answer[:2], answer[3] & 15, len(answer)) == (data[:2], RCODE.FORMERR, 12)
    assert answers.malformed == 1


def test_other_opcodes_are_not_implemented(answers: Answers) -> None:
    notify = GOOD[:2] + bytes([GOOD[2] | 4 << 3]) + GOOD[3:]
    answer = answers.answer(notify)
    assert answer is not None
    assert answer[3] & 15 == RCODE.NOTIMP
    assert answer[2] & 0x78 == 4 << 3


def test_strangers_are_refused_with_the_reason() -> None:
    answer = decode(prohibited(encode_query(5, "web.ztna.local", Type.A, 1232)) or b"")
    assert (answer.id, answer.code, answer.answers) == (5, Code.REFUSED, ())
    assert answer.edns is not None
    assert answer.edns.options == ((15, struct.pack("!H", EDE_PROHIBITED)),)


def test_data_that_no_zone_holds_is_a_bug_that_is_seen() -> None:
    with pytest.raises(TypeError):
        dnsd.answer.pack_data(b"raw")
    with pytest.raises(ProtocolError):
        decode(b"")


# What is kept over a change


MANY = 1000
MANY_SERVICES = catalog(*(instance(f"s{number}", f"c{number % 2}") for number in range(MANY)))
MANY_LEASES = {f"s{number}": lease(f"10.100.{number // 250}.{number % 250 + 1}") for number in range(MANY)}


def asked_for_all(answers: Answers) -> dict[bytes, bytes]:
    """Ask for A and SRV of every service; return the ready answers."""
    for number in range(MANY):
        for kind in ("A", "SRV"):
            ask(answers, query(f"s{number}.ztna.local", kind))
    return dict(answers.ready)


def test_one_changed_service_of_many_is_put_together_anew_and_no_other() -> None:
    first = Answers(zone(MANY_SERVICES, MANY_LEASES))
    ready = asked_for_all(first)
    ask(first, query("ztna.local", "SOA"))
    assert len(first.ready) == 2 * MANY + 1
    assert first.zone is not None
    after = rebuilt(first.zone, MANY_SERVICES, {**MANY_LEASES, "s7": lease("10.100.99.99")}, 9e8)
    second = Answers(after)
    second.take_over(first)
    assert len(second.ready) == 2 * MANY - 2
    assert all(second.ready[asked] is answer for asked, answer in ready.items() if asked in second.ready)
    assert told(ask(second, query("s7.ztna.local"))) == ["A 10.100.99.99"]
    assert told(ask(second, query("ztna.local", "SOA")))[0].split()[3] == str(after.serial)


def test_what_a_moved_connector_serves_is_put_together_anew() -> None:
    first = Answers(zone(MANY_SERVICES, MANY_LEASES))
    asked_for_all(first)
    moved = {**MANY_SERVICES, **catalog(instance("s0", "c0", address="192.0.2.9"))}
    assert first.zone is not None
    second = Answers(rebuilt(first.zone, moved, MANY_LEASES, 9e8))
    second.take_over(first)
    assert len(second.ready) == MANY
    added = ask(second, query("s2.ztna.local", "SRV")).ar
    assert sorted(str(record.rdata) for record in added) == ["192.0.2.1", "192.0.2.9"]


def test_nothing_is_kept_from_another_state_or_another_look(answers: Answers) -> None:
    ask(answers, query("web.ztna.local"))
    here = answers.zone
    assert here is not None
    after = rebuilt(here, SERVICES, {}, 9e8)
    later = rebuilt(after, SERVICES, LEASES, 9e8)
    others = [Answers(None), Answers(later), Answers(zone({}, {})), Answers(after, is_stale=True)]
    for other in others:
        other.take_over(answers)
        assert other.ready == {}
    after_none = Answers(after)
    after_none.take_over(Answers(None))
    assert after_none.ready == {}
