"""dnsd.pool: one network has its tests in test_dnsd_keeper.py; here are several."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from itertools import islice

from dnsd.pool import Pool

FIRST, SECOND = IPv4Network("10.0.0.0/29"), IPv4Network("10.9.0.0/29")
RESERVED = [IPv4Network("10.0.0.4/31"), IPv4Network("10.9.0.1/32")]


def test_a_pool_of_two_networks_has_the_addresses_of_both_and_no_ends() -> None:
    pool = Pool(FIRST, RESERVED, [SECOND])
    assert (pool.size, [each.size for each in pool.ranges]) == (9, [4, 5])
    assert str(pool) == "10.0.0.0/29, 10.9.0.0/29"
    assert {IPv4Address("10.0.0.6"), IPv4Address("10.9.0.2")} <= set(pool.probe("x"))
    for outside in ("10.0.0.0", "10.0.0.4", "10.0.0.7", "10.9.0.0", "10.9.0.1", "10.9.0.7", "10.4.0.1"):
        assert IPv4Address(outside) not in pool
    assert all(address in pool for address in pool.probe("x"))


def test_the_first_network_is_used_up_first_so_one_more_changes_no_start() -> None:
    small, grown = Pool(FIRST, RESERVED), Pool(FIRST, RESERVED, [SECOND])
    for name in ("web", "db", "x"):
        assert list(islice(grown.probe(name), small.size)) == list(small.probe(name))


def test_a_pool_whose_first_network_is_all_reserved_starts_in_the_next() -> None:
    pool = Pool(FIRST, [FIRST], [SECOND])
    assert next(pool.probe("web")) in SECOND


def test_blocks_that_touch_become_one_and_strangers_are_ignored() -> None:
    reserved = map(IPv4Network, ["10.0.0.2/32", "10.0.0.3/32", "10.0.0.6/32", "172.16.0.0/12"])
    assert sorted(map(str, Pool(FIRST, reserved).probe("x"))) == ["10.0.0.1", "10.0.0.4", "10.0.0.5"]
