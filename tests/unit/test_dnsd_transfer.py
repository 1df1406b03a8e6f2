"""dnsd.transfer: whole zones, changes since a serial, and what is refused; dnslib judges the records."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import msgspec
import pytest
from dnslib import DNSRecord

import dnsd.transfer
from dnsd.transfer import Publication, Request
from dnsd.zone import RelayHost, ZoneData
from tests.support.dns import SETTINGS, catalog, instance, lease, query
from ztna.dns import Code, HostData, Record, SoaData, Type, decode
from ztna.errors import ProtocolError
from ztna.leases import Lease

APEX = ("ztna", "local")
REVERSE = ("100", "10", "in-addr", "arpa")
FRESH = 1_700_000_000

Records = set[tuple[str, int, int, object]]


def state(serial: int, leases: Mapping[str, Lease], *connectors: str, fresh_at: int = FRESH) -> ZoneData:
    """A zone with these leases; each connector serves the service `web` from an address of its own."""
    services = catalog(
        *(instance("web", name, address=f"192.0.2.{number}") for number, name in enumerate(connectors, 1))
    )
    return ZoneData(SETTINGS, services, leases, serial, fresh_at)


def ask(apex: tuple[str, ...], serial: int | None = None) -> Request:
    """The request as it is read of a real query."""
    data = query(".".join(apex), "AXFR" if serial is None else "IXFR")
    if serial is not None:
        times = struct.pack("!IIIII", serial, 0, 0, 0, 0)
        soa = b"\xc0\x0c" + struct.pack("!HHIH", 6, 1, 0, 2 + len(times)) + b"\0\0" + times
        data = data[:8] + b"\0\1" + data[10:] + soa
    assert dnsd.transfer.may_be(data)
    request = dnsd.transfer.read(data)
    assert request is not None and request.serial == serial and request.apex == apex
    return request


def transferred(publication: Publication, request: Request, *, over_tcp: bool = True) -> list[Record]:
    """All records of the answer, in order; each message is whole by itself."""
    messages = publication.answer(request, over_tcp=over_tcp)
    assert not isinstance(messages, Code)
    found: list[Record] = []
    for data in messages:
        message = decode(data)
        DNSRecord.parse(data)
        assert message.authoritative and message.id == request.id and not message.code
        found += message.answers
    return found


def content(records: list[Record]) -> Records:
    """What a secondary keeps of a whole zone: all but the SOA records around it."""
    first, *inside, last = records
    assert first == last and isinstance(first.data, SoaData)
    return {(each.name, each.type, each.ttl_s, each.data) for each in inside}


def applied(before: Records, records: list[Record]) -> Records:
    """What a secondary keeps after an incremental answer (RFC 1995 4)."""
    kept = set(before)
    deleting = False
    for each in records[1:-1]:
        if isinstance(each.data, SoaData):
            deleting = not deleting
            continue
        item = (each.name, each.type, each.ttl_s, each.data)
        if deleting:
            kept.remove(item)
        else:
            assert item not in kept
            kept.add(item)
    return kept


def test_a_whole_zone_says_what_dnsd_answers() -> None:
    publication = Publication()
    assert publication.publish(state(7, {"web": lease("10.100.1.2")}, "c1")) == (APEX, REVERSE)
    records = transferred(publication, ask(APEX))
    assert records[0].type == Type.SOA and records[1].type == Type.NS
    told = {(each.name, Type(each.type).name) for each in records}
    assert told == {
        ("ztna.local", "SOA"),
        ("ztna.local", "NS"),
        ("_fresh.ztna.local", "TXT"),
        ("web.ztna.local", "A"),
        ("web.ztna.local", "SRV"),
        ("web.ztna.local", "TXT"),
        ("_web._tcp.ztna.local", "SRV"),
        ("c1.connector.ztna.local", "A"),
        ("ns.ztna.local", "A"),
        ("_services._dns-sd._udp.ztna.local", "PTR"),
    } | {(name, kind) for name, kind in told if "_" in name and kind in ("PTR", "TXT", "SRV")}
    assert ("_fresh.ztna.local", 16, 1, (str(FRESH).encode(),)) in content(records)
    reverse = transferred(publication, ask(REVERSE))
    assert [(each.name, Type(each.type).name) for each in reverse[1:-1]] == [
        ("100.10.in-addr.arpa", "NS"),
        ("2.1.100.10.in-addr.arpa", "PTR"),
    ]


def test_changes_since_a_serial_lead_to_the_whole_zone() -> None:
    choose = random.Random(4)
    publication = Publication()
    kept: dict[int, dict[tuple[str, ...], Records]] = {}
    for serial in range(1, 30):
        leases = {
            f"s{n}": lease(f"10.100.0.{choose.randrange(1, 250)}") for n in range(12) if choose.random() < 0.6
        }
        connectors = [f"c{n}" for n in range(4) if choose.random() < 0.5]
        publication.publish(state(serial, leases, *connectors, fresh_at=FRESH + serial // 4))
        kept[serial] = {apex: content(transferred(publication, ask(apex))) for apex in (APEX, REVERSE)}
    for serial in range(1, 29):
        for apex in (APEX, REVERSE):
            records = transferred(publication, ask(apex, serial))
            assert applied(kept[serial][apex], records) == kept[29][apex], (serial, apex)


def test_a_zone_without_changes_has_two_serials_and_nothing_between() -> None:
    publication = Publication()
    publication.publish(state(1, {"web": lease("10.100.1.2")}))
    assert publication.publish(state(2, {"web": lease("10.100.1.2")}, fresh_at=FRESH + 60)) == (APEX,)
    records = transferred(publication, ask(REVERSE, 1))
    assert [each.data.serial for each in records if isinstance(each.data, SoaData)] == [2, 1, 2, 2]
    assert len(records) == 4


@pytest.mark.parametrize(("serial", "over_tcp"), [(7, True), (8, True), (1, False)])
def test_who_is_up_to_date_or_asks_over_udp_gets_the_soa(serial: int, over_tcp: bool) -> None:
    publication = Publication()
    publication.publish(state(7, {}))
    (record,) = transferred(publication, ask(APEX, serial), over_tcp=over_tcp)
    assert isinstance(record.data, SoaData) and record.data.serial == 7


def test_who_is_too_far_behind_gets_the_whole_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.transfer, "CHANGES_KEPT_MAX", 2)
    publication = Publication()
    for serial in range(1, 6):
        publication.publish(state(serial, {f"s{serial}": lease("10.100.1.2")}))
    whole = transferred(publication, ask(APEX))
    assert transferred(publication, ask(APEX, 2)) == whole
    assert transferred(publication, ask(APEX, 3)) != whole
    monkeypatch.setattr(dnsd.transfer, "RECORDS_KEPT_MAX", 1)
    publication.publish(state(6, {}))
    assert transferred(publication, ask(APEX, 5)) == transferred(publication, ask(APEX))


def test_each_reverse_zone_has_its_own_names() -> None:
    settings = msgspec.structs.replace(SETTINGS, pool=IPv4Network("10.100.0.0/15"))
    publication = Publication()
    publication.publish(ZoneData(settings, {}, {"a": lease("10.100.0.1"), "b": lease("10.101.0.1")}, 1))
    for octet, name in (("100", "a"), ("101", "b")):
        records = transferred(publication, ask((octet, "10", "in-addr", "arpa")))
        assert [each.name for each in records if each.type == Type.PTR] == [f"1.0.{octet}.10.in-addr.arpa"]
        assert f"{name}.ztna.local" in str(records)


def test_another_pool_is_transferred_anew() -> None:
    publication = Publication()
    publication.publish(state(1, {}))
    settings = msgspec.structs.replace(SETTINGS, pool=IPv4Network("10.101.0.0/16"))
    other = ("101", "10", "in-addr", "arpa")
    assert publication.publish(ZoneData(settings, {}, {}, 2)) == (APEX, REVERSE, other)
    assert transferred(publication, ask(APEX, 1)) == transferred(publication, ask(APEX))
    assert publication.answer(ask(REVERSE), over_tcp=True) is Code.REFUSED


def test_a_large_zone_comes_in_several_messages() -> None:
    publication = Publication()
    publication.publish(
        state(
            1,
            {
                f"service-{n}": Lease(IPv4Address("10.100.0.0") + n, 1, lease("1.1.1.1").ports)
                for n in range(1, 900)
            },
        )
    )
    messages = publication.answer(ask(APEX), over_tcp=True)
    assert not isinstance(messages, Code)
    sizes = [len(data) for data in messages]
    assert len(sizes) > 2 and max(sizes) < 40_000
    assert len(transferred(publication, ask(APEX))) > 3000


def test_what_is_not_ours_or_not_there_yet_is_refused() -> None:
    publication = Publication()
    assert publication.answer(ask(APEX), over_tcp=True) is Code.SERVFAIL
    publication.publish(state(1, {}))
    assert publication.answer(ask(("elsewhere",)), over_tcp=True) is Code.REFUSED
    assert publication.answer(ask(APEX), over_tcp=False) is Code.REFUSED
    refusal = decode(dnsd.transfer.refuse(ask(APEX), Code.REFUSED))
    assert (refusal.code, refusal.questions[0].name, refusal.id) == (Code.REFUSED, "ztna.local", 0x1234)


def test_an_ixfr_that_does_not_say_its_serial_asks_for_everything() -> None:
    request = dnsd.transfer.read(query("ztna.local", "IXFR"))
    assert request is not None and request.serial is None


def test_other_queries_are_no_transfers() -> None:
    plain = query("ztna.local", "SOA")
    assert not dnsd.transfer.may_be(plain) and dnsd.transfer.read(plain) is None
    asked = query("ztna.local", "AXFR")
    assert dnsd.transfer.read(asked[:2] + b"\x20" + asked[3:]) is None
    assert dnsd.transfer.read(asked[:2] + b"\x84" + asked[3:]) is None
    assert dnsd.transfer.read(asked[:4] + b"\0\0" + asked[6:12]) is None
    with pytest.raises(ProtocolError, match="compressed"):
        dnsd.transfer.read(asked[:12] + b"\xc0\x04\0\xfc\0\1")


def test_wildcards_browsing_and_ipv6_are_transferred_too() -> None:
    settings = msgspec.structs.replace(SETTINGS, ula=IPv6Network("fd12:3456:789a::/96"))
    services = catalog(instance("web", "c1", wildcard="true"))
    here = ZoneData(settings, services, {"web": lease("10.100.1.2")}, 7, FRESH)
    publication = Publication()
    publication.publish(here)
    told = {(each.name, Type(each.type).name) for each in transferred(publication, ask(APEX))}
    assert told >= {
        ("*.web.ztna.local", "A"),
        ("*.web.ztna.local", "AAAA"),
        ("web.ztna.local", "AAAA"),
        ("_web._tcp.ztna.local", "PTR"),
        ("web._web._tcp.ztna.local", "SRV"),
        ("web._web._tcp.ztna.local", "TXT"),
        ("b._dns-sd._udp.ztna.local", "PTR"),
    }
    ip6 = next(apex for apex in here.apexes if apex[-2] == "ip6")
    pointers = [each for each in transferred(publication, ask(ip6)) if each.type == Type.PTR]
    assert [each.data for each in pointers] == [HostData("web.ztna.local")]


def test_relays_are_transferred_too() -> None:
    relays = (RelayHost("east", IPv4Address("198.51.100.1"), 4433),)
    publication = Publication()
    publication.publish(ZoneData(msgspec.structs.replace(SETTINGS, relays=relays), {}, {}, 7, FRESH))
    found = {(each.name, each.type) for each in transferred(publication, ask(APEX))}
    assert {("_ztna-relay._udp.ztna.local", Type.SRV), ("east.relay.ztna.local", Type.A)} <= found
