"""ztna.conflicts: which overlaps there are, and what is said of them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from ztna.conflicts import LEASES_NAMED_MAX, Collision, Occupied, collisions, conflict_key, detail, report
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
