"""dnsd.book: what may be given to whom. The decisions that lead there are in test_dnsd_keeper.py."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from dnsd.book import agree
from dnsd.pool import Pool
from tests.support.dns import catalog, instance
from tests.support.leasing import Lab
from ztna.jsontypes import to_json
from ztna.leases import Holding, Lease, address_key, audit
from ztna.names import ServiceName

NOW = 1_700_000_000.0
WEB = ServiceName("web")


@pytest.mark.parametrize(
    ("holding", "agrees"),
    [
        (Holding("web", 5, "leased"), True),
        (Holding("web", 4, "leased"), False),
        (Holding("db", 5, "leased"), False),
        (Holding("web", 5, "quarantined"), False),
    ],
)
def test_two_records_agree_in_service_epoch_and_state(holding: Holding, agrees: bool) -> None:
    assert agree(WEB, Lease(IPv4Address("10.0.0.1"), 5), holding) is agrees


@pytest.mark.parametrize("force", [False, True])
def test_an_address_whose_owner_only_lost_its_lease_is_not_given_away(force: bool) -> None:
    here = Lab(Pool(IPv4Network("10.100.0.0/16")), quarantine_s=1)
    stray = IPv4Address("10.100.7.7")
    here.keep(catalog(instance("web")), NOW)
    here.kv.put(address_key(stray), to_json(Holding("db", 5, "leased", leased_at=NOW - 1000)))
    here.wish("web", "move", str(stray), force=force)
    here.keep(catalog(instance("web"), instance("db")), NOW + 1)
    assert (here.answer("web").ok, here.answer("web").what) == (False, f"{stray} is held by db")
    assert here.address("db") == str(stray), "its owner is back at once"
    assert audit(here.kv.table) == ()


def test_unused_addresses_of_every_range_are_found_once() -> None:
    here = Lab(
        Pool(IPv4Network("10.0.0.0/30"), more=[IPv4Network("10.1.0.0/30"), IPv4Network("10.2.0.0/30")])
    )
    names = [f"s{number}" for number in range(7)]
    decided = here.keep(catalog(*map(instance, names)), NOW)
    given = sorted(str(change.address) for change in decided.changes)
    assert given == ["10.0.0.1", "10.0.0.2", "10.1.0.1", "10.1.0.2", "10.2.0.1", "10.2.0.2"]
    assert [problem.kind for problem in decided.problems] == ["pool_exhausted"]
    assert "pool 10.0.0.0/30, 10.1.0.0/30, 10.2.0.0/30 has 6" in decided.problems[0].what
