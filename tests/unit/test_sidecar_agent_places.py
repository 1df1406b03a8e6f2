"""sidecar.agent.places: where a leased service is served."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from sidecar.agent.places import Places
from ztna.leases import Lease

POOL, ULA = IPv4Network("10.100.0.0/16"), IPv6Network("fd12::/96")
WEB = Lease(IPv4Address("10.100.0.2"), 1)
BESIDE = IPv6Address("fd12::a64:2")


def test_a_service_is_at_its_lease_and_beside_it() -> None:
    assert Places(frozenset({POOL}), {}).of("web", WEB) == (WEB.ip,)
    assert Places(frozenset({POOL, ULA}), {}).of("web", WEB) == (WEB.ip, BESIDE)


def test_a_network_that_the_agent_has_not_is_nobodys_place() -> None:
    places = Places(frozenset({ULA}), {})
    assert places.of("web", WEB) == ()
    assert not places.has(WEB.ip)
    assert places.has(BESIDE)


def test_an_override_takes_the_place_of_both() -> None:
    elsewhere = IPv4Address("127.9.0.1")
    places = Places(frozenset({POOL, ULA}), {"web": elsewhere})
    assert places.of("web", WEB) == (elsewhere,)
    assert places.of("db", WEB) == (WEB.ip, BESIDE)
    assert places.has(elsewhere)
    assert not places.has(IPv4Address("127.9.0.2"))
