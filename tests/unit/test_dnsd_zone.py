"""dnsd.zone: which names exist, and what they hold."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from dnsd.zone import (
    NO_SUBJECT,
    SERVICES_LISTED_MAX,
    SRV_RECORDS_MAX,
    Found,
    Labels,
    Outcome,
    Settings,
    ZoneData,
    rebuilt,
    reverse_zones,
)
from tests.support.dns import SETTINGS, catalog, instance, lease, zone
from ztna.dns import HostData, SrvData, Type
from ztna.leases import Port
from ztna.names import Zone

SERVICES = catalog(
    instance("web", "c1", ports="tcp:8080,udp:53", weight=3),
    instance("web", "c2", ports="tcp:8080,udp:53", address="192.0.2.2"),
    instance("db", "c1", status="critical"),
    instance("quarrel", "c1"),
    instance("quarrel", "c2", ports="tcp:1", address="192.0.2.2"),
    instance("fresh-one", "v6", address="2001:db8::1"),
    instance("Bad_Name"),
)
LEASES = {
    "web": lease("10.100.1.2", Port("tcp", 8080), Port("udp", 53), epoch=42),
    "db": lease("10.100.1.3"),
    "quarrel": lease("10.100.1.4"),
    "leaving": lease("10.100.1.5"),
}


@pytest.fixture
def here() -> ZoneData:
    return zone(SERVICES, LEASES)


def find(here: ZoneData, name: str, kind: Type) -> Found:
    labels: Labels = tuple(name.split(".")) if name else ()
    return here.find(labels, kind)


@pytest.mark.parametrize(
    ("name", "kind", "outcome"),
    [
        ("web.ztna.local", Type.A, Outcome.ANSWER),
        ("web.ztna.local", Type.AAAA, Outcome.NODATA),
        ("leaving.ztna.local", Type.A, Outcome.ANSWER),
        ("leaving.ztna.local", Type.SRV, Outcome.NODATA),
        ("db.ztna.local", Type.SRV, Outcome.NODATA),
        ("fresh-one.ztna.local", Type.A, Outcome.NODATA),
        ("fresh-one.ztna.local", Type.SRV, Outcome.ANSWER),
        ("quarrel.ztna.local", Type.A, Outcome.NODATA),
        ("quarrel.ztna.local", Type.SRV, Outcome.NODATA),
        ("_quarrel._tcp.ztna.local", Type.SRV, Outcome.NXDOMAIN),
        ("nobody.ztna.local", Type.A, Outcome.NXDOMAIN),
        ("x.web.ztna.local", Type.A, Outcome.NXDOMAIN),
        ("c1.connector.ztna.local", Type.A, Outcome.ANSWER),
        ("c1.connector.ztna.local", Type.SRV, Outcome.NODATA),
        ("v6.connector.ztna.local", Type.A, Outcome.NODATA),
        ("c9.connector.ztna.local", Type.A, Outcome.NXDOMAIN),
        ("connector.ztna.local", Type.A, Outcome.NODATA),
        ("_tcp.ztna.local", Type.SRV, Outcome.NODATA),
        ("_dns-sd._udp.ztna.local", Type.PTR, Outcome.NODATA),
        ("_web._tcp.ztna.local", Type.SRV, Outcome.ANSWER),
        ("_web._tcp.ztna.local", Type.A, Outcome.NODATA),
        ("_db._udp.ztna.local", Type.SRV, Outcome.NXDOMAIN),
        ("_fresh-one._tcp.ztna.local", Type.SRV, Outcome.NXDOMAIN),
        ("web._tcp.ztna.local", Type.SRV, Outcome.NXDOMAIN),
        ("_fresh.ztna.local", Type.TXT, Outcome.FRESH),
        ("_fresh.ztna.local", Type.A, Outcome.NODATA),
        ("ns.ztna.local", Type.A, Outcome.ANSWER),
        ("ztna.local", Type.SOA, Outcome.ANSWER),
        ("ztna.local", Type.NS, Outcome.ANSWER),
        ("ztna.local", Type.A, Outcome.NODATA),
        ("local", Type.SOA, Outcome.OUTSIDE),
        ("", Type.NS, Outcome.OUTSIDE),
        ("xztna.local", Type.A, Outcome.OUTSIDE),
        ("2.1.100.10.in-addr.arpa", Type.PTR, Outcome.ANSWER),
        ("2.1.100.10.in-addr.arpa", Type.A, Outcome.NODATA),
        ("4.1.100.10.in-addr.arpa", Type.PTR, Outcome.NXDOMAIN),
        ("9.1.100.10.in-addr.arpa", Type.PTR, Outcome.NXDOMAIN),
        ("1.100.10.in-addr.arpa", Type.PTR, Outcome.NODATA),
        ("2.100.10.in-addr.arpa", Type.PTR, Outcome.NXDOMAIN),
        ("100.10.in-addr.arpa", Type.SOA, Outcome.ANSWER),
        ("100.10.in-addr.arpa", Type.PTR, Outcome.NODATA),
        ("10.in-addr.arpa", Type.SOA, Outcome.OUTSIDE),
        ("2.1.101.10.in-addr.arpa", Type.PTR, Outcome.OUTSIDE),
        ("1.0.ip6.arpa", Type.PTR, Outcome.OUTSIDE),
    ],
)
def test_outcomes(here: ZoneData, name: str, kind: Type, outcome: Outcome) -> None:
    assert find(here, name, kind).outcome is outcome


def test_a_service_has_its_lease_its_ports_and_its_connectors(here: ZoneData) -> None:
    assert find(here, "web.ztna.local", Type.A).records == (IPv4Address("10.100.1.2"),)
    assert find(here, "web.ztna.local", Type.TXT).records == ((b"ports=tcp:8080,udp:53", b"epoch=42"),)
    found = find(here, "web.ztna.local", Type.SRV)
    assert found.records == (
        SrvData(0, 1, 4435, "c2.connector.ztna.local"),
        SrvData(0, 3, 4435, "c1.connector.ztna.local"),
    )
    assert dict(found.additional) == {
        "c1.connector.ztna.local": (IPv4Address("192.0.2.1"),),
        "c2.connector.ztna.local": (IPv4Address("192.0.2.2"),),
    }


def test_programs_are_told_the_virtual_port_and_address(here: ZoneData) -> None:
    found = find(here, "_web._udp.ztna.local", Type.SRV)
    assert found.records == (SrvData(0, 1, 53, "web.ztna.local"),)
    assert found.additional == (("web.ztna.local", (IPv4Address("10.100.1.2"),)),)


def test_ptr_leads_back_and_a_lease_not_served_leads_nowhere(here: ZoneData) -> None:
    assert find(here, "2.1.100.10.in-addr.arpa", Type.PTR).records == (HostData("web.ztna.local"),)


def test_the_apex_names_its_server_with_its_address(here: ZoneData) -> None:
    found = find(here, "ztna.local", Type.NS)
    assert found.records == (HostData("ns.ztna.local"),)
    assert found.additional == (("ns.ztna.local", (IPv4Address("192.0.2.53"),)),)
    assert here.soa("ztna.local").serial == 7


def test_without_a_known_address_the_server_has_a_name_only() -> None:
    here = zone({}, {}, Settings(Zone("ztna.local"), SETTINGS.pool, 5, 10))
    assert find(here, "ns.ztna.local", Type.A).outcome is Outcome.NODATA
    assert find(here, "ztna.local", Type.NS).additional == ()


def test_services_are_listed_for_browsing_but_icmp_is_no_service(here: ZoneData) -> None:
    found = find(here, "_services._dns-sd._udp.ztna.local", Type.PTR)
    assert HostData("_web._tcp.ztna.local") in found.records
    assert HostData("_quarrel._tcp.ztna.local") not in found.records
    assert find(zone({}, {}), "_services._dns-sd._udp.ztna.local", Type.PTR).outcome is Outcome.NODATA
    pinged = zone({}, {"web": lease("10.100.1.2", Port("icmp", 0))})
    assert find(pinged, "_services._dns-sd._udp.ztna.local", Type.PTR).records == ()


def test_lists_are_bounded() -> None:
    many = catalog(*(instance("web", f"c{n}") for n in range(SRV_RECORDS_MAX + 9)))
    assert len(find(zone(many, {}), "web.ztna.local", Type.SRV).records) == SRV_RECORDS_MAX
    leases = {f"s{n}": lease(f"10.100.{n // 200}.{n % 200 + 1}") for n in range(SERVICES_LISTED_MAX + 9)}
    found = find(zone({}, leases), "_services._dns-sd._udp.ztna.local", Type.PTR)
    assert len(found.records) == SERVICES_LISTED_MAX


def test_two_instances_of_one_connector_at_one_port_are_one_record() -> None:
    twice = catalog(instance("web", "c1"), instance("web", "c1"))
    assert len(find(zone(twice, {}), "web.ztna.local", Type.SRV).records) == 1


def test_a_long_list_of_ports_is_cut_into_strings() -> None:
    ports = tuple(Port("tcp", 60000 + n) for n in range(64))
    (strings,) = find(zone({}, {"web": lease("10.100.1.2", *ports)}), "web.ztna.local", Type.TXT).records
    assert isinstance(strings, tuple)
    assert all(len(text) <= 255 for text in strings)
    told = b",".join(text.removeprefix(b"ports=") for text in strings[:-1])
    assert told == b",".join(f"tcp:{port.port}".encode() for port in ports)


def test_an_unchanged_zone_stays_the_same_object_and_a_changed_one_has_a_higher_serial(
    here: ZoneData,
) -> None:
    assert rebuilt(here, dict(SERVICES), dict(LEASES), 9e9) is here
    changed = rebuilt(here, SERVICES, {}, 5.0)
    assert changed.serial == 8
    assert rebuilt(changed, {}, {}, 1_700_000_000.9).serial == 1_700_000_000
    wrapped = ZoneData(SETTINGS, {}, {}, 0xFFFFFFFF)
    assert rebuilt(wrapped, SERVICES, {}, 5.0).serial == 0


@pytest.mark.parametrize(
    ("pool", "zones"),
    [
        ("10.0.0.0/8", ["10.in-addr.arpa"]),
        ("10.100.0.0/16", ["100.10.in-addr.arpa"]),
        ("10.100.7.0/24", ["7.100.10.in-addr.arpa"]),
        ("10.100.7.128/25", ["7.100.10.in-addr.arpa"]),
        ("10.100.4.0/23", ["4.100.10.in-addr.arpa", "5.100.10.in-addr.arpa"]),
        ("0.0.0.0/0", [f"{n}.in-addr.arpa" for n in range(256)]),
    ],
)
def test_reverse_zones_are_cut_at_the_octet(pool: str, zones: list[str]) -> None:
    assert [".".join(labels) for labels in reverse_zones(IPv4Network(pool))] == zones


# What changed


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("web.ztna.local", "web"),
        ("_web._tcp.ztna.local", "web"),
        ("_web._udp.ztna.local", "web"),
        ("c1.connector.ztna.local", "c1.connector"),
        ("2.1.100.10.in-addr.arpa", "web"),
        ("1.100.10.in-addr.arpa", NO_SUBJECT),
        ("_services._dns-sd._udp.ztna.local", NO_SUBJECT),
        ("ns.ztna.local", NO_SUBJECT),
        ("ztna.local", NO_SUBJECT),
        ("a.b.web.ztna.local", NO_SUBJECT),
    ],
)
def test_an_answer_depends_on_one_subject_or_on_more(here: ZoneData, name: str, subject: str) -> None:
    assert here.subject(tuple(name.split("."))) == subject


def test_the_next_state_tells_what_changed(here: ZoneData) -> None:
    assert (here.follows, here.changed) == (None, frozenset())
    gone = {name: found for name, found in LEASES.items() if name != "leaving"}
    leaving = rebuilt(here, SERVICES, gone, 9e8)
    assert leaving.follows == 7
    assert leaving.changed == {"leaving"}
    same = leaving.renumbered(900_000_001, 5)
    assert (same.follows, same.serial, same.fresh_at) == (900_000_000, 900_000_001, 5)
    assert not same.changed
    added = rebuilt(here, {**SERVICES, **catalog(instance("new", "c9"))}, LEASES, 9e8)
    assert added.changed == {"new", "c9.connector"}


def test_a_connector_that_moves_changes_all_that_it_serves(here: ZoneData) -> None:
    services = {**SERVICES, **catalog(instance("other", "c1"))}
    before = rebuilt(here, services, LEASES, 9e8)
    moved = {**services, **catalog(instance("other", "c1", address="192.0.2.77"))}
    after = rebuilt(before, moved, LEASES, 9e8)
    # "db" is critical and "quarrel" has a problem: what they say is put together from c1 just the same.
    assert after.changed >= {"other", "web", "c1.connector"}
    found = find(after, "c1.connector.ztna.local", Type.A)
    assert found.records == (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.77"))


def test_states_in_a_row_are_what_they_would_be_alone(here: ZoneData) -> None:
    steps = [(SERVICES, {}), ({}, LEASES), ({}, {}), (SERVICES, LEASES)]
    names = ["web.ztna.local", "c1.connector.ztna.local", "2.1.100.10.in-addr.arpa", "1.100.10.in-addr.arpa"]
    for services, leases in steps:
        here = rebuilt(here, services, leases, 9e8)
        alone = zone(services, leases)
        for name in names:
            for kind in (Type.A, Type.SRV, Type.PTR):
                assert find(here, name, kind) == find(alone, name, kind)
