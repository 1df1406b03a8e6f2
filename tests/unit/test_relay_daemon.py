"""The relay as its peers see it: real QUIC with real certificates, a real forwarder, DNS on loopback."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest

from relay import daemon as relay_daemon
from relay import looking_in, startup
from tests.support.certificates import Pki
from tests.support.quic import Dialling, settings
from tests.support.relay import (
    SERVICE,
    Dialled,
    Peer,
    RunningRelay,
    forged_session,
    refusals,
    running_relay,
    token_of,
)
from ztna import quic
from ztna.config import Endpoint, RelayConfig, TsigKeyConfig
from ztna.errors import ConfigError, LinkError
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.runtime import Readiness
from ztna.telemetry import DROPS, UNEXPECTED
from ztna.wire import control, datagram, forwarder

ALICE = control.Address("192.0.2.1", 1111)
BOB = control.Address("192.0.2.2", 2222)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    before = UNEXPECTED._value.get()
    async with running_relay(tmp_path) as running:
        yield running
    assert UNEXPECTED._value.get() == before


async def test_a_peer_is_told_its_address(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    seen = datagram.decode(await agent.expect_datagram())
    assert seen == datagram.Qad(*agent._dialling.socket.address)


async def test_packets_are_as_large_as_each_way_is_known_to_carry(mesh: RunningRelay) -> None:
    """protocol.md: 1360 between relay and connector, elsewhere 1200 until a probe of 1350 was acknowledged."""
    await mesh.connector("con-x")
    await mesh.agent("agent-a")
    to_connector, to_agent = (each.connection._engine for each in mesh.relay._peers.values())
    assert to_connector.udp_payload == 1360
    async with asyncio.timeout(10):
        while to_agent.udp_payload != 1350:
            await asyncio.sleep(0.01)


async def test_an_agent_is_bound_to_the_connector_that_dns_names(mesh: RunningRelay) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, offered, _ = await agent.open_with(connector, request=7)
    assert opened.session == offered.session and opened.connector_id == "con-x"
    assert opened.fingerprint == connector.fingerprint
    assert offered.agent == control.PeerIdentity(agent.name, agent.fingerprint)
    assert opened.link_address == control.Address("127.0.0.1", 4435)
    assert opened.probe_key == offered.probe_key and len(opened.probe_key) == 32
    assert opened.forwarder is not None and offered.forwarder is not None
    assert opened.forwarder.bind_id != offered.forwarder.bind_id
    assert opened.forwarder.address == control.Address(*mesh.relay.forwarder.address)


async def test_what_is_denied_and_in_which_order(mesh: RunningRelay) -> None:
    """Grant first, alike for names that are and are not there; then registration; then SRV."""
    await mesh.connector("con-x", ("web-app", "db"))
    mesh.dns.routes.pop("db")
    agent = await mesh.agent("agent-a", ("db", "nothing-there"))
    for request, (service, reason) in enumerate(
        {
            "web-app": Reason.NO_GRANT,
            "neither-granted-nor-there": Reason.NO_GRANT,
            "nothing-there": Reason.NO_SUCH_SERVICE,
            "db": Reason.NO_HEALTHY_CONNECTOR,
        }.items()
    ):
        agent.say(control.Open(request=request, service=ServiceName(service)))
        denied = await agent.expect(control.Denied)
        assert (denied.request, denied.service, denied.reason) == (request, service, reason)
    assert not [name for name in mesh.dns.asked if "nothing-there" in name], "asked for an unregistered name"


async def test_a_backend_that_dies_and_recovers(mesh: RunningRelay) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    await agent.expect(control.Health, service=SERVICE, state="passing")
    mesh.dns.routes.pop(SERVICE)
    await agent.expect(control.Health, service=SERVICE, state="critical")
    agent.say(control.Open(request=1, service=SERVICE))
    assert (await agent.expect(control.Denied)).reason is Reason.NO_HEALTHY_CONNECTOR
    mesh.dns.routes[SERVICE] = [(0, 1, "con-x")]
    await agent.expect(control.Health, service=SERVICE, state="passing")
    await agent.open_with(connector)


async def test_an_srv_record_without_that_connector_routes_nothing(mesh: RunningRelay) -> None:
    connector = await mesh.peer(mesh.pki.connector("con-x", (SERVICE,)))
    mesh.dns.routes[SERVICE] = [(0, 1, "con-other")]
    await connector.serve("con-x")
    agent = await mesh.agent()
    agent.say(control.Open(request=1, service=SERVICE))
    assert (await agent.expect(control.Denied)).reason is Reason.NO_HEALTHY_CONNECTOR


async def test_nobody_but_the_owners_speaks_about_a_session(mesh: RunningRelay) -> None:
    """Every message about a session from everybody else: refused, counted, no effect; then the true one works."""
    x, y = await mesh.connector("con-x"), await mesh.connector("con-y")
    a, b = await mesh.agent("agent-a"), await mesh.agent("agent-b")
    opened, _, chosen = await a.open_with(x, y)
    other = y if chosen is x else x
    session = opened.session

    about = {
        "accepted": control.Accepted(session),
        "dial": control.Dial(session),
        "closed": control.Closed(session, Reason.CLOSED_BY_PEER),
        "candidate_offer": control.CandidateOffer(session, (ALICE,)),
        "candidate_answer": control.CandidateAnswer(session, (BOB,)),
        "punching_result": control.PunchingResult(session, True, ALICE),
    }
    may = {
        chosen: {"accepted", "candidate_answer", "closed", "punching_result"},
        a: {"dial", "candidate_offer", "closed", "punching_result"},
        b: set(),
        other: set(),
    }
    expected = refusals(Reason.NOT_YOUR_SESSION)
    for peer, allowed in may.items():
        for kind, message in about.items():
            if kind not in allowed:
                peer.say(message)
                expected += 1
        await peer.nothing_of(control.Closed)
    assert refusals(Reason.NOT_YOUR_SESSION) == expected
    for peer in (a, b, chosen, other):
        assert not [each for each in peer.inbox if not isinstance(each, control.Health)], peer.inbox

    a.say(control.CandidateOffer(session, (ALICE,)))
    assert (await chosen.expect(control.CandidateOffer)).candidates == (ALICE,)
    chosen.say(control.CandidateAnswer(session, (BOB,)))
    assert (await a.expect(control.CandidateAnswer)).candidates == (BOB,)
    assert (await a.expect(control.StartPunching)).candidates == (BOB,)
    assert (await chosen.expect(control.StartPunching)).candidates == (ALICE,)
    a.say(control.PunchingResult(session, True, BOB))
    assert (await chosen.expect(control.PunchingResult)).success
    a.say(control.Dial(session))
    assert len((await a.expect(control.DialToken, session=session)).token) == 32
    a.say(control.Closed(session, Reason.CLOSED_BY_PEER))
    await chosen.expect(control.Closed, session=session)


async def test_signaling_of_one_peer_never_cuts_another_off(mesh: RunningRelay) -> None:
    """An agent that floods a connector which is slow to read loses its own messages, not the connector."""
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    flood = control.encode(control.CandidateOffer(opened.session, (ALICE,) * control.CANDIDATES_MAX))
    before = drops("signaling_queue_full")
    connector.vanish()
    async with asyncio.timeout(10):
        for _ in range(2 * quic.STREAM_UNSENT_BYTES_MAX // len(flood)):
            while not agent.connection.send_stream(0, flood):
                await asyncio.sleep(0.01)
        while drops("signaling_queue_full") == before:
            await asyncio.sleep(0.01)
    assert {each.identity.name for each in mesh.relay.sessions.peers.values()} == {agent.name, connector.name}
    await agent.nothing_of(control.Closed)


def drops(why: str) -> float:
    return float(DROPS.labels("relay", why)._value.get())


async def test_a_session_that_is_only_offered_belongs_to_the_connector_it_was_offered_to(
    mesh: RunningRelay,
) -> None:
    x, y = await mesh.connector("con-x"), await mesh.connector("con-y")
    mesh.dns.routes[SERVICE] = [(0, 1, "con-x"), (1, 1, "con-y")]
    await mesh_sees(mesh, SERVICE, (0, 1))
    agent = await mesh.agent()
    before = refusals(Reason.NOT_YOUR_SESSION)
    agent.say(control.Open(request=1, service=SERVICE))
    offered = await x.expect(control.Offered)
    y.say(control.Accepted(offered.session))
    await y.nothing_of(control.Closed)
    agent.say(control.Accepted(offered.session))
    await agent.nothing_of(control.Opened)
    assert refusals(Reason.NOT_YOUR_SESSION) == before + 2
    x.say(control.Accepted(offered.session))
    assert (await agent.expect(control.Opened)).connector_id == "con-x"


async def test_a_silent_connector_is_passed_over_until_it_is_heard(mesh: RunningRelay) -> None:
    x, y = await mesh.connector("con-x"), await mesh.connector("con-y")
    mesh.dns.routes[SERVICE] = [(0, 1, "con-x"), (1, 1, "con-y")]
    await mesh_sees(mesh, SERVICE, (0, 1))
    agent = await mesh.agent()
    agent.say(control.Open(request=1, service=SERVICE))
    offered = await x.expect(control.Offered)
    again = await y.expect(control.Offered)
    assert again.session != offered.session
    y.say(control.Accepted(again.session))
    assert (await agent.expect(control.Opened, request=1)).connector_id == "con-y"
    await x.expect(control.Closed, session=offered.session)
    x.say(control.Accepted(offered.session))
    await x.nothing_of(control.Offered)


async def test_a_connector_that_says_no_is_passed_over_and_the_reason_is_told_last(
    mesh: RunningRelay,
) -> None:
    x, y = await mesh.connector("con-x"), await mesh.connector("con-y")
    mesh.dns.routes[SERVICE] = [(0, 1, "con-x"), (1, 1, "con-y")]
    await mesh_sees(mesh, SERVICE, (0, 1))
    agent = await mesh.agent()
    agent.say(control.Open(request=1, service=SERVICE))
    for connector in (x, y):
        offered = await connector.expect(control.Offered)
        connector.say(control.Closed(offered.session, Reason.STALE_EPOCH))
    assert (await agent.expect(control.Denied)).reason is Reason.STALE_EPOCH


@pytest.mark.parametrize(
    ("whose", "how", "reason"),
    [
        ("agent", "closes", Reason.CLOSED_BY_PEER),
        ("connector", "closes", Reason.CLOSED_BY_PEER),
        # That an agent vanished is only noticed by the idle timeout of 30 s.
        ("connector", "vanishes", Reason.PEER_GONE),
    ],
)
async def test_a_session_ends_with_either_connection(
    mesh: RunningRelay, whose: str, how: str, reason: Reason
) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    going, staying = (agent, connector) if whose == "agent" else (connector, agent)
    if how == "closes":
        going.close()
    else:
        going.vanish()
    assert (await staying.expect(control.Closed, session=opened.session)).reason is reason


async def test_a_certificate_decides_what_may_be_registered(mesh: RunningRelay) -> None:
    peer = await mesh.peer(mesh.pki.connector("con-x", (SERVICE,)))
    before = refusals(Reason.NO_GRANT)
    for connector_id, service in (("con-y", SERVICE), ("con-y--1", SERVICE), ("con-x", "web-app")):
        peer.say(control.Register(ConnectorId(connector_id), (control.Offering(ServiceName(service)),)))
        refused = await peer.expect(control.Refused)
        assert (refused.name, refused.reason) == (service, Reason.NO_GRANT)
    agent = await mesh.agent()
    agent.say(control.Register(ConnectorId("con-x"), (control.Offering(SERVICE),)))
    assert (await agent.expect(control.Refused)).reason is Reason.NO_GRANT
    assert refusals(Reason.NO_GRANT) == before + 4
    assert not mesh.relay.sessions.services
    await peer.serve("con-x--replica-2", SERVICE)


async def test_who_may_not_serve_a_name_does_not_have_it_asked_for(
    mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver, and the relay, must not work for whoever only names what others serve."""
    await mesh.connector("con-x")
    agent, other = await mesh.agent(), await mesh.peer(mesh.pki.connector("con-y", [SERVICE]))
    asked: list[str] = []
    monkeypatch.setattr(mesh.relay.puller, "expect", lambda service, _connector_id: asked.append(service))
    monkeypatch.setattr(mesh.relay.puller, "watch", lambda services: asked.append("all"))
    agent.say(control.Register(ConnectorId("con-z"), (control.Offering(SERVICE),)))
    await agent.expect(control.Refused)
    agent.say(control.Register(ConnectorId("con-z"), ()))
    await agent.nothing_of(control.Registered)
    assert asked == []
    await other.serve("con-y")
    assert asked == ["all", SERVICE]


async def test_the_newer_of_two_connections_with_one_id_gets_new_sessions(mesh: RunningRelay) -> None:
    older = await mesh.connector("con-x")
    agent = await mesh.agent()
    kept, _, _ = await agent.open_with(older, request=1)
    newer = await mesh.peer(mesh.pki.connector("con-x", (SERVICE,)))
    await newer.serve("con-x")
    _, _, chosen = await agent.open_with(older, newer, request=2)
    assert chosen is newer
    agent.say(control.CandidateOffer(kept.session, ()))
    await older.expect(control.CandidateOffer)


async def test_sessions_of_one_identity_are_bounded(tmp_path: Path) -> None:
    async with running_relay(tmp_path, sessions_per_identity=2) as mesh:
        connector = await mesh.connector()
        agent, twin, other = await mesh.agent(), await mesh.agent(), await mesh.agent("agent-b")
        opened, _, _ = await agent.open_with(connector)
        await twin.open_with(connector)
        agent.say(control.Open(request=3, service=SERVICE))
        assert (await agent.expect(control.Denied)).reason is Reason.LIMIT_REACHED
        await other.open_with(connector)
        agent.say(control.Closed(opened.session, Reason.CLOSED_BY_PEER))
        await connector.expect(control.Closed)
        await agent.open_with(connector, request=4)


async def test_permission_ends_when_the_catalog_was_not_confirmed_for_too_long(tmp_path: Path) -> None:
    async with running_relay(tmp_path, srv_hold_s=2.0) as mesh:
        connector, agent = await mesh.connector(), await mesh.agent()
        opened, _, _ = await agent.open_with(connector)
        mesh.dns.fresh = "1"
        for peer in (agent, connector):
            closed = await peer.expect(control.Closed, session=opened.session)
            assert closed.reason is Reason.POLICY_UNKNOWN
        await agent.expect(control.Health, state="unknown")
        agent.say(control.Open(request=2, service=SERVICE))
        assert (await agent.expect(control.Denied)).reason is Reason.POLICY_UNKNOWN


async def test_without_a_word_about_freshness_nothing_is_permitted(mesh: RunningRelay) -> None:
    mesh.dns.fresh = None
    mesh.relay.puller._fresh.clear()
    mesh.relay._table_changed(relay_daemon.SrvTable({}, {}, 10.0))
    await mesh.connector()
    agent = await mesh.agent()
    agent.say(control.Open(request=2, service=SERVICE))
    assert (await agent.expect(control.Denied)).reason is Reason.POLICY_UNKNOWN


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x02{}",
        control.encode(control.Registered(SERVICE)),
        control.encode(control.Hello()),
        control.encode(control.Register(ConnectorId("con-x"), (control.Offering(SERVICE),)))
        + control.encode(control.Register(ConnectorId("con-x--2"), (control.Offering(SERVICE),))),
    ],
    ids=["oversize", "no-type", "relays-own", "second-hello", "two-ids"],
)
async def test_a_protocol_error_closes_the_connection(mesh: RunningRelay, garbage: bytes) -> None:
    peer = await mesh.peer(mesh.pki.connector("con-x", (SERVICE,)))
    peer.say_bytes(garbage)
    code, _ = await peer.expect_close()
    assert code == 0x02
    assert not mesh.relay.sessions.services and not mesh.relay.sessions.peers
    await mesh.agent()


async def test_hello_comes_first_and_with_our_version(mesh: RunningRelay) -> None:
    for first in (control.Open(request=1, service=SERVICE), control.Hello(version=3)):
        peer = Peer(mesh.address, mesh.pki.credentials(mesh.pki.agent()))
        peer.connection = await peer._dialling.client.connect(5)
        peer.say(first)
        assert (await peer.expect_close())[0] == 0x02
        peer.close()


async def test_another_stream_than_the_control_stream_is_a_protocol_error(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    agent.connection.send_stream(agent.connection.open_stream(), b"x")
    assert (await agent.expect_close())[0] == 0x02


async def test_what_is_unknown_is_ignored_and_counted(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    before = {why: drops(why) for why in ("unknown_message", "unknown_field")}
    agent.say_bytes(b'\0\0\0\x11{"type":"future"}')
    future = b'{"type":"open","request":7,"service":"nobody-has-it","since":1}'
    agent.say_bytes(len(future).to_bytes(4) + future)
    await agent.expect(control.Denied, request=7)
    agent.connection.send_datagram(b"hello")
    await agent.nothing_of(control.Closed)
    assert {why: drops(why) - count for why, count in before.items()} == dict.fromkeys(before, 1)


async def test_releases_are_told_and_shown(mesh: RunningRelay) -> None:
    agent = Peer(mesh.address, mesh.pki.credentials(mesh.pki.agent()))
    await agent.connect(control.Hello(software="0.0.9"))
    assert agent.hello.software == version("ztna-mesh")
    assert [each["version"] for each in looking_in.connections(mesh.relay)] == ["0.0.9"]
    agent.close()


async def test_a_type_outside_the_common_features_is_not_sent(mesh: RunningRelay) -> None:
    await mesh.connector()
    agent = Peer(mesh.address, mesh.pki.credentials(mesh.pki.agent()))
    await agent.connect(control.Hello(features=frozenset({"open", "opened", "denied"})))
    await agent.nothing_of(control.Health)
    agent.close()


async def test_a_relay_certificate_is_no_agent(mesh: RunningRelay) -> None:
    client = Dialling(mesh.address, mesh.pki.credentials(mesh.pki.write(*both_roles(mesh))), settings())
    with pytest.raises(LinkError, match="no_grant"):
        await client.connect()
    client.close()


def both_roles(mesh: RunningRelay) -> tuple[bytes, bytes]:
    presented = mesh.pki.signed(dns=["relay.other.ztna"])
    return presented.chain_pem, presented.key_pem


async def test_conflicts_are_kept_while_the_connection_lives(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    agent.say(control.Conflict("10.100.0.0/16", "docker0"))
    await agent.nothing_of(control.Closed)
    assert looking_in.connections(mesh.relay)[0]["conflicts"] == ["10.100.0.0/16"]


async def test_draining_says_so_refuses_the_new_and_closes_in_the_end(mesh: RunningRelay) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    draining = asyncio.ensure_future(mesh.relay.drain(20.0))
    for peer in (agent, connector):
        assert (await peer.expect(control.Drain)).deadline_s == 20.0
    agent.say(control.Open(request=2, service=SERVICE))
    assert (await agent.expect(control.Denied)).reason is Reason.DRAINING
    late = Dialling(mesh.address, mesh.pki.credentials(mesh.pki.agent("agent-late")), settings())
    with pytest.raises(LinkError, match="draining"):
        await late.connect()
    late.close()
    agent.say(control.Closed(opened.session, Reason.DRAINING))
    await asyncio.wait_for(draining, 5)
    for peer in (agent, connector):
        assert await peer.expect_close() == (0, "server shutting down")


async def test_out_of_descriptors_one_peer_is_refused_and_the_next_served(
    mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_left(peer: str) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(relay_daemon, "local_address_towards", nothing_left)
        refused = Dialling(mesh.address, mesh.pki.credentials(mesh.pki.agent("agent-late")), settings())
        with pytest.raises(LinkError, match="limit_reached"):
            await refused.connect()
        refused.close()
    await mesh.agent("agent-next")
    assert [each.identity.name for each in mesh.relay.sessions.peers.values()] == ["spiffe://ztna/agent-next"]


# The forwarder, through the tickets and tokens that the relay gave out.


class Bound:
    """A UDP peer of the forwarder."""

    def __init__(self, to: control.ForwarderBind) -> None:
        self.to = to
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.setblocking(False)

    @property
    def target(self) -> tuple[str, int]:
        return self.to.address.ip, self.to.address.port

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, self.target)

    async def receive(self) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 4096), 5)

    def bind_packet(self, nonce: bytes | None = None, secret: bytes | None = None) -> bytes:
        mac = forwarder.NO_MAC
        if nonce is not None:
            mac = forwarder.bind_mac(self.to.bind_secret if secret is None else secret, nonce)
        return forwarder.encode(forwarder.Bind(self.to.bind_id, mac))

    async def bind(self) -> bytes:
        """Bind properly; returns the packet that did it."""
        self.send(self.bind_packet())
        challenge = forwarder.decode(await self.receive())
        assert isinstance(challenge, forwarder.Challenge)
        packet = self.bind_packet(challenge.nonce)
        self.send(packet)
        bound = forwarder.decode(await self.receive())
        assert isinstance(bound, forwarder.Bound) and bound.nonce == challenge.nonce
        assert bound.address == control.Address(*self.socket.getsockname())
        return packet

    def got_nothing(self) -> bool:
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        return False


async def test_quic_is_copied_between_the_bound_sides_only(mesh: RunningRelay) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, offered, _ = await agent.open_with(connector)
    assert opened.forwarder is not None and offered.forwarder is not None
    a, c, thief = Bound(opened.forwarder), Bound(offered.forwarder), Bound(opened.forwarder)
    packet = await a.bind()
    a.send(b"\x40too early")
    await c.bind()

    thief.send(b"\x40unbound")
    thief.send(packet)
    replayed = forwarder.decode(await thief.receive())
    assert isinstance(replayed, forwarder.Challenge), "a bind replayed from another address"
    thief.send(thief.bind_packet(replayed.nonce, secret=bytes(32)))
    assert isinstance(forwarder.decode(await thief.receive()), forwarder.Challenge), "without the secret"
    thief.send(b"\x40still unbound")

    a.send(b"\x40to the connector")
    assert await c.receive() == b"\x40to the connector"
    c.send(b"\x80" + b"\x40to the agent")
    c.send(b"\xc0to the agent")
    assert await a.receive() == b"\xc0to the agent"
    a.send(packet)
    assert isinstance(forwarder.decode(await a.receive()), forwarder.Bound), "a repeat from where it is bound"
    assert thief.got_nothing()

    agent.say(control.Closed(opened.session, Reason.CLOSED_BY_PEER))
    await connector.expect(control.Closed)
    a.send(b"\x40after the end")
    a.send(packet)
    await agent.nothing_of(control.Closed)
    assert c.got_nothing() and a.got_nothing()


async def test_tcp_is_spliced_with_half_close(mesh: RunningRelay) -> None:
    connector, agent = await mesh.connector(), await mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    a = await Dialled.dial(mesh, await token_of(agent, opened))
    carry = await connector.expect(control.Carry, session=opened.session)
    c = await Dialled.dial(mesh, carry.token)
    await a.bound()
    await c.bound()
    data = bytes(range(256)) * 40_000
    a.writer.write(data)
    a.writer.write_eof()
    assert await asyncio.wait_for(c.reader.read(-1), 10) == data
    c.writer.write(b"the other way is open")
    c.writer.write_eof()
    assert await asyncio.wait_for(a.reader.read(-1), 10) == b"the other way is open"
    a.writer.close()
    c.writer.close()


async def test_tokens_admit_one_connection_of_their_own_session(mesh: RunningRelay) -> None:
    connector, a, b = await mesh.connector(), await mesh.agent("agent-a"), await mesh.agent("agent-b")
    opened_a, _, _ = await a.open_with(connector)
    opened_b, _, _ = await b.open_with(connector)
    forged = await Dialled.dial(mesh, bytes(32))
    await forged.closed_without_a_byte()

    token_a, token_b = await token_of(a, opened_a), await token_of(b, opened_b)
    first = await Dialled.dial(mesh, token_a)
    carry = await connector.expect(control.Carry, session=opened_a.session)
    again = await Dialled.dial(mesh, token_a)
    await again.closed_without_a_byte()
    # B's token makes another waiter, that only the carry of B's session joins.
    second = await Dialled.dial(mesh, token_b)
    carry_b = await connector.expect(control.Carry, session=opened_b.session)
    joined = await Dialled.dial(mesh, carry.token)
    await first.bound()
    await joined.bound()
    twice = await Dialled.dial(mesh, carry.token)
    await twice.closed_without_a_byte()
    first.writer.write(b"for a")
    assert await asyncio.wait_for(joined.reader.readexactly(5), 5) == b"for a"

    a.say(control.Closed(opened_a.session, Reason.CLOSED_BY_PEER))
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(first.reader.readexactly(1), 5)
    late = await Dialled.dial(mesh, await token_of(b, opened_b))
    await connector.expect(control.Carry, session=opened_b.session)
    b.close()
    await connector.expect(control.Closed, session=opened_b.session)
    for each in (late, second):
        await each.closed_without_a_byte()
    orphan = await Dialled.dial(mesh, carry_b.token)
    await orphan.closed_without_a_byte()


async def test_a_token_is_only_for_an_open_session_of_the_asker(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    before = refusals(Reason.NOT_YOUR_SESSION)
    agent.say(control.Dial(forged_session()))
    await agent.nothing_of(control.DialToken)
    assert refusals(Reason.NOT_YOUR_SESSION) == before + 1


async def mesh_sees(mesh: RunningRelay, service: str, priorities: tuple[int, ...]) -> None:
    """Wait until the relay has read the new records."""
    async with asyncio.timeout(10):
        while True:
            entry = mesh.relay.sessions._held.table.entries.get(ServiceName(service))
            if entry and tuple(route.priority for route in entry.routes) == priorities:
                return
            await asyncio.sleep(0.02)


# What refuses to start.


class FakeDaemon:
    def __init__(self) -> None:
        self.readiness = Readiness()


def config_of(tmp_path: Path, **changes: object) -> RelayConfig:
    pki = Pki(tmp_path)
    fields = {"name": "relay-1", "tls": pki.relay("relay-1")}
    return RelayConfig(**(fields | changes))  # type: ignore[arg-type]


def test_resolvers_are_on_loopback_unless_told(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    remote = (Endpoint("192.0.2.53", 53),)
    with pytest.raises(ConfigError, match="dns_insecure"):
        startup.check_resolvers(config_of(tmp_path, resolvers=remote), daemon.readiness)
    insecure = config_of(tmp_path / "2", resolvers=remote, dns_insecure=True)
    startup.check_resolvers(insecure, daemon.readiness)
    assert "192.0.2.53" in daemon.readiness.report()["warnings"]["dns_insecure"]
    key = TsigKeyConfig(name="relay.ztna", secret_file="/nowhere")
    signing = config_of(tmp_path / "4", resolvers=remote, dns_key=key)
    startup.check_resolvers(signing, daemon.readiness)
    named = config_of(tmp_path / "3", resolvers=(Endpoint("localhost", 53),))
    with pytest.raises(ConfigError, match="numeric"):
        startup.check_resolvers(named, daemon.readiness)


def test_the_certificate_must_carry_the_relays_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"relay\.other\.ztna"):
        startup.load_credentials(config_of(tmp_path, name="other"))


def test_the_reset_key_outlives_a_restart_with_a_file_and_without(tmp_path: Path) -> None:
    path = str(tmp_path / "reset.key")
    pki = Pki(tmp_path)
    own, other = (pki.credentials(pki.relay(name)) for name in ("relay-1", "relay-2"))
    kept = startup.reset_key(path, own)
    assert startup.reset_key(path, own) == kept
    assert startup.reset_key(None, own) == startup.reset_key(None, own)
    assert len({kept, startup.reset_key(None, own), startup.reset_key(None, other)}) == 3
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(ConfigError, match="32 bytes"):
        startup.reset_key(str(tmp_path / "short"), own)


async def test_a_port_that_is_taken_is_named(mesh: RunningRelay, tmp_path: Path) -> None:
    host, port = mesh.relay.splicer.address
    config = config_of(tmp_path / "other", listen=Endpoint("127.0.0.1", 0), forwarder=Endpoint(host, port))
    with pytest.raises(Exception, match=f"{host}:{port}"):
        relay_daemon.Relay(config, relay_daemon.Zone("ztna.local"), startup.load_credentials(config))
