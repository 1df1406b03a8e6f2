"""Wishes, addresses that definitions ask for and changing pools, amid keepers that come, die and go on late."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from dnsd.keeper import transactions
from dnsd.plans import Rules
from dnsd.pool import Pool
from tests.property.test_dnsd import SERVICE, KeepersAtWork
from tests.support.dns import catalog, instance
from tests.support.leasing import Lab
from ztna.leases import audit

ADDRESS = st.sampled_from([f"10.0.0.{number}" for number in range(1, 12)] + ["10.9.0.1", "192.0.2.1"])
POOLS = (
    Pool(IPv4Network("10.0.0.0/29")),
    Pool(IPv4Network("10.0.0.0/28"), [IPv4Network("10.0.0.4/31")]),
    Pool(IPv4Network("10.0.0.0/29"), more=[IPv4Network("10.9.0.0/30")]),
)


class WishesAtWork(KeepersAtWork):
    """What KeepersAtWork does, with more that can collide; its invariants hold all the same."""

    lab: Lab

    @initialize()
    def start_asking(self) -> None:
        self.asked: dict[str, str] = {}

    @rule(service=SERVICE, address=st.none() | ADDRESS)
    def a_definition_asks(self, service: str, address: str | None) -> None:
        if address is None:
            self.asked.pop(service, None)
        else:
            self.asked[service] = address

    @rule(service=SERVICE, kind=st.sampled_from(["pin", "move"]), address=st.none() | ADDRESS)
    def somebody_wishes_an_address(self, service: str, kind: str, address: str | None) -> None:
        self.lab.wish(service, kind, address)  # type: ignore[arg-type]

    @rule(service=SERVICE, kind=st.sampled_from(["unpin", "release"]))
    def somebody_wishes_an_end(self, service: str, kind: str) -> None:
        self.lab.wish(service, kind)  # type: ignore[arg-type]

    @rule(pool=st.sampled_from(POOLS))
    def the_pool_changes(self, pool: Pool) -> None:
        self.lab.rules = Rules(pool, 10, 30)

    @rule()
    def every_wish_is_answered(self) -> None:
        self.lab.keep(self.services, self.now)
        assert all(stored.record.answer is not None for stored in self.kv.table.wishes.values())

    @rule()
    def what_is_settled_stays(self) -> None:
        for _ in range(4):
            self.lab.keep(self.services, self.now)
        assert self.lab.plan(self.services, self.now, read_at=self.now).changes == ()

    @rule()
    def the_kv_is_lost_and_the_clock_goes_back(self) -> None:
        self.lab.keep(self.services, self.now)
        self.kv.pairs.clear()
        self.released.clear()
        self.now -= 5.0

    @rule()
    def a_late_keeper_changes_nothing(self) -> None:
        late = self.lab.plan(self.services, self.now, read_at=self.now)
        self.kv.holder = "other"
        before = dict(self.kv.pairs)
        assert not any(map(self.kv.carry_out, transactions(late.changes, "me")))
        assert self.kv.pairs == before
        self.kv.holder = "me"

    @property
    def services(self) -> dict[str, object]:
        return catalog(  # type: ignore[return-value]
            *(instance(name, virtual_ip=self.asked.get(name)) for name in sorted(self.present))
        )

    @invariant()
    def nobody_is_given_what_is_outside_the_pool(self) -> None:
        if not hasattr(self, "kv") or not hasattr(self, "asked"):
            return
        decided = self.lab.plan(self.services, self.now, read_at=self.now)
        for change in decided.changes:
            if change.kind in ("granted", "returned", "moved"):
                assert change.address in self.lab.rules.pool

    def teardown(self) -> None:
        if not hasattr(self, "kv") or not hasattr(self, "asked"):
            return
        for _ in range(4):
            self.lab.keep(self.services, self.now)
        assert audit(self.kv.table) == ()
        for service, address in self.asked.items():
            holder = self.kv.table.holdings.get(IPv4Address(address))
            named = [each for each in self.asked if self.asked[each] == address and each in self.present]
            if (
                holder is None
                and address in map(str, self.lab.rules.pool.probe("x"))
                and service in self.present
            ):
                raise AssertionError(f"{address} is free, and {named} ask for it")


WishesAtWork.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestWishesAtWork = WishesAtWork.TestCase
