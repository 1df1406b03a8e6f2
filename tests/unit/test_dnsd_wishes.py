"""dnsd.wishes and dnsd.keeper: what becomes of pin, unpin, release and move."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network

import pytest

from dnsd.keeper import CATALOG_READ_SECONDS_MAX, FREED_AT_ONCE_MAX, CatalogRead, View, plan
from dnsd.pool import Pool
from dnsd.services import Service
from dnsd.wishes import ANSWER_KEPT_SECONDS, Facts, Refuse, judge
from tests.support.dns import catalog, instance
from tests.support.leasing import Lab, kinds
from ztna.catalog import TXN_OPERATIONS_MAX
from ztna.jsontypes import to_json
from ztna.leases import Holding, Lease, Wish, address_key, audit, service_key, wish_key
from ztna.names import ServiceName

NOW = 1_700_000_000.0
WEB, DB = ServiceName("web"), ServiceName("db")
FREE = "10.100.7.7"


def services(*names: str) -> dict[str, Service]:
    return catalog(*(instance(name) for name in names))


@pytest.fixture
def here() -> Lab:
    """A keeper that has leased `web` and `db` an address each."""
    made = Lab(Pool(IPv4Network("10.100.0.0/16")), grace_s=300)
    made.keep(services("web", "db"), NOW)
    return made


def said(here: Lab, present: Mapping[str, Service] | None = None, now: float = NOW + 1) -> tuple[bool, str]:
    """Let the keeper work; return whether the wish about `web` was granted, and its words."""
    here.keep(services("web", "db") if present is None else present, now)
    assert audit(here.kv.table) == ()
    answer = here.answer("web")
    assert answer.at == now
    return answer.ok, answer.what


def holding(here: Lab, service: str) -> Holding:
    """The record of the address that a service has."""
    return here.kv.table.holdings[here.kv.table.leases[ServiceName(service)].record.ip].record


def epoch(here: Lab, service: str = "web") -> int:
    return here.kv.table.leases[ServiceName(service)].record.epoch


# pin and unpin


def test_pin_marks_the_address_it_has_and_ends_no_session(here: Lab) -> None:
    before = epoch(here)
    here.wish("web", "pin")
    assert said(here) == (True, f"web is pinned to {here.address('web')}")
    assert (holding(here, "web").pinned, epoch(here)) == (True, before)
    assert here.keep({}, NOW + 2).gone_since == {"db": NOW + 2}, "a pinned lease does not age"


def test_a_pin_that_is_there_already_is_fine(here: Lab) -> None:
    here.wish("web", "pin")
    said(here)
    here.wish("web", "pin", here.address("web"))
    assert said(here, now=NOW + 2) == (True, f"web is pinned to {here.address('web')} already")


def test_unpin_lets_the_lease_age_again(here: Lab) -> None:
    here.wish("web", "unpin")
    assert said(here) == (True, "web is not pinned")
    here.wish("web", "pin")
    said(here, now=NOW + 2)
    here.wish("web", "unpin")
    assert said(here, now=NOW + 3) == (True, f"web is no longer pinned to {here.address('web')}")
    assert not holding(here, "web").pinned


def test_pin_to_another_address_moves_there_under_a_new_epoch_and_the_old_one_rests(here: Lab) -> None:
    was, before = here.address("web"), epoch(here)
    here.wish("web", "pin", FREE)
    assert said(here) == (True, f"web moved from {was} to {FREE}")
    assert (here.address("web"), holding(here, "web").pinned) == (FREE, True)
    assert epoch(here) > before
    resting = here.kv.table.holdings[IPv4Address(str(was))].record
    assert (resting.state, resting.service, resting.released_at) == ("quarantined", "web", NOW + 1)


def test_a_taken_address_is_refused_naming_the_holder_even_with_force(here: Lab) -> None:
    taken = here.address("db")
    for force in (False, True):
        here.wish("web", "pin", taken, force=force)
        assert said(here) == (False, f"{taken} is held by db")
    assert here.address("db") == taken


def test_an_address_outside_the_pool_or_unreadable_is_refused(here: Lab) -> None:
    here.wish("web", "pin", "192.0.2.1")
    assert said(here) == (False, "192.0.2.1 is outside the pool (10.100.0.0/16) or reserved")
    here.kv.put(f"ztna/vip/ip/{FREE}", b"?")
    here.wish("web", "pin", FREE)
    here.keep(services("web", "db"), NOW + 2)
    assert here.answer("web").what == f"the record of {FREE} cannot be read"


def test_an_address_that_rests_for_another_needs_force(here: Lab) -> None:
    rests = str(here.address("db"))
    here.keep(services("web"), NOW + 1)
    here.keep(services("web"), NOW + 302)
    here.wish("web", "pin", rests)
    granted, what = said(here, services("web"), NOW + 303)
    assert (granted, what) == (False, f"{rests} rests for db until 2023-11-14 23:18:22 UTC")
    here.wish("web", "pin", rests, force=True)
    assert said(here, services("web"), NOW + 304)[0]
    assert here.address("web") == rests


def test_an_address_that_has_rested_is_free_and_so_is_ones_own(here: Lab) -> None:
    rests, own = str(here.address("db")), str(here.address("web"))
    here.keep(services("web"), NOW + 1)
    here.keep(services("web"), NOW + 302)
    here.wish("web", "move", rests)
    assert said(here, services("web"), NOW + 302 + 3600)[0]
    here.wish("web", "move", own)
    assert said(here, services("web"), NOW + 302 + 3601)[0]
    assert here.address("web") == own


# move


def test_move_without_an_address_takes_the_next_one(here: Lab) -> None:
    was = here.address("web")
    here.wish("web", "move")
    assert said(here) == (True, f"web moved from {was} to {here.address('web')}")
    assert here.address("web") != was
    assert not holding(here, "web").pinned


def test_move_to_where_it_is_changes_nothing(here: Lab) -> None:
    before = epoch(here)
    here.wish("web", "move", here.address("web"))
    assert said(here) == (True, f"web has {here.address('web')} already")
    assert epoch(here) == before


def test_moving_a_pinned_one_needs_force_and_keeps_the_pin(here: Lab) -> None:
    here.wish("web", "pin")
    said(here)
    here.wish("web", "move", FREE)
    granted, what = said(here, now=NOW + 2)
    assert (granted, "unpin it, or move it with --force" in what) == (False, True)
    here.wish("web", "move", FREE, force=True)
    assert said(here, now=NOW + 3)[0]
    assert (here.address("web"), holding(here, "web").pinned) == (FREE, True)


def test_move_to_a_taken_address_is_refused(here: Lab) -> None:
    here.wish("web", "move", here.address("db"))
    assert said(here) == (False, f"{here.address('db')} is held by db")


def test_move_works_while_the_service_is_away_and_keeps_its_ports(here: Lab) -> None:
    ports = here.kv.table.leases[WEB].record.ports
    here.wish("web", "move", FREE)
    assert said(here, services("db"))[0]
    assert here.kv.table.leases[WEB].record.ports == ports


def test_move_keeps_the_ports_while_the_instances_disagree(here: Lab) -> None:
    ports = here.kv.table.leases[WEB].record.ports
    disagreeing = catalog(instance("web", "c1"), instance("web", "c2", ports="tcp:1"), instance("db"))
    here.wish("web", "move", FREE)
    assert said(here, disagreeing)[0]
    assert here.kv.table.leases[WEB].record.ports == ports


def test_move_out_of_a_full_pool_is_refused_with_the_numbers() -> None:
    here = Lab(Pool(IPv4Network("10.0.0.0/31")))
    here.keep(services("web", "db"), NOW)
    here.wish("web", "move")
    granted, what = said(here)
    assert not granted
    assert what.startswith(f"web stays at {here.address('web')}: no virtual address left")


def test_two_that_move_at_once_do_not_meet() -> None:
    here = Lab(Pool(IPv4Network("10.0.0.0/29"), [IPv4Network("10.0.0.1/32")]))
    names = ("web", "db", "c")
    here.keep(services(*names), NOW)
    for name in names:
        here.wish(name, "move")
    here.keep(services(*names), NOW + 1)
    assert audit(here.kv.table) == ()
    assert sorted(here.answer(name).ok for name in names) == [False, True, True]


# release


def test_release_does_not_wait_for_the_grace(here: Lab) -> None:
    was = here.address("web")
    here.wish("web", "release")
    assert said(here, services("db")) == (True, f"web no longer has {was}, which rests now")
    assert here.address("web") is None
    assert here.kv.table.holdings[IPv4Address(str(was))].record.state == "quarantined"


def test_release_of_a_registered_service_is_refused(here: Lab) -> None:
    for force in (False, True):
        here.wish("web", "release", force=force)
        granted, what = said(here)
        assert (granted, "would get its address back" in what) == (False, True)


def test_release_of_a_pinned_one_needs_force(here: Lab) -> None:
    here.wish("web", "pin")
    said(here)
    here.wish("web", "release")
    assert not said(here, services("db"), NOW + 2)[0]
    here.wish("web", "release", force=True)
    assert said(here, services("db"), NOW + 3)[0]
    assert here.address("web") is None


def test_release_waits_for_a_young_consistent_read_of_the_catalog(here: Lab) -> None:
    here.wish("web", "release")
    waiting = here.plan(services("db"), NOW + 100, read_at=NOW + 100 - CATALOG_READ_SECONDS_MAX)
    assert (waiting.changes, waiting.wants_catalog_read) == ((), True)


def test_release_believes_a_read_that_shows_the_service(here: Lab) -> None:
    here.wish("web", "release")
    read = CatalogRead(frozenset({"web", "db"}), NOW + 100)
    view = View(services=services("db"), table=here.kv.table, catalog_read=read)
    decided = plan(view, here.rules, NOW + 100)
    assert kinds(decided) == ["wish_refused web None"]
    assert decided.changes[0].why == "web has just been registered again"


def test_what_rests_is_freed_for_anybody_only_with_force(here: Lab) -> None:
    here.wish("web", "release")
    said(here, services("db"))
    was = IPv4Address(str(holding_address(here, "web")))
    here.wish("web", "release")
    granted, what = said(here, services("db"), NOW + 2)
    assert (granted, "--force frees it at once" in what) == (False, True)
    here.wish("web", "release", force=True)
    assert said(here, services("db"), NOW + 3) == (True, f"{was} may be leased to anybody now")
    assert was not in here.kv.table.holdings


def holding_address(here: Lab, service: str) -> IPv4Address:
    return next(ip for ip, held in here.kv.table.holdings.items() if held.record.service == service)


def test_what_is_freed_fits_one_transaction(here: Lab) -> None:
    for number in range(FREED_AT_ONCE_MAX + 5):
        resting = Holding(service="old", epoch=1, state="quarantined", released_at=NOW)
        here.kv.put(address_key(IPv4Address(f"10.100.9.{number}")), to_json(resting))
    here.wish("old", "release", force=True)
    decided = here.keep(services("web", "db"), NOW + 1)
    assert here.answer("old").ok
    assert all(len(change.operations) < TXN_OPERATIONS_MAX for change in decided.changes)
    left = [held for held in here.kv.table.holdings.values() if held.record.service == "old"]
    assert len(left) == 5


@pytest.mark.parametrize("kind", ["pin", "unpin", "move", "release"])
def test_nothing_can_be_wished_for_a_service_without_a_lease(here: Lab, kind: str) -> None:
    here.wish("nobody", kind)  # type: ignore[arg-type]
    here.keep(services("web", "db"), NOW + 1)
    answer = here.answer("nobody")
    assert (answer.ok, "nobody has n" in answer.what) == (False, True)


def test_a_lease_whose_holding_was_lost_may_be_released_whatever_its_mark_was() -> None:
    facts = Facts(
        service=None,
        lease=Lease(IPv4Address(FREE), 1),
        holding=None,
        resting=(),
        obstacle=lambda address, force: None,
    )
    assert not isinstance(judge("web", Wish("release", "w1"), facts), Refuse)
    assert isinstance(judge("web", Wish("move", "w1"), facts), Refuse)


# Answers


def test_an_answer_is_given_once_and_forgotten_after_a_while(here: Lab) -> None:
    here.wish("web", "pin")
    said(here)
    again = here.keep(services("web", "db"), NOW + 2)
    assert (again.changes, again.due_at) == ((), NOW + 1 + ANSWER_KEPT_SECONDS)
    assert kinds(here.keep(services("web", "db"), NOW + 1 + ANSWER_KEPT_SECONDS)) == [
        "wish_forgotten web None"
    ]
    assert here.kv.table.wishes == {}


def test_what_else_is_due_for_the_service_comes_with_the_next_plan(here: Lab) -> None:
    changed = catalog(instance("web", ports="udp:53"), instance("db"))
    here.wish("web", "pin")
    first = here.keep(changed, NOW + 1)
    assert (kinds(first), first.due_at) == ([f"pinned web {here.address('web')}"], NOW + 1)
    assert kinds(here.keep(changed, NOW + 1)) == [f"ports_changed web {here.address('web')}"]
    assert holding(here, "web").pinned


def test_records_that_disagree_are_mended_first(here: Lab) -> None:
    here.kv.pairs.pop(address_key(IPv4Address(str(here.address("web")))))
    here.wish("web", "pin")
    granted, what = said(here)
    assert (granted, what.endswith("ask again")) == (False, True)
    here.wish("web", "pin")
    assert said(here, now=NOW + 2)[0]
    here.kv.put(service_key(WEB), b"?")
    here.wish("web", "unpin")
    here.keep(services("web", "db"), NOW + 3)
    assert not here.answer("web").ok


def test_a_wish_nobody_can_read_is_left_alone(here: Lab) -> None:
    here.kv.put(wish_key(WEB), b"?")
    assert here.keep(services("web", "db"), NOW + 1).changes == ()
    assert wish_key(WEB) in here.kv.table.unreadable


# The address that a definition asks for


def asking(address: str | None, *others: str) -> dict[str, Service]:
    return catalog(instance("web", virtual_ip=address), *(instance(name) for name in others))


def test_a_new_service_gets_the_address_it_asks_for() -> None:
    here = Lab(Pool(IPv4Network("10.100.0.0/16")))
    assert kinds(here.keep(asking(FREE), NOW)) == [f"granted web {FREE}"]
    assert here.keep(asking(FREE), NOW + 1).changes == ()
    assert here.keep(asking(None), NOW + 2).changes == (), "it stays when it no longer asks"


def test_a_service_moves_to_the_address_it_asks_for(here: Lab) -> None:
    before, was = epoch(here), here.address("web")
    decided = here.keep(asking(FREE, "db"), NOW + 1)
    assert kinds(decided) == [f"moved web {FREE}"]
    assert decided.changes[0].why == f"its definition asks for it; from {was}"
    assert epoch(here) > before
    assert audit(here.kv.table) == ()


def test_an_asked_address_that_is_taken_is_reported_with_its_holder(here: Lab) -> None:
    taken = str(here.address("db"))
    decided = here.keep(asking(taken, "db"), NOW + 1)
    (problem,) = decided.problems
    assert (problem.service, problem.kind) == ("web", "virtual_ip_refused")
    assert problem.what == f"its definition asks for {taken}, but {taken} is held by db"
    assert here.address("web") not in (None, taken)
    new = catalog(instance("new", virtual_ip=taken), instance("web"), instance("db"))
    assert here.keep(new, NOW + 2).problems[0].service == "new"
    assert here.address("new") not in (None, taken)


def test_an_asked_address_that_rests_is_had_when_it_has_rested(here: Lab) -> None:
    rests = str(here.address("db"))
    here.keep(asking(None), NOW + 1)
    here.keep(asking(None), NOW + 301)
    waiting = here.keep(asking(rests), NOW + 302)
    assert (waiting.changes, waiting.due_at) == ((), NOW + 301 + 3600)
    assert "rests for db until" in waiting.problems[0].what
    assert kinds(here.keep(asking(rests), NOW + 301 + 3600)) == [f"moved web {rests}"]


def test_of_two_that_ask_for_one_address_the_first_by_name_gets_it() -> None:
    here = Lab(Pool(IPv4Network("10.100.0.0/16")))
    both = catalog(instance("b", virtual_ip=FREE), instance("a", virtual_ip=FREE))
    decided = here.keep(both, NOW)
    assert here.address("a") == FREE
    assert [problem.what for problem in decided.problems] == [
        f"its definition asks for {FREE}, but {FREE} is held by a"
    ]


def test_ones_own_pin_stands_above_the_definition(here: Lab) -> None:
    here.wish("web", "pin")
    said(here)
    decided = here.keep(asking(FREE, "db"), NOW + 2)
    assert decided.changes == ()
    assert "but it is pinned to" in decided.problems[0].what


@pytest.mark.parametrize("kind", ["pin", "move"])
def test_a_wish_against_the_definition_is_refused(here: Lab, kind: str) -> None:
    here.keep(asking(FREE, "db"), NOW + 1)
    here.wish("web", kind, "10.100.8.8")  # type: ignore[arg-type]
    assert said(here, asking(FREE, "db"), NOW + 2) == (
        False,
        f"the definition of web asks for {FREE}; change its virtual_ip instead",
    )


def test_an_unclear_ask_is_reported_and_changes_nothing(here: Lab) -> None:
    was = here.address("web")
    for present in (
        catalog(instance("web", virtual_ip="10.100.0.300"), instance("db")),
        catalog(instance("web", "c1", virtual_ip=FREE), instance("web", "c2", virtual_ip="10.100.8.8"), instance("db")),
    ):  # fmt: skip
        decided = here.keep(present, NOW + 1)
        assert (decided.changes, decided.problems[0].kind) == ((), "virtual_ip_refused")
    assert here.address("web") == was
    fresh = Lab(Pool(IPv4Network("10.100.0.0/16")))
    assert fresh.keep(asking("nonsense"), NOW).problems
    assert fresh.address("web") is not None


def test_one_that_lost_its_address_to_a_contradiction_goes_where_it_asks() -> None:
    here = Lab(Pool(IPv4Network("10.100.0.0/16")))
    contested = IPv4Address("10.100.8.8")
    here.kv.put(service_key(WEB), to_json(Lease(contested, 7)))
    here.kv.put(service_key(DB), to_json(Lease(contested, 5)))
    assert f"moved web {FREE}" in kinds(here.keep(asking(FREE, "db"), NOW))
    assert audit(here.kv.table) == ()
