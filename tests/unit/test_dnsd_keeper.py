"""dnsd.keeper: who gets, keeps, loses and gets back which address."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from dnsd.keeper import CATALOG_READ_SECONDS_MAX, EMPTY_CATALOG_SECONDS, UNREADABLE, Pool, transactions
from dnsd.services import Service
from tests.support.dns import catalog, instance
from tests.support.leasing import Lab, kinds
from ztna.catalog import TXN_OPERATIONS_MAX, KvCheckSession
from ztna.jsontypes import to_json
from ztna.leases import Holding, Lease, Port, address_key, audit, service_key
from ztna.names import ServiceName

NOW = 1_700_000_000.0
WEB, DB = ServiceName("web"), ServiceName("db")
FOUR = Pool(IPv4Network("10.0.0.0/29"), [IPv4Network("10.0.0.4/31")])
"""10.0.0.1, .2, .3 and .6."""


def services(*names: str) -> dict[str, Service]:
    return catalog(*(instance(name) for name in names))


def lab(pool: Pool | None = None, **rules: float) -> Lab:
    return Lab(pool or Pool(IPv4Network("10.100.0.0/16")), **rules)


# The pool


def test_a_pool_leaves_out_its_ends_and_what_is_reserved() -> None:
    assert FOUR.size == 4
    assert sorted(map(str, FOUR.probe("x"))) == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.6"]
    assert [IPv4Address(f"10.0.0.{n}") in FOUR for n in range(8)] == [
        False, True, True, True, False, False, True, False,
    ]  # fmt: skip


def test_reserved_networks_may_overlap_touch_and_lie_outside() -> None:
    reserved = ["10.0.0.0/30", "10.0.0.2/32", "10.0.0.4/32", "10.0.0.12/30", "192.168.0.0/16"]
    pool = Pool(IPv4Network("10.0.0.0/28"), map(IPv4Network, reserved))
    assert pool.size == 7
    assert sorted(map(int, pool.probe("x"))) == [int(IPv4Address(f"10.0.0.{n}")) for n in range(5, 12)]


def test_tiny_pools_have_no_ends_to_leave_out() -> None:
    assert Pool(IPv4Network("10.0.0.0/32")).size == 1
    assert [str(a) for a in Pool(IPv4Network("10.0.0.0/31")).probe("x")] in (
        ["10.0.0.0", "10.0.0.1"],
        ["10.0.0.1", "10.0.0.0"],
    )
    assert Pool(IPv4Network("10.0.0.0/30"), [IPv4Network("10.0.0.0/8")]).size == 0


def test_the_start_is_the_names_own() -> None:
    pool = Pool(IPv4Network("10.0.0.0/8"))
    assert next(pool.probe("web")) == next(pool.probe("web"))
    assert len({next(pool.probe(f"service-{n}")) for n in range(500)}) > 490


# Taking and keeping


def test_a_new_service_gets_both_records_with_the_clock_as_epoch() -> None:
    here = lab()
    assert kinds(here.keep(services("web"), NOW)) == [f"granted web {here.address('web')}"]
    table = here.kv.table
    lease = table.leases[WEB].record
    assert lease.ports == (Port("tcp", 8080),)
    assert lease.epoch == int(NOW * 1000)
    held = table.holdings[lease.ip].record
    assert held == Holding(service="web", epoch=lease.epoch, state="leased", leased_at=NOW)
    assert audit(table) == ()


def test_nothing_to_do_is_an_empty_plan() -> None:
    here = lab()
    here.keep(services("web", "db"), NOW)
    again = here.keep(services("web", "db"), NOW + 1)
    assert (again.changes, again.problems, again.due_at, again.wants_catalog_read) == ((), (), None, False)


def test_a_lost_table_grows_back_the_same_with_higher_epochs() -> None:
    here, names = lab(), [f"service-{n}" for n in range(200)]
    here.keep(services(*names), NOW)
    before = here.kv.table.leases
    here.kv.pairs.clear()
    here.keep(services(*names), NOW + 1)
    after = here.kv.table.leases
    assert {name: lease.record.ip for name, lease in before.items()} == {
        name: lease.record.ip for name, lease in after.items()
    }
    assert all(after[name].record.epoch > before[name].record.epoch for name in before)


def test_changed_ports_keep_address_and_epoch() -> None:
    here = lab()
    here.keep(services("web"), NOW)
    lease = here.kv.table.leases[WEB].record
    assert kinds(here.keep(catalog(instance("web", ports="udp:53")), NOW + 1)) == [
        f"ports_changed web {lease.ip}"
    ]
    assert here.kv.table.leases[WEB].record == Lease(lease.ip, lease.epoch, (Port("udp", 53),))
    assert audit(here.kv.table) == ()


def test_a_service_with_a_problem_gets_none_and_loses_none() -> None:
    here = lab(grace_s=1)
    here.keep(services("web"), NOW)
    disagreeing = catalog(instance("web", "c1"), instance("web", "c2", ports="tcp:1"), instance("No_Name"))
    for later in (1.0, 1000.0):
        decided = here.keep(disagreeing, NOW + later)
        assert decided.changes == ()
        assert [problem.service for problem in decided.problems] == ["No_Name", "web"]


# Leaving, resting, coming back


def test_a_service_that_is_gone_is_released_only_after_the_grace() -> None:
    here = lab(grace_s=300)
    here.keep(services("web"), NOW)
    first = here.keep({}, NOW + 10)
    assert (first.changes, first.due_at, first.gone_since) == ((), NOW + 310, {"web": NOW + 10})
    assert here.keep({}, NOW + 309).changes == ()
    address = here.address("web")
    assert kinds(here.keep({}, NOW + 310)) == [f"released web {address}"]
    table = here.kv.table
    assert table.leases == {}
    (held,) = table.holdings.values()
    assert (held.record.state, held.record.service, held.record.released_at) == (
        "quarantined",
        "web",
        NOW + 310,
    )
    assert audit(table) == ()


def test_two_that_leave_are_due_in_turn() -> None:
    here = lab(grace_s=300)
    here.keep(services("web", "db"), NOW)
    here.keep(services("web"), NOW + 10)
    assert here.keep({}, NOW + 20).due_at == NOW + 310


def test_one_that_comes_back_in_time_starts_its_grace_anew() -> None:
    here = lab(grace_s=300)
    here.keep(services("web"), NOW)
    here.keep({}, NOW + 10)
    assert here.keep(services("web"), NOW + 200).gone_since == {}
    assert here.keep({}, NOW + 311).changes == ()


@pytest.mark.parametrize("read_at", [None, NOW + 1000 - CATALOG_READ_SECONDS_MAX, NOW])
def test_no_release_without_a_young_consistent_read(read_at: float | None) -> None:
    here = lab(grace_s=300)
    here.keep(services("web"), NOW)
    here.keep({}, NOW + 10)
    decided = here.plan({}, NOW + 1000, read_at=read_at)
    assert (decided.changes, decided.wants_catalog_read) == ((), True)


def test_a_read_older_than_the_lease_releases_nothing() -> None:
    here = lab(grace_s=0.5)
    here.gone_since = {"web": NOW - 10}
    here.keep(services("web"), NOW)
    here.gone_since = {"web": NOW - 10}
    assert here.plan({}, NOW + 1, read_at=NOW).wants_catalog_read


def test_a_service_that_the_read_still_shows_is_not_released() -> None:
    here = lab(grace_s=300)
    here.keep(services("web"), NOW)
    here.gone_since = {"web": NOW}
    from dnsd.keeper import CatalogRead, View, plan

    view = View(
        services={},
        table=here.kv.table,
        gone_since=here.gone_since,
        catalog_read=CatalogRead(frozenset({"web"}), NOW + 1000),
    )
    decided = plan(view, here.rules, NOW + 1001)
    assert (decided.changes, decided.wants_catalog_read) == ((), False)


def test_the_old_owner_gets_its_address_back_in_quarantine_and_long_after() -> None:
    for later in (1.0, 10_000.0):
        here = lab(grace_s=1, quarantine_s=3600)
        here.keep(services("web"), NOW)
        address, epoch = here.address("web"), here.kv.table.leases[WEB].record.epoch
        here.keep({}, NOW + 1)
        here.keep({}, NOW + 3)
        assert here.address("web") is None
        assert kinds(here.keep(services("web"), NOW + 3 + later)) == [f"returned web {address}"]
        assert here.kv.table.leases[WEB].record.epoch > epoch
        assert audit(here.kv.table) == ()


def test_nobody_else_gets_an_address_during_its_quarantine_and_then_the_longest_rested() -> None:
    here = lab(FOUR, grace_s=1, quarantine_s=100)
    here.keep(services("a", "b", "c", "d"), NOW)
    first, second = here.address("b"), here.address("a")
    here.keep(services("a", "c", "d"), NOW + 1)
    here.keep(services("a", "c", "d"), NOW + 3)
    here.keep(services("c", "d"), NOW + 4)
    here.keep(services("c", "d"), NOW + 6)
    starved = here.keep(services("c", "d", "e"), NOW + 102)
    (problem,) = starved.problems
    assert problem.service == "e"
    assert "pool 10.0.0.0/29 has 4, 2 leased, 2 in quarantine" in problem.what
    assert starved.due_at == NOW + 103
    assert kinds(here.keep(services("c", "d", "e"), NOW + 103)) == [f"granted e {first}"]
    assert kinds(here.keep(services("c", "d", "e", "f"), NOW + 107)) == [f"granted f {second}"]
    assert audit(here.kv.table) == ()


def test_the_old_owner_comes_before_a_newcomer_that_wants_the_rested_address() -> None:
    here = lab(FOUR, grace_s=1, quarantine_s=1)
    here.keep(services("a", "b", "c", "z"), NOW)
    home = here.address("z")
    here.keep(services("a", "b", "c"), NOW + 1)
    here.keep(services("a", "b", "c"), NOW + 3)
    decided = here.keep(services("a", "b", "c", "newcomer", "z"), NOW + 100)
    assert kinds(decided) == [f"returned z {home}"]
    assert [problem.service for problem in decided.problems] == ["newcomer"]


def test_unused_addresses_are_taken_before_rested_ones() -> None:
    here = lab(FOUR, grace_s=1, quarantine_s=1)
    here.keep(services("a"), NOW)
    rested = here.address("a")
    here.keep({}, NOW + 1)
    here.keep({}, NOW + 3)
    here.keep(services("b", "c", "d"), NOW + 100)
    assert rested not in {here.address(name) for name in ("b", "c", "d")}


def test_a_pinned_lease_is_never_released_and_stays_pinned() -> None:
    here = lab(grace_s=1)
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), to_json(Lease(address, 5)))
    here.kv.put(address_key(address), to_json(Holding(service="web", epoch=5, state="leased", pinned=True)))
    assert here.keep({}, NOW).gone_since == {}
    assert here.keep({}, NOW + 1000).changes == ()
    here.kv.put(address_key(address), to_json(Holding(service="web", epoch=4, state="leased", pinned=True)))
    here.keep(services("web"), NOW + 1001)
    assert here.kv.table.holdings[address].record.pinned


def test_a_former_home_outside_todays_pool_is_not_returned_to() -> None:
    here = lab(FOUR)
    old = IPv4Address("192.168.0.9")
    here.kv.put(
        address_key(old), to_json(Holding(service="web", epoch=5, state="quarantined", released_at=NOW))
    )
    here.keep(services("web"), NOW + 1)
    assert here.address("web") != str(old)


def test_a_lease_outside_todays_pool_is_kept() -> None:
    here = lab(FOUR)
    address = IPv4Address("192.168.0.9")
    here.kv.put(service_key(WEB), to_json(Lease(address, 5, (Port("tcp", 8080),))))
    here.kv.put(address_key(address), to_json(Holding(service="web", epoch=5, state="leased")))
    assert here.keep(services("web"), NOW).changes == ()


def test_a_lease_outside_todays_pool_is_reported_until_it_is_moved() -> None:
    here = lab(Pool(IPv4Network("10.0.0.0/24")))
    here.keep(services("web"), NOW)
    was = here.address("web")
    here.rules = lab(FOUR).rules
    shrunk = here.keep(services("web"), NOW + 1)
    assert IPv4Address(str(was)) not in FOUR, "the name must hash outside the shrunk pool"
    assert shrunk.changes == ()
    (problem,) = shrunk.problems
    assert (problem.service, problem.kind) == ("web", "outside_pool")
    assert f"{was} is outside the pool (10.0.0.0/29)" in problem.what
    assert "`ztna leases move web`" in problem.what
    here.wish("web", "move")
    assert here.keep(services("web"), NOW + 2).problems == ()
    assert here.keep(services("web"), NOW + 3).problems == ()
    assert IPv4Address(str(here.address("web"))) in FOUR
    assert audit(here.kv.table) == ()


# Several networks, and how full they are


def test_a_full_network_flows_over_into_the_next_and_the_pool_may_grow() -> None:
    here = lab(FOUR)
    names = [f"s{number}" for number in range(8)]
    first = here.keep(services(*names), NOW)
    assert (len(first.changes), len(first.problems)) == (4, 4)
    before = dict(here.kv.table.leases)
    more = IPv4Network("10.9.0.0/29")
    here.rules = lab(Pool(IPv4Network("10.0.0.0/29"), [IPv4Network("10.0.0.4/31")], [more])).rules
    grown = here.keep(services(*names), NOW + 1)
    assert (len(grown.changes), grown.problems) == (4, ())
    assert all(change.address in more for change in grown.changes)
    assert before.items() <= here.kv.table.leases.items()
    assert (grown.pool.size, grown.pool.leased, grown.pool.is_scarce) == (10, 8, False)
    assert audit(here.kv.table) == ()


def test_the_use_of_a_pool_counts_what_rests_until_it_has_rested() -> None:
    here = lab(FOUR, grace_s=1, quarantine_s=100)
    outside = Holding(service="old", epoch=1, state="quarantined", released_at=NOW)
    here.kv.put("ztna/vip/ip/192.0.2.1", to_json(outside))
    use = here.keep(services("a", "b", "c"), NOW).pool
    assert (use.size, use.leased, use.resting, use.is_scarce) == (4, 3, 0, False)
    here.keep(services("a", "b"), NOW + 1)
    here.keep(services("a", "b"), NOW + 3)
    resting = here.keep(services("a", "b", "d"), NOW + 4).pool
    assert (resting.leased, resting.resting, resting.is_scarce) == (3, 1, True)
    assert here.keep(services("a", "b", "d"), NOW + 103).pool.resting == 0


# A registry that lost its mind


def test_a_catalog_that_is_suddenly_empty_does_not_empty_the_table() -> None:
    here = lab(grace_s=300)
    here.keep(services("web", "db"), NOW)
    before = here.kv.table.leases
    here.keep({}, NOW + 1)
    doubted = here.keep({}, NOW + 400)
    assert (doubted.changes, doubted.due_at) == ((), NOW + 1 + EMPTY_CATALOG_SECONDS)
    (problem,) = doubted.problems
    assert (problem.service, problem.kind) == ("every service", "catalog_empty")
    assert "while 2 have leases" in problem.what
    back = here.keep(services("web", "db"), NOW + 500)
    assert (back.changes, back.problems, here.kv.table.leases) == ((), (), before)


def test_an_empty_catalog_is_believed_in_the_end_and_on_an_operators_word() -> None:
    here = lab(grace_s=300)
    here.keep(services("web", "db"), NOW)
    here.keep({}, NOW + 1)
    here.wish("web", "release")
    assert kinds(here.keep({}, NOW + 400))[0].startswith("released web")
    assert here.address("db") is not None
    here.keep(services("other"), NOW + 400)
    assert here.address("db") is None
    here.keep(services("other", "db"), NOW + 401)
    here.keep({}, NOW + 402)
    here.keep({}, NOW + 402 + EMPTY_CATALOG_SECONDS - 1)
    assert len(here.kv.table.leases) == 2
    here.keep({}, NOW + 402 + EMPTY_CATALOG_SECONDS)
    assert here.kv.table.leases == {}


# Epochs when KV was lost


def test_epochs_rise_over_a_lost_kv_although_the_clock_went_back() -> None:
    here = lab()
    here.keep(services("web", "db"), NOW)
    here.keep(services("web", "db"), NOW)
    before = here.kv.table.leases
    here.kv.pairs.clear()
    here.keep(services("web", "db"), NOW - 86_400)
    after = here.kv.table.leases
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].record.ip == before[name].record.ip
        assert after[name].record.epoch > before[name].record.epoch


def test_an_epoch_counts_as_seen_also_when_it_was_given_last_thing_before_the_loss() -> None:
    here = lab()
    given = here.keep(services("web"), NOW)
    assert given.epoch_floor == here.kv.table.leases[WEB].record.epoch
    assert here.keep({}, NOW).epoch_floor == given.epoch_floor


# Mending what somebody else broke


@pytest.mark.parametrize(
    "held",
    [
        None,
        Holding(service="web", epoch=4, state="leased"),
        Holding(service="web", epoch=5, state="quarantined", released_at=NOW),
        Holding(service="other", epoch=9, state="quarantined"),
    ],
)
def test_records_that_disagree_are_mended_under_a_higher_epoch(held: Holding | None) -> None:
    here = lab()
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), to_json(Lease(address, 5)))
    if held is not None:
        here.kv.put(address_key(address), to_json(held))
    assert kinds(here.keep(services("web"), NOW)) == [f"repaired web {address}"]
    assert here.kv.table.leases[WEB].record.epoch > 9
    assert audit(here.kv.table) == ()


@pytest.mark.parametrize("holder", ["db", "web", None])
def test_of_two_leases_on_one_address_the_holder_keeps_it_else_the_older(holder: str | None) -> None:
    here = lab()
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), to_json(Lease(address, 7)))
    here.kv.put(service_key(DB), to_json(Lease(address, 5)))
    if holder is not None:
        here.kv.put(address_key(address), to_json(Holding(service=holder, epoch=7, state="leased")))
    decided = here.keep(services("web", "db"), NOW)
    keeps = holder or "db"
    assert f"{address} is held by {keeps}" in {change.why for change in decided.changes}
    assert here.address(keeps) == str(address)
    assert here.address("web" if keeps == "db" else "db") not in (None, str(address))
    assert audit(here.kv.table) == ()


def test_a_service_that_lost_its_address_goes_back_to_a_former_home() -> None:
    here = lab()
    address, home = IPv4Address("10.100.7.7"), IPv4Address("10.100.8.8")
    here.kv.put(service_key(WEB), to_json(Lease(address, 7)))
    here.kv.put(service_key(DB), to_json(Lease(address, 5)))
    resting = Holding(service="web", epoch=1, state="quarantined", released_at=NOW)
    here.kv.put(address_key(home), to_json(resting))
    assert f"moved web {home}" in kinds(here.keep(services("web", "db"), NOW))


def test_a_loser_that_is_gone_only_loses_its_lease() -> None:
    here = lab(grace_s=1)
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), to_json(Lease(address, 7)))
    here.kv.put(service_key(DB), to_json(Lease(address, 5, (Port("tcp", 8080),))))
    here.kv.put(address_key(address), to_json(Holding(service="db", epoch=5, state="leased")))
    here.keep(services("db"), NOW)
    here.keep(services("db"), NOW + 2)
    assert (here.address("web"), here.address("db")) == (None, str(address))
    assert audit(here.kv.table) == ()


def test_a_released_lease_without_a_holding_gets_one_that_rests() -> None:
    here = lab(grace_s=1)
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), to_json(Lease(address, 7)))
    here.gone_since = {"web": NOW - 5}
    here.keep({}, NOW)
    held = here.kv.table.holdings[address].record
    assert (held.state, held.epoch) == ("quarantined", 7)


def test_the_records_of_a_service_in_its_grace_are_mended_too() -> None:
    here = lab()
    address = IPv4Address("10.100.7.7")
    ports = (Port("udp", 53),)
    here.kv.put(service_key(WEB), to_json(Lease(address, 7, ports)))
    assert kinds(here.keep({}, NOW)) == [f"repaired web {address}"]
    assert here.kv.table.leases[WEB].record.ports == ports
    assert audit(here.kv.table) == ()


def test_a_held_address_without_a_lease_is_given_back_or_put_to_rest() -> None:
    address = IPv4Address("10.100.7.7")
    stray = Holding(service="web", epoch=5, state="leased")
    here = lab()
    here.kv.put(address_key(address), to_json(stray))
    assert kinds(here.keep(services("web"), NOW)) == [f"returned web {address}"]
    here = lab()
    here.kv.put(address_key(address), to_json(stray))
    assert kinds(here.keep(services("db"), NOW))[0] == f"released web {address}"
    assert audit(here.kv.table) == ()


def test_a_resting_record_without_a_time_rests_from_when_it_was_leased() -> None:
    here = lab(Pool(IPv4Network("10.0.0.1/32")), quarantine_s=100)
    resting = Holding(service="old", epoch=1, state="quarantined", leased_at=NOW)
    here.kv.put("ztna/vip/ip/10.0.0.1", to_json(resting))
    assert here.keep(services("web"), NOW + 99).problems
    assert here.keep(services("web"), NOW + 100).changes


# What cannot be read is left alone


def test_an_unreadable_lease_leaves_its_service_and_address_alone() -> None:
    here = lab(grace_s=1)
    address = IPv4Address("10.100.7.7")
    here.kv.put(service_key(WEB), b"{from the future}")
    here.kv.put(address_key(address), to_json(Holding(service="web", epoch=5, state="leased")))
    decided = here.keep(services("web"), NOW)
    assert decided.changes == ()
    assert [(problem.service, problem.what) for problem in decided.problems] == [("web", UNREADABLE)]


def test_an_unreadable_address_is_not_given_out_nor_touched() -> None:
    here = lab(Pool(IPv4Network("10.0.0.0/31")), grace_s=1)
    here.kv.put("ztna/vip/ip/10.0.0.0", b"?")
    here.kv.put("ztna/vip/ip/nonsense", b"?")
    here.keep(services("web"), NOW)
    assert here.address("web") == "10.0.0.1"
    resting = Holding(service="old", epoch=1, state="quarantined", released_at=NOW)
    here.kv.put("ztna/vip/ip/192.0.2.1", to_json(resting))
    starved = here.keep(services("web", "db"), NOW)
    assert (len(starved.problems), starved.due_at) == (1, None)
    here.kv.put("ztna/vip/ip/10.0.0.1", b"?")
    assert here.keep(services("web"), NOW).changes == ()
    here.keep({}, NOW + 1)
    assert kinds(here.keep({}, NOW + 3)) == ["released web 10.0.0.1"]
    assert here.kv.pairs["ztna/vip/ip/10.0.0.1"].value == b"?"


# Transactions


def test_transactions_are_guarded_full_and_never_too_large() -> None:
    here = lab()
    decided = here.plan(services(*(f"service-{n}" for n in range(500))), NOW)
    packed = [each.operations for each in transactions(decided.changes, "me")]
    assert all(operations[0] == KvCheckSession("ztna/vip/keeper", "me") for operations in packed)
    assert all(len(operations) <= TXN_OPERATIONS_MAX for operations in packed)
    assert len(packed) == 17
    assert transactions((), "me") == ()


def test_a_keeper_that_lost_the_lock_changes_nothing() -> None:
    here = lab()
    decided = here.plan(services("web", "db"), NOW)
    here.kv.holder = "somebody else"
    assert not any(map(here.kv.carry_out, transactions(decided.changes, "me")))
    assert here.kv.pairs == {}


def test_of_two_plans_from_one_table_only_one_can_be_carried_out() -> None:
    here = lab()
    first, second = here.plan(services("web"), NOW), here.plan(services("web"), NOW + 1)
    assert all(map(here.kv.carry_out, transactions(first.changes, "me")))
    assert not any(map(here.kv.carry_out, transactions(second.changes, "me")))
