"""RelayClient against a relay that speaks real QUIC on loopback."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar.link import control
from sidecar.link.control import RelayClient
from sidecar.link.dialling import settings
from tests.support.certificates import Pki
from tests.support.fake_relay import FakeRelay, fake_relay
from ztna.config import Endpoint, RelayTarget
from ztna.credentials import Credentials
from ztna.errors import IdentityError, Refused
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.quic import Connection
from ztna.reasons import Reason
from ztna.telemetry import DROPS, REFUSALS
from ztna.wire.control import (
    Accepted,
    Address,
    Closed,
    ForwarderBind,
    Health,
    Hello,
    Offered,
    Opened,
    PeerIdentity,
)

SESSION = SessionId("0123456789abcdef")
WAIT_SECONDS = 15.0


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(Path(tmp_path_factory.mktemp("pki")))


class Owner:
    """Writes down what a RelayClient tells."""

    def __init__(self, pki: Pki, target: RelayTarget, credentials: Credentials | None = None) -> None:
        self.events: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self.client = RelayClient(
            target,
            credentials or pki.credentials(pki.connector()),
            on_message=lambda client, message: self.events.put_nowait(("message", message)),
            on_connected=lambda client: self.events.put_nowait(("connected", client.connection)),
            on_lost=lambda client, reason: self.events.put_nowait(("lost", reason)),
        )

    async def next(self) -> tuple[str, object]:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.events.get()


@asynccontextmanager
async def running(
    pki: Pki, target: RelayTarget, credentials: Credentials | None = None
) -> AsyncIterator[Owner]:
    owner = Owner(pki, target, credentials)
    task = asyncio.create_task(owner.client.run())
    try:
        yield owner
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_problem(owner: Owner, text: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while text not in (owner.client.problem or ""):
            await asyncio.sleep(0.01)


async def test_messages_go_both_ways(pki: Pki) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        assert not owner.client.send(Accepted(SESSION))
        peer = await relay.peer()
        assert (await owner.next())[0] == "connected"
        assert owner.client.connected and owner.client.problem is None
        assert owner.client.send(Accepted(SESSION))
        assert await peer.heard(Accepted) == Accepted(SESSION)
        closed = Closed(SESSION, Reason.PEER_GONE)
        peer.say(closed)
        assert await owner.next() == ("message", closed)


@pytest.mark.parametrize("role, size", [("connector", 1360), ("agent", 1350)])
async def test_packets_are_as_large_as_the_way_is_known_to_carry(pki: Pki, role: str, size: int) -> None:
    """protocol.md: 1360 between relay and connector, elsewhere 1350; not before a probe of it was acknowledged."""
    owner_pki = pki.credentials(pki.connector() if role == "connector" else pki.agent())
    assert settings(owner_pki.identity).udp_payload == 1200
    async with fake_relay(pki) as relay, running(pki, relay.target, owner_pki) as owner:
        await relay.peer()
        assert (await owner.next())[0] == "connected"
        assert owner.client._control is not None
        connection = owner.client._control._connection
        assert isinstance(connection, Connection)
        engine = connection._engine
        async with asyncio.timeout(WAIT_SECONDS):
            while engine.udp_payload != size:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("named", "taken"),
    [("127.0.0.1:9", True), ("192.0.2.7:4434", True), ("192.0.2.7:4435", False), ("127.0.0.2:9", False)],
)
async def test_a_forwarder_is_on_the_relays_host_or_where_configured(
    pki: Pki, named: str, taken: bool
) -> None:
    """A stolen relay cannot have us dial, or bind at, any address it likes: what is not its own is taken out."""
    host, port = named.split(":")
    bind = ForwarderBind(Address(host, int(port)), Binary(bytes(16)), Secret(bytes(32)))
    agent = PeerIdentity("ann", "f" * 64)
    offered = Offered(SESSION, ServiceName("web"), agent, forwarder=bind, probe_key=Secret(bytes(32)))
    count = REFUSALS.labels("relay_client", Reason.UNTRUSTED.value)._value
    async with fake_relay(pki) as relay:
        target = msgspec.structs.replace(relay.target, forwarders=(Address("192.0.2.7", 4434),))
        async with running(pki, target) as owner:
            peer = await relay.peer()
            await owner.next()
            before = count.get()
            peer.say(offered)
            expected = offered if taken else msgspec.structs.replace(offered, forwarder=None)
            assert await owner.next() == ("message", expected)
            assert count.get() - before == (0 if taken else 1)


@pytest.mark.parametrize(
    ("host", "relay_at", "taken"),
    [
        ("192.0.2.9", "192.0.2.7", True),
        ("8.8.8.8", "192.0.2.7", True),
        ("10.0.0.1", "192.0.2.7", True),
        ("127.0.0.1", "192.0.2.7", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "192.0.2.7", False),
        ("169.254.169.254", "127.0.0.1", False),
        ("fe80::1", "192.0.2.7", False),
        ("0.0.0.0", "127.0.0.1", False),
    ],
)
async def test_a_connectors_address_is_none_of_this_host_s_own(
    pki: Pki, host: str, relay_at: str, taken: bool
) -> None:
    """A stolen relay cannot have an agent connect to what listens on its own host's loopback, or link by link."""
    opened = Opened(1, SESSION, ServiceName("web"), ConnectorId("c1"), "f" * 64, Address(host, 22))
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        await owner.next()
        owner.client._hosts = frozenset({relay_at})
        peer.say(opened)
        expected = opened if taken else msgspec.structs.replace(opened, link_address=None)
        assert await owner.next() == ("message", expected)


async def test_comes_back_as_another_connection(pki: Pki) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        first = await owner.next()
        peer.connection.close(0, "server shutting down")
        assert await owner.next() == ("lost", "server shutting down")
        assert not owner.client.send(Accepted(SESSION))
        await relay.peer()
        second = await owner.next()
        assert first[0] == second[0] == "connected" and first[1] != second[1]


async def test_a_connection_given_up_as_it_came_into_use_is_lost(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    greet = RelayClient._greet

    async def held(client: RelayClient, *connection: Any) -> None:
        await greet(client, *connection)
        await asyncio.Event().wait()

    monkeypatch.setattr(RelayClient, "_greet", held)
    async with fake_relay(pki) as relay:
        owner = Owner(pki, relay.target)
        dialling = asyncio.create_task(owner.client._dial())
        assert (await owner.next())[0] == "connected"
        dialling.cancel()
        await asyncio.wait((dialling,))
        assert not owner.client.connected
        assert (await owner.next())[0] == "lost"


async def test_learns_its_address(pki: Pki) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        await owner.next()
        peer.connection.send_datagram(b"\xff")
        peer.connection.send_datagram(bytes.fromhex("12000161"))
        peer.connection.send_datagram(bytes.fromhex("01cb007105d431"))
        peer.say(Health(ServiceName("web"), "passing"))
        await owner.next()
        async with asyncio.timeout(WAIT_SECONDS):
            while owner.client.observed is None:
                await asyncio.sleep(0.01)
        assert owner.client.observed == ("203.0.113.5", 54321)


async def test_sends_only_common_features(pki: Pki) -> None:
    async with fake_relay(pki) as relay:
        relay.hello = Hello(features=frozenset({"closed", "unheard_of"}))
        async with running(pki, relay.target) as owner:
            peer = await relay.peer()
            await owner.next()
            assert not owner.client.send(Accepted(SESSION))
            assert owner.client.send(Closed(SESSION, Reason.DRAINING))
            await peer.heard(Closed)


async def test_ignores_and_counts_what_is_unknown(pki: Pki) -> None:
    counts = [DROPS.labels("relay_client", why)._value for why in ("unknown_message", "unknown_field")]
    before = [each.get() for each in counts]
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        await owner.next()
        message = Health(ServiceName("web"), "critical")
        new = b'{"type": "health", "service": "web", "state": "critical", "since": 1, "by": "check"}'
        for body in (b'{"type": "from_the_future"}', new):
            peer.say_bytes(struct.pack(">I", len(body)) + body)
        assert await owner.next() == ("message", message)
    assert [each.get() - count for each, count in zip(counts, before, strict=True)] == [1, 2]


async def test_knows_the_release_of_a_relay_that_tells(pki: Pki) -> None:
    async with fake_relay(pki) as relay:
        relay.hello = Hello(software="0.2.0")
        async with running(pki, relay.target) as owner:
            assert owner.client.software == ""
            await relay.peer()
            await owner.next()
            assert owner.client.software == "0.2.0"


@pytest.mark.parametrize("says", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02{}"])
async def test_drops_a_relay_that_talks_nonsense(pki: Pki, says: bytes) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        await owner.next()
        peer.say_bytes(says)
        kind, _reason = await owner.next()
        assert kind == "lost"


@pytest.mark.parametrize(
    ("hello", "why"),
    [(Hello(version=3), "control version 3"), (None, "")],
)
async def test_refuses_a_wrong_greeting(pki: Pki, hello: Hello | None, why: str) -> None:
    async with fake_relay(pki) as relay:
        relay.hello = hello
        async with running(pki, relay.target) as owner:
            if hello is None:
                # It hears our hello and answers with something else.
                async with asyncio.timeout(WAIT_SECONDS):
                    while not relay.server.connections:
                        await asyncio.sleep(0.01)
                await until_problem(owner, "no hello")
            else:
                await until_problem(owner, why)
            assert owner.events.empty() and not owner.client.connected


async def test_refuses_a_relay_of_another_name(pki: Pki) -> None:
    async with fake_relay(pki, "other") as relay:
        target = RelayTarget(address=relay.target.address, name="relay-1")
        async with running(pki, target) as owner:
            await until_problem(owner, "no_grant")
            assert relay.peers.empty()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "empty..label", "l" * 64 + ".invalid"])
async def test_names_a_host_that_does_not_resolve(pki: Pki, host: str) -> None:
    target = RelayTarget(address=Endpoint(host, 4433), name="relay-1")
    async with running(pki, target) as owner:
        await until_problem(owner, host)


async def test_waits_for_a_relay_that_starts_later(pki: Pki) -> None:
    relay = FakeRelay(pki)
    address = relay.address
    relay.close()
    async with running(pki, RelayTarget(address=Endpoint(*address), name="relay-1")) as owner:
        await until_problem(owner, "does not answer")
        later = FakeRelay(pki, address=address)
        try:
            assert (await owner.next())[0] == "connected"
        finally:
            later.close()


async def test_a_renewed_certificate_is_shown_on_another_connection_before_the_one_is_given_up(
    pki: Pki,
) -> None:
    first, second = (pki.credentials(pki.connector()) for _ in range(2))
    async with fake_relay(pki) as relay, running(pki, relay.target, first) as owner:
        old = await relay.peer()
        name, connection = await owner.next()
        assert name == "connected" and owner.client.proven is first
        owner.client.use_credentials(second)
        new = await relay.peer()
        assert await owner.next() == ("lost", "certificate renewed")
        assert await owner.next() == ("connected", owner.client.connection)
        assert owner.client.connection != connection and owner.client.proven is second
        assert new.connection.identity.fingerprint == second.identity.fingerprint
        async with asyncio.timeout(WAIT_SECONDS):
            assert await old.connection.closed == (0, "certificate renewed")
        new.say(Closed(SESSION, Reason.PEER_GONE))
        assert await owner.next() == ("message", Closed(SESSION, Reason.PEER_GONE))
        assert owner.client.send(Accepted(SESSION))
        assert await new.heard(Accepted) == Accepted(SESSION)


async def test_the_same_certificate_with_another_ca_file_needs_no_other_connection(pki: Pki) -> None:
    config = pki.connector()
    first, again = pki.credentials(config), pki.credentials(config)
    async with fake_relay(pki) as relay, running(pki, relay.target, first) as owner:
        await relay.peer()
        await owner.next()
        owner.client.use_credentials(again)
        assert owner.client.proven is again
        await asyncio.sleep(0)
        assert relay.peers.empty() and owner.events.empty()


async def test_a_connection_stays_until_the_relay_takes_the_new_certificate(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RENEW_RETRY_SECONDS_MAX", 0.1)
    monkeypatch.setattr(control, "RENEW_RETRY_SECONDS_MIN", 0.1)
    first, second = (pki.credentials(pki.connector()) for _ in range(2))
    refused = set[str]()

    def admit(identity: Identity, alpn: str) -> None:
        if identity.fingerprint == second.identity.fingerprint and len(refused) < 1:
            refused.add(identity.fingerprint)
            raise Refused(Reason.LIMIT_REACHED, "not now")

    async with fake_relay(pki) as relay, running(pki, relay.target, first) as owner:
        relay.server._admit = admit
        old = await relay.peer()
        await owner.next()
        owner.client.use_credentials(second)
        async with asyncio.timeout(WAIT_SECONDS):
            while not refused:
                await asyncio.sleep(0.01)
        assert owner.client.connected and owner.client.send(Accepted(SESSION))
        assert await old.heard(Accepted) == Accepted(SESSION)
        await relay.peer()
        assert await owner.next() == ("lost", "certificate renewed")


async def test_a_relay_whose_certificate_ends_soon_is_connected_to_again_once_it_shows_another(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RENEW_RETRY_SECONDS_MAX", 0.1)
    monkeypatch.setattr(control, "RENEW_RETRY_SECONDS_MIN", 0.1)
    now = datetime.now(UTC)
    brief = pki.signed(
        dns=["relay.relay-1.ztna"],
        not_before=now - timedelta(hours=20),
        not_after=now + timedelta(minutes=30),
    )
    async with fake_relay(pki) as relay:
        relay.server.use_credentials(pki.credentials(pki.write(brief.chain_pem, brief.key_pem)))
        seen: list[object] = []
        relay.server._admit = lambda identity, alpn: seen.append(identity)
        async with running(pki, relay.target) as owner:
            await relay.peer()
            await owner.next()
            async with asyncio.timeout(WAIT_SECONDS):
                while len(seen) < 3:  # it tries, and goes away when it is shown the same
                    await asyncio.sleep(0.01)
            assert owner.events.empty() and owner.client.connected
            relay.server.use_credentials(pki.credentials(pki.relay("relay-1")))
            assert await owner.next() == ("lost", "certificate renewed")
            assert (await owner.next())[0] == "connected"
            tried = len(seen)
            owner.client.send(Accepted(SESSION))
            assert len(seen) == tried


async def test_what_comes_late_on_the_connection_before_is_nobodys(pki: Pki) -> None:
    first, second = (pki.credentials(pki.connector()) for _ in range(2))
    async with fake_relay(pki) as relay, running(pki, relay.target, first) as owner:
        await relay.peer()
        await owner.next()
        before = owner.client._control
        assert before is not None
        owner.client.use_credentials(second)
        await relay.peer()
        assert [(await owner.next())[0] for _ in range(2)] == ["lost", "connected"]
        owner.client.received(before, Closed(SESSION, Reason.PEER_GONE))
        owner.client.packet_received(before, SESSION, b"E")
        assert owner.events.empty()


@pytest.mark.parametrize("reason", [Reason.REVOKED, Reason.EXPIRED, Reason.UNTRUSTED])
async def test_what_the_relay_finds_wrong_with_our_certificate_is_known_as_such(
    pki: Pki, reason: Reason
) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        peer = await relay.peer()
        await owner.next()
        peer.connection.refuse(IdentityError(reason))
        assert await owner.next() == ("lost", str(reason))
        assert owner.client.lost_by is reason


async def test_a_relay_that_is_refused_here_is_only_gone(pki: Pki) -> None:
    async with fake_relay(pki) as relay, running(pki, relay.target) as owner:
        await relay.peer()
        await owner.next()
        assert owner.client._control is not None
        owner.client._control._connection.refuse(IdentityError(Reason.REVOKED))
        assert await owner.next() == ("lost", "revoked")
        assert owner.client.lost_by is Reason.PEER_GONE
