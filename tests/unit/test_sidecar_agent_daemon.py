"""sidecar.agent, whole: local programs on loopback, through real links, against a scripted relay and connectors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from relay import splicer
from sidecar.agent import carriers, links
from tests.support.small_mesh import WAIT_SECONDS, SmallMesh, agent, small_mesh
from ztna.config import ConsulConfig
from ztna.errors import ConfigError, LeaseError, LinkError
from ztna.identity import Identity
from ztna.leases import SCHEMA_KEY, Port
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.runtime import Daemon
from ztna.wire.control import (
    Address,
    CandidateOffer,
    Closed,
    Drain,
    PunchingResult,
    Retired,
    StartPunching,
)
from ztna.wire.stream import OpenFrame, OpenStatus

TCP = Port("tcp", 8080)
UDP = Port("udp", 5300)


async def until(what: str, found: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


@contextlib.asynccontextmanager
async def echo_backend() -> AsyncIterator[tuple[str, int]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()


async def talk(address: tuple[str, int], data: bytes) -> bytes:
    """Send all, half-close, and read all."""
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(data)
        writer.write_eof()
        try:
            return await reader.read()
        finally:
            writer.close()


class Program:
    """A local UDP program, connected to a virtual port."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect(address)
        self._loop = asyncio.get_running_loop()

    async def ask(self, data: bytes, seconds: float = WAIT_SECONDS) -> bytes:
        self.sock.send(data)
        async with asyncio.timeout(seconds):
            return await self._loop.sock_recv(self.sock, 65535)

    async def ask_until_answered(self, data: bytes) -> bytes:
        """Ask again and again, as programs on UDP do."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                    return await self.ask(data, 0.3)


def status(daemon: Daemon) -> dict[str, Any]:
    found = daemon.status_sources["agent"]()
    assert isinstance(found, dict)
    return found


def is_listening(daemon: Daemon, *ports: str) -> bool:
    found = [at for service in status(daemon)["services"] for at in service["listening"]]
    return sorted(found) == sorted(ports)


def heard(mesh: SmallMesh, kind: type) -> list[Any]:
    return [message for message in mesh.heard if isinstance(message, kind)]


class TestTcp:
    @pytest.mark.parametrize("direct", [True, False])
    async def test_bytes_arrive_and_carriers_are_used_again(self, tmp_path: Path, direct: bool) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh, direct=direct) as daemon:
                content = os.urandom(300_000)
                for _ in range(3):
                    assert await talk((str(ip), 8080), content) == content
                found = status(daemon)
                assert found["streams"]["carriers"] == 1
                assert found["streams"]["idle"] == {"c1": 1}
                assert found["streams"]["routes"] == ({"c1": "direct"} if direct else {})
                assert [each["state"] for each in found["services"]] == ["open"]
                assert mesh.splicer.joined == (0 if direct else 1)
            assert len(mesh.opens) == 1
            assert mesh.opens[0].lease is not None and mesh.opens[0].lease.epoch == 1
            frame = mesh.connectors[0].opens[0]
            assert frame.destination == Address(str(ip), 8080)

    async def test_an_unreachable_link_address_is_forwarded_and_remembered(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            connector = mesh.connector()
            connector.backend, connector.link_address = backend, Address("127.0.0.1", 1)
            async with agent(mesh) as daemon:
                assert await talk((str(ip), 8080), b"hello") == b"hello"
                assert status(daemon)["streams"]["routes"] == {"c1": "forwarded"}
                assert mesh.splicer.joined == 1

    async def test_parallel_flows_get_a_carrier_each_and_few_are_kept(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh) as daemon:
                contents = [os.urandom(50_000) for _ in range(20)]
                answers = await asyncio.gather(*(talk((str(ip), 8080), each) for each in contents))
                assert answers == contents
                await until("only four stay", lambda: status(daemon)["streams"]["carriers"] <= 4)
                assert len(mesh.opens) == 1

    async def test_a_link_that_takes_no_stream_leaves_tcp_to_the_relay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the setting prefers the packet carrier on a direct path; that it is taken tests/e2e proves."""
        asked: list[object] = []

        async def refuse(_links: object, session: object) -> object:
            asked.append(session)
            raise LinkError("gone")

        monkeypatch.setattr(links.Links, "is_direct", lambda _links, _session: True)
        monkeypatch.setattr(links.Links, "stream", refuse)
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            connector = mesh.connector()
            connector.backend, connector.link_address = backend, None
            async with agent(mesh, tcp_on_punched="packet") as daemon:
                assert await talk((str(ip), 8080), b"hello") == b"hello"
                assert status(daemon)["streams"]["on_links"] == 0
            assert len(asked) == 1
            async with agent(mesh) as daemon:
                assert await talk((str(ip), 8080), b"hello") == b"hello"
            assert len(asked) == 1, "by default it is not asked"

    async def test_nobody_to_serve_it_is_a_reset_at_once(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, TCP)
            async with agent(mesh):
                with pytest.raises(ConnectionResetError):
                    await talk((str(ip), 8080), b"")

    @pytest.mark.parametrize("refusal", [OpenStatus.REFUSED, OpenStatus.UNREACHABLE, OpenStatus.DENIED])
    async def test_a_backend_that_is_not_there_is_a_reset(self, tmp_path: Path, refusal: OpenStatus) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            connector = mesh.connector()
            connector.backend, connector.refusing = backend, [refusal]
            async with agent(mesh):
                with pytest.raises(ConnectionResetError):
                    await talk((str(ip), 8080), b"")
                assert await talk((str(ip), 8080), b"next") == b"next"
            assert len(mesh.opens) == 1

    async def test_a_stale_epoch_is_resolved_again_within_the_flow(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            connector = mesh.connector()
            connector.backend, connector.refusing = backend, [OpenStatus.STALE_EPOCH]
            async with agent(mesh):
                assert await talk((str(ip), 8080), b"hello") == b"hello"
            assert len(mesh.opens) == 2
            assert [each.reason for each in heard(mesh, Closed)] == [Reason.STALE_EPOCH]
            assert len({frame.flow for frame in connector.opens}) == 2

    async def test_a_stale_offer_is_resolved_again_and_fails_the_second_time(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.denying += [Reason.STALE_EPOCH] * 2
            async with agent(mesh):
                with pytest.raises(ConnectionResetError):
                    await talk((str(ip), 8080), b"")
            assert len(mesh.opens) == 2

    @pytest.mark.parametrize("direct", [True, False])
    async def test_new_flows_use_another_connector_when_one_dies(self, tmp_path: Path, direct: bool) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            first, second = mesh.connector("c1"), mesh.connector("c2")
            first.backend = second.backend = backend
            async with agent(mesh, direct=direct):
                assert await talk((str(ip), 8080), b"one") == b"one"
                first.die()
                async with asyncio.timeout(5):
                    assert await talk((str(ip), 8080), b"two") == b"two"
            assert len(second.opens) == 1

    async def test_what_runs_may_finish_on_a_session_that_runs_out_and_the_rest_begins_anew(
        self, tmp_path: Path
    ) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP, Port("udp", 7))
            first, second = mesh.connector("c1"), mesh.connector("c2")
            first.backend = second.backend = backend
            async with agent(mesh), asyncio.timeout(WAIT_SECONDS):
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                program = Program((str(ip), 7))
                assert await program.ask_until_answered(b"hello") == b"HELLO"
                writer.write(b"hello\n")
                assert await reader.readline() == b"hello\n"
                mesh.connectors.remove(first)
                mesh.say(Retired(SessionId(f"{1:016x}")))
                while not second.packets:
                    await program.ask_until_answered(b"again")
                assert await talk((str(ip), 8080), b"new") == b"new"
                assert len(second.opens) == 1
                # Its carrier breaks, and it goes on where it was.
                for carrier in first.carriers():
                    carrier.close(Reason.PEER_GONE)
                writer.write(b"still\n")
                assert await reader.readline() == b"still\n"
                assert (len(first.opens), len(first.resumes)) == (1, 1)
                writer.close()
                program.sock.close()
                while not [each for each in heard(mesh, Closed) if each.session == f"{1:016x}"]:
                    await asyncio.sleep(0.01)
            first.close()

    @pytest.mark.parametrize(
        "news", [None, Reason.DRAINING, Reason.PEER_GONE], ids=["retired", "drained", "gone"]
    )
    async def test_a_dial_to_a_connector_that_leaves_is_given_up_for_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, news: Reason | None
    ) -> None:
        """Else the program would wait for as long as a connector may take to dial in, and as a link may."""
        for name in ("LINK_AFTER_SECONDS", "FORWARDER_SECONDS", "FORWARDER_BOUND_SECONDS"):
            monkeypatch.setattr(carriers, name, 2 * WAIT_SECONDS)
        monkeypatch.setattr(splicer, "BIND_SECONDS", 2 * WAIT_SECONDS)
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            first, second = mesh.connector("c1"), mesh.connector("c2")
            second.backend = backend
            asked = asyncio.Event()

            async def leave_waiting(token: bytes, session: SessionId) -> None:
                asked.set()

            monkeypatch.setattr(first, "carry", leave_waiting)
            async with agent(mesh, direct=False), asyncio.timeout(WAIT_SECONDS):
                talking = asyncio.create_task(talk((str(ip), 8080), b"hello"))
                await asked.wait()
                mesh.connectors.remove(first)
                session = SessionId(f"{1:016x}")
                mesh.say(Retired(session) if news is None else Closed(session, news))
                assert await talking == b"hello"
                assert len(second.opens) == 1
                given_back = [each.session for each in heard(mesh, Closed)]
                assert given_back == ([session] if news is None else [])
            first.close()

    @pytest.mark.parametrize("direct", [True, False])
    async def test_an_open_without_an_answer_is_asked_after_and_never_made_elsewhere(
        self, tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            first, second = mesh.connector("c1"), mesh.connector("c2")
            first.backend = second.backend = backend
            release, answer = asyncio.Event(), first.open

            async def slowly(peer: Identity, frame: OpenFrame) -> socket.socket:
                sock = await answer(peer, frame)
                await release.wait()
                return sock

            async with agent(mesh, direct=direct), asyncio.timeout(WAIT_SECONDS):
                assert await talk((str(ip), 8080), b"one") == b"one"
                monkeypatch.setattr(first, "open", slowly)
                talking = asyncio.create_task(talk((str(ip), 8080), b"two"))
                while len(first.opens) < 2:
                    await asyncio.sleep(0.01)
                # On the idle carrier, which breaks while the backend is dialled; again and again.
                for number in range(1, 4):
                    for carrier in first.carriers():
                        carrier.close(Reason.PEER_GONE)
                    while len(first.resumes) < number:
                        await asyncio.sleep(0.01)
                release.set()
                assert await talking == b"two"
            assert (len(first.opens), len(second.opens)) == (2, 0)
            assert {each.received for each in first.resumes} == {0}

    @pytest.mark.parametrize("direct", [True, False])
    async def test_a_flow_whose_carrier_or_relay_goes_is_resumed(self, tmp_path: Path, direct: bool) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            connector = mesh.connector()
            connector.backend = backend
            ip = await mesh.lease("echo-service", 2, TCP)
            async with agent(mesh, direct=direct), asyncio.timeout(WAIT_SECONDS):
                reader, writer = await asyncio.open_connection(str(ip), 8080)

                async def still_works() -> None:
                    writer.write(b"hello\n")
                    assert await reader.readline() == b"hello\n"

                await still_works()
                for carrier in connector.carriers():
                    carrier.close(Reason.PEER_GONE)
                await still_works()
                assert [(each.attempt, each.session) for each in connector.resumes] == [(1, f"{1:016x}")]
                mesh.close_session(1, Reason.PEER_GONE)
                while len(connector.resumes) < 2:
                    await asyncio.sleep(0.01)
                await still_works()
                assert [(each.attempt, each.session) for each in connector.resumes][1:] == [(2, f"{2:016x}")]
                assert mesh.opens[-1].connector_id == connector.id
                assert len(connector.opens) == 1
                writer.close()

    async def test_a_flow_whose_connector_has_forgotten_it_is_reset(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            connector = mesh.connector()
            connector.backend = backend
            ip = await mesh.lease("echo-service", 2, TCP)
            async with agent(mesh), asyncio.timeout(WAIT_SECONDS):
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                writer.write(b"hello\n")
                assert await reader.readline() == b"hello\n"
                connector.forget()
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                writer.close()

    async def test_a_session_that_the_relay_closes_resets_its_flows(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh):
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                writer.write(b"hello")
                assert await reader.read(5) == b"hello"
                mesh.close_session(1, Reason.REVOKED)
                with pytest.raises(ConnectionResetError):
                    async with asyncio.timeout(WAIT_SECONDS):
                        await reader.read()
                writer.close()

    async def test_a_direct_flow_outlives_the_relay_and_new_ones_wait_for_it(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh) as daemon:
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                writer.write(b"hello")
                assert await reader.read(5) == b"hello"
                assert mesh.peer is not None
                mesh.peer.connection.close(0, "server shutting down")
                await until("the loss is seen", lambda: not daemon.readiness.ready)
                writer.write(b"again")
                assert await reader.read(5) == b"again"
                writer.close()
                assert await talk((str(ip), 8080), b"later") == b"later"
                assert daemon.readiness.ready
            assert len(mesh.opens) == 2


class TestUdp:
    async def test_every_reply_reaches_its_own_asker(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh) as daemon:
                programs = [Program((str(ip), 5300)) for _ in range(5)]
                for turn in range(20):
                    asked = [f"from {number} turn {turn}".encode() for number in range(5)]
                    answers = await asyncio.gather(
                        *(program.ask(data) for program, data in zip(programs, asked, strict=True))
                    )
                    assert answers == [data.upper() for data in asked]
                assert status(daemon)["udp_flows"] == 5
                assert [link["path"] for link in status(daemon)["links"]] == ["forwarded"]
            assert len(mesh.opens) == 1

    async def test_a_session_that_comes_as_its_link_ends_has_another(self, tmp_path: Path) -> None:
        """The end of a link is told in a turn of its own, and many sessions begin when a relay comes back."""
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh) as daemon:
                program = Program((str(ip), 5300))
                assert await program.ask(b"one") == b"ONE"
                tracer = daemon.probes["trace"].__self__  # type: ignore[attr-defined]
                (session,) = tracer._broker.sessions.sessions
                ending = tracer._links.of(session)
                ending.packet_link.close(Reason.PEER_GONE)
                assert tracer._links.of(session) is not ending
                assert await program.ask_until_answered(b"two") == b"TWO"
                # Once it stops, nothing that still comes makes another: its tasks are being ended.
                daemon.stopping.set()
                await until("closed", lambda: status(daemon)["links"] == [])
                assert tracer._links.of(session) is None

    async def test_a_large_datagram_arrives_whole(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh):
                data = b"a" * 20_000
                assert await Program((str(ip), 5300)).ask(data) == data.upper()

    async def test_nobody_to_serve_it_is_port_unreachable(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("telling UDP programs takes CAP_NET_RAW")
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            async with agent(mesh) as daemon:
                with pytest.raises(ConnectionRefusedError):
                    await Program((str(ip), 5300)).ask(b"hello")
                assert status(daemon)["udp_flows"] == 0

    async def test_flows_move_when_a_connector_falls_silent(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            first, second = mesh.connector("c1"), mesh.connector("c2")
            async with agent(mesh):
                program = Program((str(ip), 5300))
                assert await program.ask(b"one") == b"ONE"
                first.die()
                async with asyncio.timeout(5):
                    assert await program.ask_until_answered(b"two") == b"TWO"
            assert second.packets

    async def test_a_closed_session_is_opened_again(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh) as daemon:
                program = Program((str(ip), 5300))
                assert await program.ask(b"one") == b"ONE"
                mesh.close_session(1, Reason.NO_HEALTHY_CONNECTOR)
                await until("the session ends", lambda: not status(daemon)["sessions"])
                assert await program.ask_until_answered(b"two") == b"TWO"
            assert len(mesh.opens) == 2

    async def test_what_is_asked_before_a_restarted_relay_has_a_session_again_is_not_lost(
        self, tmp_path: Path
    ) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh, direct=False) as daemon:
                program = Program((str(ip), 5300))
                assert await program.ask_until_answered(b"one") == b"ONE"
                mesh.restart_relay()
                mesh.denying += [Reason.NO_HEALTHY_CONNECTOR] * 3
                await until("the loss is seen", lambda: not daemon.readiness.ready)
                await until("the relay is back", lambda: daemon.readiness.ready)
                assert await program.ask(b"two") == b"TWO"
                assert not mesh.denying

    async def test_silent_flows_are_forgotten(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh, udp_idle_s=0.2) as daemon:
                program = Program((str(ip), 5300))
                # What waits for its link is forgotten as soon, where that takes long.
                assert await program.ask_until_answered(b"one") == b"ONE"
                await until("the flow goes", lambda: status(daemon)["udp_flows"] == 0)
                assert await program.ask_until_answered(b"two") == b"TWO"
            assert len(mesh.opens) == 1

    async def test_candidates_are_offered_and_the_outcome_told(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh):
                assert await Program((str(ip), 5300)).ask(b"one") == b"ONE"
                await until("an offer", lambda: heard(mesh, CandidateOffer))
                (offer,) = heard(mesh, CandidateOffer)
                assert not [each for each in offer.candidates if each.ip.startswith("127.")]
                mesh.say(StartPunching(SessionId(f"{1:016x}"), (Address("127.0.0.1", 9),), 1))
                await until("the outcome", lambda: heard(mesh, PunchingResult))
                assert not heard(mesh, PunchingResult)[0].success

    async def test_candidates_are_offered_again_while_there_is_no_direct_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(links, "OFFER_AGAIN_SECONDS", 0.01)
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh):
                assert await Program((str(ip), 5300)).ask(b"one") == b"ONE"
                await until("offers", lambda: len(heard(mesh, CandidateOffer)) >= 3)
                assert {each.session for each in heard(mesh, CandidateOffer)} == {SessionId(f"{1:016x}")}

    async def test_a_restarted_relay_is_told_nothing_of_sessions_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(links, "PUNCHING_SECONDS", 0.5)
        monkeypatch.setattr(links, "OFFER_AGAIN_SECONDS", 2.0)
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh) as daemon:
                program = Program((str(ip), 5300))
                assert await program.ask_until_answered(b"one") == b"ONE"
                await until("an offer", lambda: heard(mesh, CandidateOffer))
                mesh.say(StartPunching(SessionId(f"{1:016x}"), (Address("127.0.0.1", 9),), 1))
                own = daemon.status_sources["agent"].__self__._links._links  # type: ignore[attr-defined]
                await until("punching", lambda: any(each.punching for each in own.values()))
                mesh.restart_relay()
                assert await program.ask_until_answered(b"two") == b"TWO"
                # By the second offer on later sessions the time for the outcome of the old one is over.
                before = SessionId(f"{1:016x}")
                await until(
                    "offers", lambda: sum(each.session != before for each in heard(mesh, CandidateOffer)) >= 2
                )
            assert not [each for each in heard(mesh, PunchingResult) if each.session == before]

    async def test_nothing_is_offered_where_direct_paths_are_off(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, UDP)
            mesh.connector()
            async with agent(mesh, direct=False):
                assert await Program((str(ip), 5300)).ask(b"one") == b"ONE"
                assert await Program((str(ip), 5300)).ask(b"two") == b"TWO"
            assert not heard(mesh, CandidateOffer)


class TestLeases:
    async def test_listeners_follow_the_leases(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, agent(mesh, ("echo-service", "web-app")) as daemon:
            assert is_listening(daemon)
            ip = await mesh.lease("echo-service", 2, TCP, UDP, Port("icmp", 0))
            await until("both listen", lambda: is_listening(daemon, f"tcp {ip}:8080", f"udp {ip}:5300"))
            await mesh.lease("not-granted", 4, TCP)
            ip = await mesh.lease("echo-service", 3, TCP, epoch=2)
            await until("it moves", lambda: is_listening(daemon, f"tcp {ip}:8080"))
            await mesh.client.kv_delete("ztna/vip/service/echo-service")
            await until("it goes", lambda: is_listening(daemon))

    async def test_records_that_cannot_be_served_are_left_out(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            for name, value in (
                (
                    "echo-service",
                    b'{"ip": "127.0.0.1", "epoch": 1, "ports": [{"protocol": "tcp", "port": 1}]}',
                ),
                ("web-app", b"not json"),
                ("Bad_Name", b"{}"),
            ):
                await mesh.client.kv_put(f"ztna/vip/service/{name}", value)
            async with agent(mesh, ("*",)) as daemon:
                assert status(daemon)["services"] == []

    async def test_a_port_that_somebody_holds_is_named_and_had_later(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            ip = await mesh.lease("echo-service", 2, TCP, UDP)
            with socket.create_server((str(ip), 8080)):
                async with agent(mesh) as daemon:
                    assert is_listening(daemon, f"udp {ip}:5300")
                    warning = daemon.readiness.report()["warnings"][f"port tcp {ip}:8080"]
                    assert "echo-service" in warning and "another program holds it" in warning
                    assert daemon.readiness.ready
                    await mesh.lease("echo-service", 2, UDP, epoch=2)
                    await until("it is wanted no more", lambda: not status(daemon)["held_ports"])
                    assert daemon.readiness.report()["warnings"] == {}

    async def test_a_newer_schema_is_refused(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh:
            await mesh.client.kv_put(SCHEMA_KEY, b"2")
            with pytest.raises(BaseExceptionGroup) as raised:
                async with agent(mesh):
                    pass
            assert raised.group_contains(LeaseError, match="upgrade")


class TestRevocation:
    @pytest.mark.parametrize("direct", [True, False])
    async def test_a_revoked_connector_loses_its_flows_and_gets_no_more(
        self, tmp_path: Path, direct: bool
    ) -> None:
        """The relay and the connector itself know of no CRL here: the agent sees to it."""
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            bad = mesh.connector("bad")
            bad.backend = backend
            async with agent(mesh, crl=True, direct=direct):
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                writer.write(b"hello")
                async with asyncio.timeout(WAIT_SECONDS):
                    assert await reader.readexactly(5) == b"hello"
                    mesh.pki.revoke(bad.tls)
                    with pytest.raises(ConnectionResetError):
                        await reader.read()
                before = len(bad.opens)
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError, AssertionError)):
                    assert await talk((str(ip), 8080), b"hello") == b"hello"
                assert len(bad.opens) == before
                bad.is_dead = True
                mesh.connector("good").backend = backend
                await until_talks((str(ip), 8080))


async def until_talks(address: tuple[str, int]) -> None:
    """Wait until the service answers: after a failure the agent asks for a session again only in a while."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, AssertionError):
                assert await talk(address, b"hello") == b"hello"
                return
            await asyncio.sleep(0.1)


class TestLife:
    async def test_a_draining_relay_and_a_reload_disturb_nothing(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh) as daemon:
                for reload in daemon.on_reload:
                    reload()
                mesh.say(Drain(25.0))
                await until("it drains", lambda: status(daemon)["relays"][0]["state"] == "draining")
                assert await talk((str(ip), 8080), b"hello") == b"hello"

    async def test_the_end_waits_for_flows_and_then_cuts_them(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh):
                reader, writer = await asyncio.open_connection(str(ip), 8080)
                writer.write(b"hello")
                assert await reader.read(5) == b"hello"
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(str(ip), 8080)

    async def test_it_works_on_while_consul_is_away(self, tmp_path: Path) -> None:
        async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
            ip = await mesh.lease("echo-service", 2, TCP)
            mesh.connector().backend = backend
            async with agent(mesh):
                await mesh.consul.stop()
                assert await talk((str(ip), 8080), b"hello") == b"hello"

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"pool": "10.100.0.0/16"}, "mode listen"),
            ({"mode": "anyip"}, "set agent.mode to listen"),
            ({"relays": ()}, "at least one relay"),
        ],
    )
    async def test_what_cannot_work_is_refused_at_start(
        self, tmp_path: Path, settings: dict[str, Any], words: str
    ) -> None:
        from ipaddress import IPv4Network

        import msgspec

        from sidecar.agent.daemon import body
        from ztna.config import AgentConfig, Config, Endpoint, RelayTarget, TlsConfig

        own = AgentConfig(
            tls=TlsConfig(certificate="c", key="k", ca="a"),
            relays=(RelayTarget(address=Endpoint("127.0.0.1", 1), name="r"),),
            pool=IPv4Network("127.100.0.0/16"),
        )
        if "pool" in settings:
            settings = {"pool": IPv4Network(settings["pool"])}
        own = msgspec.structs.replace(own, **settings)
        async with asyncio.TaskGroup() as tasks:
            with pytest.raises(ConfigError, match=words):
                await body(Daemon("agent", Config(consul=ConsulConfig(), agent=own), tasks))
