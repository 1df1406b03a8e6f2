"""sidecar.link.relays and .discovery: which relays a sidecar keeps, from its list and from DNS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from sidecar.link import discovery, relays
from sidecar.link.discovery import RELAYS_MAX, follow_relays, targets_of
from sidecar.link.relays import RelayClients
from ztna.config import Endpoint, RelayTarget
from ztna.errors import ConfigError, ResolverUnavailable
from ztna.names import Zone
from ztna.resolver import SrvAnswer, SrvRecord
from ztna.wire.control import Drain

DEADLINE_SECONDS = 10


def target(name: str, host: str = "192.0.2.1", port: int = 4433) -> RelayTarget:
    return RelayTarget(name=name, address=Endpoint(host, port))


def record(
    name: str, priority: int = 0, weight: int = 0, addresses: tuple[str, ...] = ("192.0.2.1",)
) -> SrvRecord:
    return SrvRecord(priority, weight, 4433, f"{name}.relay.ztna.local", addresses)


class TestTargets:
    def test_the_first_label_is_the_relays_name(self) -> None:
        assert targets_of([record("East")]) == (target("east"),)

    def test_what_no_certificate_can_carry_is_no_relay(self) -> None:
        assert targets_of([record("a--b"), record("_x"), record("east")]) == (target("east"),)

    def test_by_priority_and_weight(self) -> None:
        found = targets_of([record("c", 1), record("b", 0, 1), record("a", 0, 9), record("a", 0, 9)])
        assert [each.name for each in found] == ["a", "b", "c"]

    def test_a_target_without_addresses_is_looked_up_when_dialled(self) -> None:
        (found,) = targets_of([record("east", addresses=())])
        assert found.address == Endpoint("east.relay.ztna.local", 4433)

    def test_they_are_bounded(self) -> None:
        assert len(targets_of([record(f"r{number}") for number in range(RELAYS_MAX + 3)])) == RELAYS_MAX


class Answers:
    """A resolver that says these things in turn, and then nothing more."""

    def __init__(self, *answers: SrvAnswer | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.over = asyncio.Event()

    async def srv(self, name: str) -> SrvAnswer:
        self.asked.append(name)
        if not self.answers:
            self.over.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if answer is None:
            raise ResolverUnavailable("nobody there")
        return answer


def answer(*names: str, stale: bool = False) -> SrvAnswer:
    return SrvAnswer(tuple(record(name) for name in names), 0, negative=not names, stale=stale)


async def test_what_dns_says_is_followed_and_what_it_does_not_say_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("REFRESH_SECONDS_MIN", "FAILURE_SECONDS_MIN", "FAILURE_SECONDS_MAX"):
        monkeypatch.setattr(discovery, name, 0.0)
    resolver = Answers(answer("a"), None, None, answer("b", stale=True), answer("a", "b"), answer())
    heard: list[Sequence[str]] = []
    following = asyncio.ensure_future(
        follow_relays(resolver, Zone("mesh.test"), lambda found: heard.append([each.name for each in found]))
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        await resolver.over.wait()
    following.cancel()
    assert heard == [["a"], ["a", "b"], []]
    assert set(resolver.asked) == {"_ztna-relay._udp.mesh.test"}


class Client:
    """Stands for a RelayClient: runs until it is cancelled."""

    def __init__(self, target: RelayTarget) -> None:
        self.target = target
        self.connected = False
        self.credentials: object = None
        self.sent: list[object] = []

    def send(self, message: object) -> bool:
        self.sent.append(message)
        return True

    def use_credentials(self, credentials: object) -> None:
        self.credentials = credentials

    async def run(self) -> None:
        self.connected = True
        try:
            await asyncio.Event().wait()
        finally:
            self.connected = False


class _Over(Exception):
    """The test has ended: what still runs is cancelled."""


class Owner:
    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.heard: list[tuple[str, str]] = []
        self.clients = RelayClients(
            Client,  # type: ignore[arg-type]
            tasks=tasks,
            left=lambda client: self.heard.append(("left", self.clients.label(client))),
            back=lambda client: self.heard.append(("back", self.clients.label(client))),
            gone=lambda label: self.heard.append(("gone", label)),
        )

    @property
    def labels(self) -> list[str]:
        return [self.clients.label(client) for client in self.clients]


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    with pytest.raises(ExceptionGroup, check=lambda group: isinstance(group.exceptions[0], _Over)):
        async with asyncio.TaskGroup() as tasks:
            yield Owner(tasks)
            raise _Over


async def test_listed_relays_are_labelled_by_name_and_where_needed_by_address(owner: Owner) -> None:
    owner.clients.add([target("east"), target("west"), target("west", "192.0.2.2")])
    assert owner.labels == ["east", "west@192.0.2.1:4433", "west@192.0.2.2:4433"]
    assert not owner.clients.connected
    owner.clients.start((), Zone("ztna.local"))
    await asyncio.sleep(0)
    assert owner.clients.connected
    with pytest.raises(ConfigError, match="listed twice"):
        owner.clients.add([target("east")])


async def test_found_relays_come_and_after_a_while_go(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    owner.clients.add([target("east")])
    owner.clients.start((), Zone("ztna.local"))
    owner.clients.found([target("east"), target("west"), target("east", "192.0.2.9")])
    assert owner.labels == ["east", "west", "east@192.0.2.9:4433"]
    owner.clients.found([target("east", "192.0.2.9")])
    owner.clients.found([target("east", "192.0.2.9")])
    assert owner.heard == [("left", "west")], "and it is still there"
    owner.clients.found([target("west"), target("east", "192.0.2.9")])
    assert owner.heard == [("left", "west"), ("back", "west")]
    monkeypatch.setattr(relays, "LEAVE_SECONDS", 0.0)
    owner.clients.found([])
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(owner.labels) > 1:
            await asyncio.sleep(0.01)
    assert owner.labels == ["east"], "that one is in the configuration"
    assert set(owner.heard[-2:]) == {("gone", "west"), ("gone", "east@192.0.2.9:4433")}


async def test_all_use_new_credentials(owner: Owner) -> None:
    owner.clients.add([target("east"), target("west")])
    fresh = object()
    owner.clients.use_credentials(fresh)  # type: ignore[arg-type]
    assert all(client.credentials is fresh for client in owner.clients)


async def test_a_message_goes_to_one_relay_and_nowhere_when_that_is_forgotten(owner: Owner) -> None:
    """What a timer still has to say to a relay that DNS names no longer ends nobody's daemon."""
    owner.clients.add([target("east"), target("west")])
    drain = Drain(1.0)
    assert owner.clients.send("west", drain)
    assert [client.sent for client in owner.clients] == [[], [drain]]  # type: ignore[attr-defined]
    assert not owner.clients.send("north", drain)
