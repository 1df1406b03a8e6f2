"""dnsd.zone: which names exist, and what they hold."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec
import pytest
from msgspec.structs import replace

from dnsd.zone import (
    NO_SUBJECT,
    SERVICES_LISTED_MAX,
    SRV_RECORDS_MAX,
    Found,
    Labels,
    Outcome,
    RelayHost,
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


RELAYS = (
    RelayHost("east", IPv4Address("198.51.100.1"), 4433),
    RelayHost("west", IPv4Address("198.51.100.2"), 4499),
)


def test_relays_are_found_by_srv() -> None:
    here = zone(SERVICES, LEASES, replace(SETTINGS, relays=RELAYS))
    found = find(here, "_ztna-relay._udp.ztna.local", Type.SRV)
    assert found.records == (
        SrvData(0, 1, 4433, "east.relay.ztna.local"),
        SrvData(0, 1, 4499, "west.relay.ztna.local"),
    )
    assert found.additional == (
        ("east.relay.ztna.local", (IPv4Address("198.51.100.1"),)),
        ("west.relay.ztna.local", (IPv4Address("198.51.100.2"),)),
    )
    assert find(here, "west.relay.ztna.local", Type.A).records == (IPv4Address("198.51.100.2"),)
    for name, outcome in {
        "relay.ztna.local": Outcome.NODATA,
        "north.relay.ztna.local": Outcome.NXDOMAIN,
        "a.west.relay.ztna.local": Outcome.NXDOMAIN,
        "_web._udp.ztna.local": Outcome.NODATA,
    }.items():
        assert find(here, name, Type.A).outcome is outcome, name
    assert find(here, "_web._udp.ztna.local", Type.SRV).outcome is Outcome.ANSWER


def test_without_relays_their_names_do_not_exist(here: ZoneData) -> None:
    for name in ("relay.ztna.local", "_ztna-relay._udp.ztna.local"):
        assert find(here, name, Type.SRV).outcome is Outcome.NXDOMAIN


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
        ("2.1.100.10.in-addr.arpa", "10.100.1.2"),
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
    assert leaving.changed == {"leaving", "10.100.1.5"}
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


def test_a_second_pool_has_its_reverse_zone_and_two_in_one_share_theirs() -> None:
    more = (IPv4Network("127.101.0.0/16"), IPv4Network("127.102.3.0/29"), IPv4Network("127.102.3.8/29"))
    leases = {"web": lease("127.101.0.9")}
    here = zone({}, leases, msgspec.structs.replace(SETTINGS, more=more))
    found = here.find(("9", "0", "101", "127", "in-addr", "arpa"), Type.PTR)
    assert found.records == (HostData("web.ztna.local"),)
    assert [".".join(apex) for apex in here.apexes] == [
        "ztna.local",
        "100.10.in-addr.arpa",
        "101.127.in-addr.arpa",
        "3.102.127.in-addr.arpa",
    ]


# What a service may say of itself


def test_a_service_without_a_passing_instance_keeps_its_address_and_says_why(here: ZoneData) -> None:
    assert find(here, "db.ztna.local", Type.A).records == (IPv4Address("10.100.1.3"),)
    assert find(here, "db.ztna.local", Type.SRV).outcome is Outcome.NODATA
    told = (b"ports=tcp:8080", b"epoch=1", b"reason=no_healthy_connector")
    assert find(here, "db.ztna.local", Type.TXT).records == (told,)
    critical = zone(catalog(instance("new", status="critical")), {})
    assert find(critical, "new.ztna.local", Type.TXT).records == ((b"reason=no_healthy_connector",),)


def test_a_service_that_is_not_served_says_why(here: ZoneData) -> None:
    ((told,),) = find(here, "quarrel.ztna.local", Type.TXT).records  # type: ignore[misc]
    assert told.startswith(b"problem=instances disagree on the ports")  # type: ignore[union-attr]
    many = catalog(*(instance("web", f"c{n}", ports=f"tcp:{n}") for n in range(1, 99)))
    ((cut,),) = find(zone(many, {}), "web.ztna.local", Type.TXT).records  # type: ignore[misc]
    assert len(cut) == 255  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x.web", "*.web", "a.b.c.web", "_x.web"])
def test_every_name_under_a_wildcard_service_leads_to_it(name: str) -> None:
    here = zone(catalog(instance("web", wildcard="true")), {"web": lease("10.100.1.2")})
    assert find(here, f"{name}.ztna.local", Type.A).records == (IPv4Address("10.100.1.2"),)
    assert find(here, f"{name}.ztna.local", Type.AAAA).outcome is Outcome.NODATA
    assert find(here, f"{name}.ztna.local", Type.SRV).outcome is Outcome.NODATA
    assert here.subject((*name.split("."), "ztna", "local")) == "web"


def test_wildcards_are_asked_for_and_never_beside_a_service() -> None:
    here = zone(
        catalog(instance("web", wildcard="false"), instance("new", wildcard="true")),
        {"web": lease("10.100.1.2")},
    )
    assert find(here, "x.web.ztna.local", Type.A).outcome is Outcome.NXDOMAIN
    assert find(here, "x.new.ztna.local", Type.A).outcome is Outcome.NODATA
    assert find(here, "x.nobody.ztna.local", Type.A).outcome is Outcome.NXDOMAIN


# Browsing


def test_browsing_leads_from_the_domain_to_the_address(here: ZoneData) -> None:
    def pointed(name: str) -> str:
        (record,) = find(here, name, Type.PTR).records
        assert isinstance(record, HostData)
        return record.host

    assert [pointed(f"{name}._dns-sd._udp.ztna.local") for name in ("b", "db", "lb")] == ["ztna.local"] * 3
    found = pointed("_web._udp.ztna.local")
    assert found == "web._web._udp.ztna.local"
    assert find(here, found, Type.SRV).records == (SrvData(0, 1, 53, "web.ztna.local"),)
    assert find(here, found, Type.TXT).records == find(here, "web.ztna.local", Type.TXT).records
    assert here.subject(tuple(found.split("."))) == "web"
    for name in ("db._web._tcp", "db._db._udp", "nobody._nobody._tcp", "x._dns-sd._udp"):
        assert find(here, f"{name}.ztna.local", Type.SRV).outcome is Outcome.NXDOMAIN


# IPv6

ULA = IPv6Network("fd12:3456:789a::/96")
APEX = "0.0.0.0.0.0.0.0.0.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa"


@pytest.fixture
def dual() -> ZoneData:
    return zone(SERVICES, LEASES, replace(SETTINGS, ula=ULA))


def test_each_lease_has_an_ipv6_address_beside_it(dual: ZoneData) -> None:
    address = IPv6Address("fd12:3456:789a::10.100.1.2")
    assert find(dual, "web.ztna.local", Type.AAAA).records == (address,)
    assert find(dual, "_web._tcp.ztna.local", Type.SRV).additional == (
        ("web.ztna.local", (IPv4Address("10.100.1.2"), address)),
    )
    assert find(dual, "c1.connector.ztna.local", Type.AAAA).outcome is Outcome.NODATA
    assert find(dual, "ztna.local", Type.NS).additional[0][1] == (IPv4Address("192.0.2.53"),)


def test_ipv6_addresses_lead_back(dual: ZoneData) -> None:
    name = IPv6Address("fd12:3456:789a::10.100.1.2").reverse_pointer
    found = find(dual, name, Type.PTR)
    assert (found.records, found.apex) == ((HostData("web.ztna.local"),), APEX)
    assert dual.subject(tuple(name.split("."))) == "10.100.1.2"
    assert find(dual, APEX, Type.SOA).outcome is Outcome.ANSWER
    assert tuple(APEX.split(".")) in dual.apexes


@pytest.mark.parametrize(
    ("below", "outcome"),
    [
        ("2.0.1.0.4.6.a.0", Outcome.ANSWER),
        ("0.1.0.4.6.a.0", Outcome.NODATA),
        ("1.0.4.6.a.0", Outcome.NODATA),
        ("0.4.6.a.0", Outcome.NODATA),
        ("a.0", Outcome.NODATA),
        ("0", Outcome.NODATA),
        ("1", Outcome.NXDOMAIN),
        ("1.1.0.4.6.a.0", Outcome.NXDOMAIN),
        ("9.0.1.0.4.6.a.0", Outcome.NXDOMAIN),
        ("1.2.0.1.0.4.6.a.0", Outcome.NXDOMAIN),
        ("g.0", Outcome.NXDOMAIN),
        ("aa.0", Outcome.NXDOMAIN),
        ("g.0.1.0.4.6.a.0", Outcome.NXDOMAIN),
    ],
)
def test_reverse_names_between_zone_and_address_exist(dual: ZoneData, below: str, outcome: Outcome) -> None:
    assert find(dual, f"{below}.{APEX}", Type.PTR).outcome is outcome


def test_other_reverse_names_are_not_ours(dual: ZoneData, here: ZoneData) -> None:
    for name in ("1.0.ip6.arpa", "ip6.arpa", "arpa", "x.home.arpa"):
        assert find(dual, name, Type.PTR).outcome is Outcome.OUTSIDE
    assert find(here, APEX, Type.SOA).outcome is Outcome.OUTSIDE
    assert here.subject(("arpa",)) == NO_SUBJECT
