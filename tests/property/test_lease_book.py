"""A connector's book of leases under any history of the KV: grants, releases, restores, and answers that come late.

Without a restore no old answer ever wins; with restores the book says what the KV has, once that is quiet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.connector import leasebook
from sidecar.connector.leasebook import LeaseBook
from ztna.catalog import KvPair, KvSnapshot
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulUnavailable
from ztna.jsontypes import to_json
from ztna.leases import SERVICE_PREFIX, Lease, service_key
from ztna.names import ServiceName

SERVICES = [ServiceName(name) for name in ("ant", "bee", "cow")]
ADDRESSES = [IPv4Address(f"10.100.0.{number}") for number in range(2, 6)]
TURNS = 10
"""Turns of the event loop after which every task waits for the test again."""
SETTLING_ANSWERS = 20
"""More than can wait at once, with those that are asked again."""

State = Mapping[ServiceName, Lease]

GRANT = st.tuples(st.just("grant"), st.sampled_from(SERVICES), st.sampled_from(ADDRESSES))
RELEASE = st.tuples(st.just("release"), st.sampled_from(SERVICES))
WATCHED = st.tuples(st.just("watched"), st.integers(0, 3))
ASKED = st.tuples(st.just("asked"), st.sampled_from(SERVICES))
ANSWERED = st.tuples(st.just("answered"), st.integers(0, 3), st.booleans())
STEPS = st.one_of(GRANT, GRANT, RELEASE, WATCHED, WATCHED, ASKED, ANSWERED)
RESTORED = st.tuples(st.just("restored"), st.integers(0, 10))


class LateConsul:
    """Answers consistent reads when told to, with what the KV was at any time since they were asked."""

    def __init__(self) -> None:
        self.states: list[State] = [{}]
        self.waiting: list[tuple[int, str, asyncio.Future[int]]] = []

    async def read(self, *_: object, **__: object) -> None:
        """Leave the watch waiting: the test publishes what it shows."""
        await asyncio.Event().wait()

    async def kv_list(self, prefix: str, *, consistent: bool) -> tuple[KvPair, ...]:
        assert consistent
        return tuple(self.pairs(await self._answer(prefix)).values())

    async def kv_get(self, key: str, *, consistent: bool) -> KvPair | None:
        assert consistent
        return self.pairs(await self._answer(key)).get(key)

    async def _answer(self, what: str) -> int:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.waiting.append((len(self.states) - 1, what, answer))
        return await answer

    def pairs(self, version: int) -> Mapping[str, KvPair]:
        """Return the KV as of a version; a record that is restored has the index that it had."""
        return {
            service_key(name): KvPair(key=service_key(name), value=to_json(lease), modify_index=lease.epoch)
            for name, lease in self.states[version].items()
        }


class World:
    """A KV, its keeper and a connector's book; the book's changes are looked at as they come."""

    def __init__(self) -> None:
        self.consul = LateConsul()
        self.book = LeaseBook(cast(ConsulClient, self.consul), SERVICES, self._changed)
        self.known: dict[ServiceName, Lease] = {}
        self.went_back: list[ServiceName] = []
        self.reads: set[asyncio.Task[object]] = set()
        self._epoch = 1_000

    def _changed(self, service: ServiceName, lease: Lease | None) -> None:
        assert self.book.lease(service) == lease
        was = self.known.pop(service, None)
        if lease is not None:
            self.known[service] = lease
        if was is not None and lease is not None and lease.epoch < was.epoch:
            self.went_back.append(service)

    @property
    def state(self) -> State:
        return self.consul.states[-1]

    def grant(self, service: ServiceName, address: IPv4Address) -> None:
        """As the keeper does: an address that nobody has, an epoch above all that were."""
        if address not in {lease.ip for lease in self.state.values()}:
            self._epoch += 1
            self.consul.states.append({**self.state, service: Lease(address, self._epoch)})

    def release(self, service: ServiceName) -> None:
        self.consul.states.append({name: lease for name, lease in self.state.items() if name != service})

    def restored(self, back: int) -> None:
        """Let the KV be again what it was some changes ago."""
        self.consul.states.append(self.consul.states[-1 - min(back, len(self.consul.states) - 1)])

    def watched(self, late: int) -> None:
        """Let the watch show the KV as it was some changes ago."""
        version = max(0, len(self.consul.states) - 1 - late)
        self.book.watch._publish(KvSnapshot(pairs=self.consul.pairs(version), index=version))

    def asked(self, service: ServiceName) -> None:
        """Let an agent name an epoch that the book does not have."""
        self.reads.add(asyncio.ensure_future(self.book.read_again(service, 10**9)))

    def answered(self, late: int, well: bool) -> None:
        """Answer the longest waiting read: with a state since it was asked, or not at all."""
        if self.consul.waiting:
            since, _, answer = self.consul.waiting.pop(0)
            if answer.cancelled():
                return
            if well:
                answer.set_result(max(since, len(self.consul.states) - 1 - late))
            else:
                answer.set_exception(ConsulUnavailable("no leader"))

    async def settle(self) -> None:
        """Let the watch show what the KV has until nothing is asked any more."""
        self.watched(0)
        for _ in range(SETTLING_ANSWERS):
            await turns()
            self.answered(0, well=True)
            self.watched(0)
        await turns()


async def turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def play(steps: list[tuple[object, ...]]) -> World:
    world = World()
    running = asyncio.ensure_future(world.book.run())
    try:
        for step, *arguments in steps:
            getattr(world, str(step))(*arguments)
            await turns()
        await world.settle()
    finally:
        for task in (running, *world.reads):
            task.cancel()
        await asyncio.gather(running, *world.reads, return_exceptions=True)
    return world


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    """Do not pause between two reads: the test decides when they are answered."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(leasebook, "COMPARE_AGAIN_SECONDS", 0.0)
        patched.setattr(leasebook, "READ_AGAIN_EVERY_SECONDS", 0.0)
        yield


def says_what_the_kv_has(world: World) -> bool:
    """Whether the book has each lease of the KV, and none at an address that is another's there."""
    addresses = {lease.ip: name for name, lease in world.state.items()}
    return all(world.book.lease(name) == lease for name, lease in world.state.items()) and all(
        addresses.get(lease.ip, name) == name for name, lease in world.known.items()
    )


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(STEPS, max_size=40))
def test_without_a_restore_no_old_answer_wins(steps: list[tuple[object, ...]]) -> None:
    world = asyncio.run(play(steps))
    assert world.went_back == []
    assert says_what_the_kv_has(world)


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.one_of(STEPS, RESTORED), max_size=40))
def test_what_was_restored_is_gone_by(steps: list[tuple[object, ...]]) -> None:
    assert says_what_the_kv_has(asyncio.run(play(steps)))


def test_an_older_lease_counts_once_a_read_that_began_later_has_it() -> None:
    """The read that waits while the KV is restored may still say what was before: then it is asked again."""
    ant, (first, second, *_) = SERVICES[0], ADDRESSES
    steps: list[tuple[object, ...]] = [("grant", ant, first), ("grant", ant, second)]
    steps += [("watched", 0), ("watched", 1)]
    early = asyncio.run(play([*steps, ("answered", 0, True)]))
    assert (early.went_back, early.book.lease(ant)) == ([], Lease(second, 1_002))
    late = asyncio.run(play([*steps, ("restored", 1), ("answered", 0, False), ("answered", 0, True)]))
    assert (late.went_back, late.book.lease(ant)) == ([ant], Lease(first, 1_001))


def test_what_was_learnt_while_the_kv_was_read_counts_more_than_what_was_read() -> None:
    ant, (first, second, third, _) = SERVICES[0], ADDRESSES
    steps: list[tuple[object, ...]] = [("grant", ant, first), ("grant", ant, second), ("watched", 0)]
    steps += [("restored", 1), ("watched", 0), ("grant", ant, third), ("watched", 0), ("answered", 1, True)]
    world = asyncio.run(play(steps))
    assert (world.went_back, world.book.lease(ant)) == ([], Lease(third, 1_003))


def test_a_record_that_was_lost_and_comes_back_by_a_restore_is_gone_by_again() -> None:
    ant, bee, first = SERVICES[0], SERVICES[1], ADDRESSES[0]
    steps: list[tuple[object, ...]] = [("grant", ant, first), ("watched", 0), ("release", ant)]
    steps += [("grant", bee, first), ("watched", 0), ("answered", 0, True), ("watched", 0)]
    lost = asyncio.run(play(steps))
    assert (lost.book.lease(ant), lost.book.lease(bee)) == (None, Lease(first, 1_002))
    back = asyncio.run(play([*steps, ("restored", 2)]))
    assert (back.book.lease(ant), back.book.lease(bee)) == (Lease(first, 1_001), None)


def test_an_address_is_anothers_by_a_record_at_an_index_that_was_one_elsewhere() -> None:
    """A Consul that was set up anew gives out the indexes of the old one again."""
    ant, bee, (first, second, *_) = SERVICES[0], SERVICES[1], ADDRESSES

    def shown(*leases: tuple[ServiceName, IPv4Address, int]) -> KvSnapshot:
        found = (
            KvPair(key=service_key(name), value=to_json(Lease(ip, epoch)), modify_index=20)
            for name, ip, epoch in leases
        )
        return KvSnapshot(pairs={pair.key: pair for pair in found}, index=20)

    async def scene() -> None:
        consul = LateConsul()
        book = LeaseBook(cast(ConsulClient, consul), [ant], lambda *_: None)
        book.watch._publish(shown((ant, first, 5), (bee, second, 6)))
        book.watch._publish(shown((bee, second, 6)))
        running = asyncio.ensure_future(book.run())
        await turns()
        assert (book.lease(ant), consul.waiting) == (Lease(first, 5), []), "nobody else's so far"
        book.watch._publish(shown((bee, first, 7)))
        await turns()
        assert [what for _, what, _ in consul.waiting] == [SERVICE_PREFIX], "it asks Consul"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scene())
