"""Well-formed messages that make no sense, thousands of them from an authenticated peer: whoever hears them goes on.

What is malformed is tests/property/test_mutations_wire.py's. ZTNA_MUTATION_SEED=17 repeats the run that failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Pki
from tests.support.relay import SERVICE, Peer, running_relay
from tests.support.small_mesh import agent, small_mesh
from tests.support.whole_mesh import ask
from tests.unit.test_sidecar_connector_daemon import CURRENT, ECHO, connector, says, until
from ztna.jsontypes import Binary, Secret
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.telemetry import UNEXPECTED
from ztna.wire import control
from ztna.wire.control import Address, ForwarderBind, LeaseRef

MESSAGES = 1500
SERVICES = (SERVICE, ServiceName("web-app"), ServiceName("nobody"))
WAIT_SECONDS = 15.0


class Speaker:
    """Draws messages; sessions are those it was told of and a few that it makes up."""

    def __init__(self, name: str, capsys: pytest.CaptureFixture[str], fingerprint: str = "ab" * 32) -> None:
        seed = int(os.environ.get("ZTNA_MUTATION_SEED", random.SystemRandom().randrange(2**32)))
        with capsys.disabled():
            print(f"\n{name}: {MESSAGES} messages, seed {seed}", flush=True)
        self.sessions = [SessionId(f"{number:016x}") for number in range(1, 20)]
        self._random = random.Random(seed)
        self._fingerprint = fingerprint

    def relay_says(self) -> control.AnyMessage:
        """Return anything a relay may say, to whomever."""
        pick, session = self._random.choice, self._random.choice(self.sessions)
        request, service = self._random.randrange(40), pick(SERVICES)
        token = Secret(self._random.randbytes(32))
        identity = control.PeerIdentity(pick(("ann", "bob", "")), self._fingerprint)
        key = Secret(self._random.randbytes(32))
        return pick(
            (
                control.Offered(
                    session, service, identity, self._lease(), self._bind(), key, pick((True, False))
                ),
                control.Offered(session, service, identity, CURRENT, self._bind(), key),
                control.Opened(
                    request,
                    session,
                    service,
                    ConnectorId("c1"),
                    self._fingerprint,
                    self._address(),
                    self._bind(),
                    key,
                ),
                control.Denied(request, service, pick(tuple(Reason))),
                control.DialToken(session, token),
                control.Carry(session, token),
                control.Closed(session, pick(tuple(Reason))),
                control.CandidateOffer(session, self._candidates()),
                control.CandidateAnswer(session, self._candidates()),
                control.StartPunching(session, self._candidates(), pick((0, 100))),
                control.PunchingResult(session, pick((True, False)), self._address()),
                control.Health(service, pick(("passing", "critical", "?"))),
                control.Registered(service),
                control.Refused(service, pick(tuple(Reason))),
                control.Open(request, service),
                control.Accepted(session),
            )
        )

    def peer_says(self) -> control.AnyMessage:
        """Return anything an agent or connector may say."""
        pick, session = self._random.choice, self._random.choice(self.sessions)
        wanted = pick((None, ConnectorId("con-x"), ConnectorId("con-y")))
        return pick(
            (
                control.Open(self._random.randrange(5), pick(SERVICES), self._lease(), wanted),
                control.Accepted(session),
                control.Dial(session),
                control.Closed(session, pick(tuple(Reason))),
                control.CandidateOffer(session, self._candidates()),
                control.CandidateAnswer(session, self._candidates()),
                control.PunchingResult(session, pick((True, False)), self._address()),
                control.Conflict(pick(("10.0.0.0/8", "nonsense", "")), "docker0"),
                control.Register(
                    ConnectorId("con-x"), tuple(control.Offering(each) for each in SERVICES), self._address()
                ),
            )
        )

    def _lease(self) -> LeaseRef | None:
        ip = IPv4Address("127.100.0.2")
        return self._random.choice((None, CURRENT, LeaseRef(ip, 1), LeaseRef(ip, 2**62)))

    def _address(self) -> Address:
        # Nobody outside of this machine is ever spoken to.
        return Address(self._random.choice(("127.0.0.1", "::1")), self._random.choice((0, 1, 9, 65535)))

    def _candidates(self) -> tuple[Address, ...]:
        return tuple(self._address() for _ in range(self._random.randrange(control.CANDIDATES_MAX + 1)))

    def _bind(self) -> ForwarderBind | None:
        bind_id, secret = Binary(bytes([self._random.randrange(20)]) * 16), Secret(bytes(32))
        return self._random.choice((None, ForwarderBind(self._address(), bind_id, secret)))


async def test_a_connector_hears_a_relay_that_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = UNEXPECTED._value.get()
    async with connector(Pki(tmp_path)) as ground:
        await ground.leased()
        speaker = Speaker("relay to connector", capsys, ground.agent.identity.fingerprint)
        for number in range(MESSAGES):
            ground.peer.say(speaker.relay_says())
            if number % 50 == 0:
                await asyncio.sleep(0.01)  # so that what it began goes on in between
        for session in speaker.sessions:
            ground.peer.say(control.Closed(session, Reason.CLOSED_BY_PEER))
        mine = SessionId("f" * 16)
        ground.offer(mine)
        async with asyncio.timeout(WAIT_SECONDS):
            while await ground.peer.messages.get() != control.Accepted(mine):
                pass
        assert await says(await ground.open(ground.frame(mine)), b"still there") == b"still there"
    assert UNEXPECTED._value.get() == before


async def test_an_agent_hears_a_relay_that_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = UNEXPECTED._value.get()
    async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
        ip = await mesh.lease(ECHO, 2, Port("tcp", 8080), Port("udp", 53))
        mesh.connector().backend = backend
        async with agent(mesh) as daemon:
            await until("connected", lambda: mesh.peer is not None)
            speaker = Speaker("relay to agent", capsys)
            for number in range(MESSAGES):
                mesh.say(speaker.relay_says())
                if number % 50 == 0:
                    with contextlib.suppress(OSError):
                        await ask(ip, b"hello\n", 8080)
            async with asyncio.timeout(WAIT_SECONDS):
                while await ask(ip, b"still there\n", 8080) != b"still there\n":
                    await asyncio.sleep(0.1)
            assert not daemon.stopping.is_set()
    assert UNEXPECTED._value.get() == before


@contextlib.asynccontextmanager
async def echo_backend() -> Any:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(line)
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()


async def test_a_relay_hears_peers_that_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = UNEXPECTED._value.get()
    async with running_relay(tmp_path) as mesh:
        good, bystander = await mesh.connector("con-g"), await mesh.agent("agent-b")
        kept, _, _ = await bystander.open_with(good)
        speaker = Speaker("peers to relay", capsys)
        speaker.sessions.append(kept.session)
        for start in range(0, MESSAGES, MESSAGES // 10):
            liars = [
                await mesh.connector("con-x", tuple(SERVICES)),
                await mesh.peer(mesh.pki.agent(f"liar-{start}", SERVICES)),
            ]
            for number in range(MESSAGES // 10):
                liar = liars[number % 2]
                if liar.connection.is_open:
                    liar.say(speaker.peer_says())
                if number % 10 == 0:
                    await asyncio.sleep(0.005)
                    learn(speaker, liars)
            for liar in liars:
                liar.close()
        bystander.say(control.CandidateOffer(kept.session, ()))
        await good.expect(control.CandidateOffer, session=kept.session)
        good.inbox.clear()  # what was offered to it for the liars
        await bystander.open_with(good, request=77)
    assert UNEXPECTED._value.get() == before


def learn(speaker: Speaker, peers: list[Peer]) -> None:
    """Let the speaker speak of sessions that are really its own too."""
    for peer in peers:
        for message in peer.inbox:
            if isinstance(message, control.Offered | control.Opened):
                speaker.sessions[hash(message.session) % 10] = message.session
        peer.inbox.clear()
