"""ztna.conflicts: which overlaps there are, and what is said of them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ztna.conflicts import (
    LEASES_NAMED_MAX,
    Collision,
    HostsLine,
    Occupied,
    collisions,
    conflict_key,
    detail,
    hosts_lines,
    misled,
    overridden,
    report,
)
from ztna.jsontypes import from_json, to_json

POOL, OTHER = IPv4Network("10.100.0.0/16"), IPv4Network("10.200.0.0/16")
INSIDE = Occupied(IPv4Network("10.100.3.0/24"), "route 10.100.3.0/24 dev eth0")
AROUND = Occupied(IPv4Network("10.0.0.0/8"), "route 10.0.0.0/8 dev vpn0")
BESIDE = Occupied(IPv4Network("192.168.0.0/16"), "route 192.168.0.0/16 dev eth0")


def test_inside_and_around_a_pool_collides_and_beside_it_does_not() -> None:
    assert collisions([OTHER, POOL], [BESIDE, INSIDE, AROUND, INSIDE]) == (
        Collision(POOL, AROUND),
        Collision(POOL, INSIDE),
        Collision(OTHER, AROUND),
    )
    assert collisions([POOL], [BESIDE]) == ()


def test_an_agents_key_is_its_name_or_the_last_part_of_its_spiffe_name() -> None:
    assert conflict_key("laptop-1") == "ztna/conflict/laptop-1"
    assert conflict_key("spiffe://example.org/agents/laptop-1") == "ztna/conflict/laptop-1"


def test_the_services_in_an_overlap_are_named_as_far_as_they_fit() -> None:
    found = Collision(POOL, INSIDE)
    assert detail(found, {"far": IPv4Address("10.100.9.9")}) == "no lease lies there yet"
    few = {"web": IPv4Address("10.100.3.1"), "db": IPv4Address("10.100.3.2")}
    assert detail(found, few) == "leases there: db, web"
    many = {f"s{number}": IPv4Address("10.100.3.1") for number in range(LEASES_NAMED_MAX + 2)}
    assert detail(found, many).endswith("s4 and 2 more")


def test_a_report_has_the_first_and_mentions_the_others() -> None:
    made = report((Collision(POOL, AROUND), Collision(POOL, INSIDE)), {}, 5.0)
    assert (made.cidr, made.with_, made.seen_at) == ("10.100.0.0/16", AROUND.what, 5.0)
    assert made.detail == f"no lease lies there yet; also 10.100.0.0/16 with {INSIDE.what}"
    assert b'"with":' in to_json(made)
    assert from_json(to_json(made), type(made)) == made


def test_networks_of_another_version_never_collide() -> None:
    ula = IPv6Network("fd12::/96")
    lan = Occupied(IPv6Network("fd12::/48"), "route fd12::/48 (eth0)")
    assert collisions([ula, POOL], [lan, BESIDE, INSIDE]) == (Collision(POOL, INSIDE), Collision(ula, lan))


def test_an_override_yields_to_whoever_has_leased_its_address() -> None:
    leases = {"web": IPv4Address("10.100.3.1"), "db": IPv4Address("10.100.3.2")}
    asked = {
        "web": IPv4Address("10.100.3.2"),
        "db": IPv4Address("10.100.3.2"),
        "ssh": IPv4Address("127.9.0.1"),
    }
    holding, (colliding,) = overridden(asked, leases)
    assert holding == {"db": IPv4Address("10.100.3.2"), "ssh": IPv4Address("127.9.0.1")}
    assert (str(colliding.pool), colliding.occupied.what) == ("10.100.3.2/32", "agent.overrides of web")
    assert detail(colliding, leases) == "10.100.3.2 is leased to db, so web stays at its own lease"


HOSTS = """
127.0.0.1 localhost
# 10.0.0.1 commented.ztna.local
10.0.0.7  Web.ZTNA.local web  db.ztna.local. # moved by hand
fd00::7   web.ztna.local
10.0.0.8  a.b.ztna.local ztna.local elsewhere.example
nonsense  web.ztna.local
"""


def test_what_the_hosts_file_says_of_services_is_read() -> None:
    assert hosts_lines(HOSTS, "ztna.local", "hosts") == [
        HostsLine(IPv4Address("10.0.0.7"), "web", "hosts:4: 10.0.0.7 web.ztna.local"),
        HostsLine(IPv4Address("10.0.0.7"), "db", "hosts:4: 10.0.0.7 db.ztna.local"),
        HostsLine(IPv6Address("fd00::7"), "web", "hosts:5: fd00::7 web.ztna.local"),
    ]


def test_lines_that_lead_elsewhere_are_told_and_others_are_not() -> None:
    web, beside = IPv4Address("10.100.3.1"), IPv6Address("fd12::a64:301")
    right = [HostsLine(web, "web", "hosts:1"), HostsLine(beside, "web", "hosts:2")]
    wrong = [
        HostsLine(IPv4Address("10.0.0.7"), "web", "hosts:3"),
        HostsLine(IPv6Address("::1"), "web", "hosts:4"),
    ]
    unknown = [HostsLine(web, "unknown", "hosts:5"), HostsLine(web, "nowhere", "hosts:6")]
    first, second = misled([*right, *wrong, *unknown], {"web": (web, beside), "nowhere": ()})
    assert first == Collision(
        IPv4Network(web),
        Occupied(IPv4Network("10.0.0.7"), "hosts:3"),
        "web is served at 10.100.3.1 and fd12::a64:301",
    )
    assert second.occupied == Occupied(IPv6Network("::1"), "hosts:4")
