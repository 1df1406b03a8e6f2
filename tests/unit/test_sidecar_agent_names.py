"""sidecar.agent.names and relayed_leases: questions through relays, and the leases that the answers tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address
from typing import Any

import msgspec
import pytest

from sidecar.agent import names as names_module
from sidecar.agent import relayed_leases
from sidecar.agent.names import RelayedNames
from sidecar.agent.relayed_leases import RelayedLeases
from sidecar.agent.relays import Relays, RelayState
from sidecar.agent.rereading import READS_WAITING_MAX
from tests.support.identities import grants
from ztna.dns import Code, HostData, Message, Record, Type, decode, encode_query, encode_response
from ztna.errors import ResolverUnavailable
from ztna.jsontypes import Binary
from ztna.leases import Lease, Port
from ztna.names import ServiceName, Zone
from ztna.wire.control import DnsQuery, DnsResponse

ZONE = Zone("ztna.local")
LIST = f"_services._dns-sd._udp.{ZONE}"
WEB, DATABASE = ServiceName("web-app"), ServiceName("db")
WAIT_SECONDS = 20.0


class Relay:
    """What relays say; a relay that is `mute` takes questions and says nothing."""

    def __init__(self) -> None:
        self.relays = Relays(["near", "far"])
        for name in ("near", "far"):
            self.relays.set(name, RelayState.UP)
        self.names = RelayedNames(self.relays, self.send)
        self.mute: set[str] = set()
        self.away: set[str] = set()
        self.asked: list[tuple[str, DnsQuery]] = []
        self.code = Code.NOERROR

    def send(self, relay: str, query: DnsQuery) -> bool:
        self.asked.append((relay, query))
        if relay in self.away:
            return False
        if relay not in self.mute:
            message = decode(query.message)
            record = Record(message.questions[0].name, Type.A, 1, 30, IPv4Address("10.100.0.2"))
            response = DnsResponse(query.request, Binary(encode_response(message, self.code, [record])))
            asyncio.get_running_loop().call_soon(self.names.received, relay, response)
        return True


async def test_the_nearest_relay_is_asked_and_another_where_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relay = Relay()
    message = await relay.names.ask("web-app.ztna.local", Type.A)
    assert message.answers[0].data == IPv4Address("10.100.0.2")
    monkeypatch.setattr(names_module, "RELAY_SECONDS", 0.05)
    relay.mute.add("near")
    assert (await relay.names.ask("web-app.ztna.local", Type.A)).answers
    relay.away.add("far")
    with pytest.raises(ResolverUnavailable, match="near, far"):
        await relay.names.ask("web-app.ztna.local", Type.A)
    assert [name for name, _ in relay.asked] == ["near", "near", "far", "near", "far"]
    for name in ("near", "far"):
        relay.relays.set(name, RelayState.DOWN)
    with pytest.raises(ResolverUnavailable, match="none is connected"):
        await relay.names.exchange(encode_query(7, "x.ztna.local", Type.A, 1232))


async def test_only_what_answers_the_question_counts() -> None:
    relay = Relay()
    relay.names.received("near", DnsResponse(99, Binary(b"x" * 12)))  # asked by nobody
    relay.code = Code.SERVFAIL
    with pytest.raises(ResolverUnavailable, match="code 2"):
        await relay.names.ask("web-app.ztna.local", Type.A)
    for wrong in (b"x" * 30, encode_response(decode(encode_query(1, "y", Type.A, 1232)), Code.NOERROR)):
        relay.mute.add("near")
        asking = asyncio.create_task(relay.names.ask("web-app.ztna.local", Type.A))
        await asyncio.sleep(0)
        name, query = relay.asked[-1]
        relay.names.received(name, DnsResponse(query.request, Binary(wrong)))
        relay.names.received(name, DnsResponse(query.request, Binary(wrong)))  # once only
        with pytest.raises(ResolverUnavailable):
            await asking


class Told:
    """What DNS tells; `away` fails every question, `silent` those about some services, and `slow` waits for `let`."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.away = False
        self.silent: set[str] = set()
        self.slow = ""
        self.let = asyncio.Event()
        self.under_way = 0
        self.asked: list[str] = []
        self.unlisted: set[str] = set()
        """What a list that is truncated leaves out."""

    async def ask(self, name: str, kind: Type) -> Message:
        self.asked.append(name)
        service = name.partition(".")[0]
        if self.away or service in self.silent:
            raise ResolverUnavailable("away")
        query = decode(encode_query(1, name, kind, 1232))
        lease = self.leases.get(service)
        if service == self.slow:
            self.under_way += 1
            await self.let.wait()
            self.under_way -= 1
        records = []
        if kind is Type.PTR:
            listed = [each for each in self.leases if each not in self.unlisted]
            records = [Record(name, kind, 1, 30, HostData(f"_{each}._tcp.{ZONE}")) for each in listed]
        elif lease is not None:
            ports = ",".join(f"{port.protocol}:{port.port}" for port in lease.ports)
            strings = (f"ports={ports}".encode(), f"epoch={lease.epoch}".encode())
            records = [Record(name, kind, 1, 30, lease.ip if kind is Type.A else strings)]
        message = decode(encode_response(query, Code.NOERROR, records))
        return msgspec.structs.replace(message, truncated=kind is Type.PTR and bool(self.unlisted))


class Following:
    def __init__(self, services: list[str]) -> None:
        self.told = Told()
        self.changes: list[Mapping[ServiceName, Lease]] = []
        self.reads: list[tuple[ServiceName, Lease | None]] = []
        self.leases = RelayedLeases(
            self.told,
            ZONE,
            grants(services),
            lambda service, lease: lease.ip.packed[0] == 10,
            changed=self.changes.append,
            read=lambda service, lease: self.reads.append((service, lease)),
        )


@asynccontextmanager
async def following(*services: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Following]:
    monkeypatch.setattr(relayed_leases, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(relayed_leases, "RETRY_SECONDS", 0.02)
    made = Following(list(services))
    made.told.leases["web-app"] = Lease(IPv4Address("10.100.0.2"), 1, (Port("tcp", 80),))
    made.told.leases["db"] = Lease(IPv4Address("10.100.0.3"), 1, (Port("tcp", 5432),))
    running = asyncio.create_task(made.leases.run())
    try:
        yield made
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def until(holds: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


async def test_the_granted_services_are_followed_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with following("web-app", monkeypatch=monkeypatch) as made:
        await until(lambda: made.told.asked.count("web-app.ztna.local") > 6)
        assert made.changes == [{WEB: made.told.leases["web-app"]}], (
            "told when something changed, and only then"
        )
        assert made.leases.addresses() == {"web-app": IPv4Address("10.100.0.2")}
        assert "db.ztna.local" not in made.told.asked
        made.leases.use_grants(grants(["*"]))
        await until(lambda: len(made.changes[-1]) == 2)
        del made.told.leases["web-app"]
        await until(lambda: set(made.changes[-1]) == {DATABASE})
        # Somebody else's network is served by nobody here.
        made.told.leases["db"] = Lease(IPv4Address("192.0.2.1"), 2, ())
        await until(lambda: made.changes[-1] == {})


async def test_what_a_truncated_list_leaves_out_is_asked_for_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with following("*", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes and len(made.changes[-1]) == 2)
        made.told.unlisted = {"db"}
        await until(lambda: made.told.asked.count(f"_services._dns-sd._udp.{ZONE}") > 3)
        before = made.told.asked.count(f"db.{ZONE}")
        await until(lambda: made.told.asked.count(f"db.{ZONE}") > before + 2)
        assert len(made.changes[-1]) == 2
        del made.told.leases["db"]
        await until(lambda: set(made.changes[-1]) == {WEB})


async def test_one_on_no_list_is_learnt_when_a_program_resolves_it_and_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with following("*", monkeypatch=monkeypatch) as made:
        made.told.unlisted = {"db"}
        await until(lambda: made.changes)
        database = made.told.leases["db"]
        assert set(made.changes[-1]) == {WEB}
        await made.leases.resolved(f"Db.{ZONE}", {database.ip})
        assert made.leases.leases[DATABASE] == database
        rounds = made.told.asked.count(LIST)
        await until(lambda: made.told.asked.count(LIST) > rounds + 2)
        assert made.leases.leases[DATABASE] == database


async def test_what_a_program_resolves_is_asked_for_where_it_is_not_known_as_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, web = Following(["web-app", "db"]), f"web-app.{ZONE}"
    made.told.leases["web-app"] = first = Lease(IPv4Address("10.100.0.2"), 1, (Port("tcp", 80),))
    await made.leases.resolved(web, {first.ip})
    assert made.changes == [{WEB: first}] and len(made.told.asked) == 2
    for known in (web, "web-app.example.org", f"other.{ZONE}"):
        await made.leases.resolved(known, {first.ip})
    assert len(made.told.asked) == 2, "known, of another zone, not granted"
    made.told.leases["web-app"] = moved = Lease(IPv4Address("10.100.0.9"), 2, (Port("tcp", 80),))
    monkeypatch.setattr(relayed_leases, "SERVICES_MAX", 1)
    await made.leases.resolved(web, {moved.ip})
    await made.leases.resolved(f"db.{ZONE}", {first.ip})
    assert made.changes == [{WEB: first}, {WEB: moved}] and len(made.told.asked) == 4, "no room for another"


async def test_a_service_is_asked_for_once_however_many_names_below_it_are_resolved() -> None:
    made = Following(["web-app"])
    made.told.leases["web-app"] = first = Lease(IPv4Address("10.100.0.2"), 1, (Port("tcp", 80),))
    names = [f"web-app.{ZONE}", *(f"i{number}.web-app.{ZONE}" for number in range(20))]
    await asyncio.gather(*(made.leases.resolved(name, {first.ip}) for name in names))
    assert made.changes == [{WEB: first}] and len(made.told.asked) == 2


async def test_an_answer_about_a_name_does_not_wait_for_relays_that_say_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, asked = Following(["web-app"]), asyncio.Event()

    async def silent(name: str, kind: Type) -> Message:
        asked.set()
        return await asyncio.Future()

    monkeypatch.setattr(made.told, "ask", silent)
    monkeypatch.setattr(relayed_leases, "RESOLVED_SECONDS", 0.05)
    async with asyncio.timeout(30.0):
        await made.leases.resolved(f"web-app.{ZONE}", {IPv4Address("10.100.0.2")})
    assert asked.is_set() and made.changes == []


async def test_one_is_read_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with following("web-app", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes)
        monkeypatch.setattr(relayed_leases, "ROUND_SECONDS", 1000.0)
        newer = made.told.leases["web-app"] = Lease(IPv4Address("10.100.0.9"), 2, (Port("tcp", 80),))
        made.leases.read_again(WEB)
        made.leases.read_again(DATABASE)  # not granted: nobody is asked, and nothing said
        await until(lambda: made.reads)
        assert made.reads == [(WEB, newer)] and made.changes[-1] == {WEB: newer}
        made.told.away = True
        made.leases.read_again(WEB)
        del made.told.leases["web-app"]
        made.told.away = False
        made.leases.read_again(WEB)
        await until(lambda: made.changes[-1] == {})
        for _ in range(READS_WAITING_MAX + 1):
            made.leases.read_again(WEB)


async def test_names_that_nobody_answers_for_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_leases, "HOLD_SECONDS", 0.5)
    async with following("web-app", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes)
        made.told.away = True
        before = len(made.told.asked)
        await until(lambda: len(made.told.asked) > before + 2)
        assert len(made.changes) == 1
        await until(lambda: made.changes[-1] == {})
        made.told.away = False
        await until(lambda: len(made.changes[-1]) == 1)
    async with following("*", monkeypatch=monkeypatch) as made:
        made.told.away = True
        await until(lambda: len(made.told.asked) > 3)
        made.told.away = False
        await until(lambda: made.changes and len(made.changes[-1]) == 2)


async def test_a_service_that_has_gone_unanswered_is_not_asked_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with following("*", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes)
        made.told.silent = {"db"}
        await until(lambda: made.told.asked.count("db.ztna.local") > 6)
        del made.told.leases["db"]
        await until(lambda: made.changes[-1] == {WEB: made.told.leases["web-app"]})
        monkeypatch.setattr(relayed_leases, "ROUND_SECONDS", 1000.0)
        monkeypatch.setattr(relayed_leases, "RETRY_SECONDS", 0.0)
        rounds = made.told.asked.count(LIST)
        made.leases.look_soon()
        await until(lambda: made.told.asked.count(LIST) > rounds)
        rounds = made.told.asked.count(LIST)
        for number in range(50):
            made.leases.read_again(WEB)
            await until(lambda: len(made.reads) > number)  # noqa: B023 - awaited here
        assert made.told.asked.count(LIST) <= rounds + 1


async def test_only_what_was_not_answered_is_asked_for_again_soon_and_keeps_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with following("*", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes)
        monkeypatch.setattr(relayed_leases, "ROUND_SECONDS", 1000.0)
        made.told.silent = {"db"}
        rounds = made.told.asked.count(LIST)
        made.leases.look_soon()
        await until(lambda: made.told.asked.count(LIST) > rounds)
        before, again = made.told.asked.count("web-app.ztna.local"), made.told.asked.count("db.ztna.local")
        await until(lambda: made.told.asked.count("db.ztna.local") > again + 40)
        assert made.told.asked.count("web-app.ztna.local") <= before + 2
        assert len(made.changes) == 1
        newer = made.told.leases["db"] = Lease(IPv4Address("10.100.0.3"), 2, (Port("tcp", 5432),))
        made.told.silent = set()
        await until(lambda: made.changes[-1][DATABASE] == newer)


async def test_what_was_read_again_during_a_round_is_not_undone_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with following("web-app", "db", monkeypatch=monkeypatch) as made:
        await until(lambda: made.changes)
        made.told.slow = "db"
        asked = made.told.asked.count("web-app.ztna.local")
        await until(lambda: made.told.under_way and made.told.asked.count("web-app.ztna.local") > asked + 1)
        newer = made.told.leases["web-app"] = Lease(IPv4Address("10.100.0.2"), 2, (Port("tcp", 80),))
        made.leases.read_again(WEB)
        await until(lambda: made.reads)
        monkeypatch.setattr(relayed_leases, "ROUND_SECONDS", 1000.0)
        made.told.slow = ""
        made.told.let.set()
        await until(lambda: made.told.under_way == 0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert made.leases.leases[WEB] == newer
        assert [change[WEB].epoch for change in made.changes] == [1, 2]
