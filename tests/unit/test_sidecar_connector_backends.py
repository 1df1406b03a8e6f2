"""Backends on loopback: dialling, checks, and one UDP socket for every flow."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import uvloop

from sidecar.connector.backends import Introduction, UdpFlows, dial_tcp
from sidecar.connector.flow_log import FlowLog
from sidecar.connector.flows import FlowKey, SessionKey
from sidecar.link.stream import FlowRefused
from tests.support.chosen import Chosen
from ztna.config import Endpoint
from ztna.errors import Refused
from ztna.names import SessionId
from ztna.packet import PROTOCOL_ICMP, PROTOCOL_UDP, Packet, build_udp, parse
from ztna.reasons import Reason
from ztna.wire.stream import OpenStatus

WAIT_SECONDS = 10.0
VIP, VIP_PORT = "10.100.0.2", 53
ANN: SessionKey = (("relay-1", 1), SessionId("a" * 16))
BOB: SessionKey = (("relay-1", 1), SessionId("b" * 16))


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
def closed_tcp() -> Iterator[Endpoint]:
    """A port that is held but where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Endpoint(*sock.getsockname())


def closed_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_dials() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        sock = await dial_tcp(Endpoint("localhost", server.getsockname()[1]), 5.0)
        assert not sock.getblocking()
        assert sock.getpeername() == server.getsockname()
        sock.close()


async def test_a_failed_dial_says_why(closed_tcp: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint, status in (
        (closed_tcp, OpenStatus.REFUSED),
        (Endpoint("no-such-host.invalid", 1), OpenStatus.UNREACHABLE),
        (Endpoint("255.255.255.255", 1), OpenStatus.UNREACHABLE),
        # What no DNS can hold, as Consul takes it for the address of a service.
        (Endpoint("empty..label", 1), OpenStatus.UNREACHABLE),
        (Endpoint("l" * 64 + ".example", 1), OpenStatus.UNREACHABLE),
        (Endpoint("a\0b", 1), OpenStatus.UNREACHABLE),
    ):
        with pytest.raises(FlowRefused) as refused:
            await dial_tcp(endpoint, 5.0)
        assert refused.value.status is status
    # A full backlog answers no SYN: the dial runs into its time.
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        with pytest.raises(FlowRefused) as refused:
            await dial_tcp(Endpoint(*address), 0.3)
        assert refused.value.status is OpenStatus.TIMED_OUT
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("name", [".example", "l" * 64, "a\0b"])
async def test_a_name_that_tls_cannot_send_is_a_refusal(name: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        introduction = Introduction(context=ssl.create_default_context(), name=name)
        with pytest.raises(FlowRefused) as refused:
            await dial_tcp(Endpoint(*server.getsockname()), 5.0, introduction)
    assert refused.value.status is OpenStatus.UNREACHABLE


# UDP flows


def key(session: SessionKey, source_port: int = 40_000) -> FlowKey:
    return FlowKey(session, PROTOCOL_UDP, "127.0.0.1", source_port, VIP, VIP_PORT)


class Agent:
    """Sends datagrams in one session and keeps what comes back."""

    def __init__(self, flows: UdpFlows, session: SessionKey, backend: tuple[str, int]) -> None:
        self.replies: asyncio.Queue[Packet] = asyncio.Queue()
        self._flows = flows
        self._session = session
        self._backend = backend
        self.chosen = Chosen(backend)

    def send(self, payload: bytes, source_port: int = 40_000) -> bytes:
        packet = build_udp("127.0.0.1", source_port, VIP, VIP_PORT, payload)
        own = key(self._session, source_port)
        if not self._flows.send(own, payload, packet):
            agent = self._session[1]
            self._flows.open(own, agent, self.chosen, self._backend, packet=packet, reply=self._reply)
            self._flows.send(own, payload, packet)
        return packet

    async def reply(self) -> Packet:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.replies.get()

    def _reply(self, packet: bytes) -> None:
        self.replies.put_nowait(parse(packet))


@pytest.fixture
async def flows() -> AsyncIterator[UdpFlows]:
    made = UdpFlows(per_agent=10, total=20, log=FlowLog(None))
    yield made
    made.close()


@asynccontextmanager
async def udp_echo() -> AsyncIterator[tuple[tuple[str, int], list[tuple[str, int]]]]:
    """Echo with the asker's address recorded."""
    seen: list[tuple[str, int]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))

        def readable() -> None:
            payload, address = sock.recvfrom(65_535)
            seen.append(address)
            sock.sendto(payload, address)

        loop = asyncio.get_running_loop()
        loop.add_reader(sock.fileno(), readable)
        try:
            yield sock.getsockname(), seen
        finally:
            loop.remove_reader(sock.fileno())


async def test_the_same_tuple_of_two_agents_never_crosses(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, seen):
        ann, bob = Agent(flows, ANN, backend), Agent(flows, BOB, backend)
        for number in range(200):
            ann.send(b"ann %d" % number)
            bob.send(b"bob %d" % number)
            assert (await ann.reply()).payload == b"ann %d" % number
            assert (await bob.reply()).payload == b"bob %d" % number
        assert len(set(seen)) == len(flows) == 2
        assert ann.replies.empty() and bob.replies.empty()


async def test_a_reply_comes_from_the_virtual_address(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, _seen):
        ann = Agent(flows, ANN, backend)
        ann.send(b"hello")
        reply = await ann.reply()
        assert (reply.source, reply.source_port) == (VIP, VIP_PORT)
        assert (reply.destination, reply.destination_port) == ("127.0.0.1", 40_000)


async def test_nobody_but_the_backend_can_answer(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, seen):
        ann = Agent(flows, ANN, backend)
        ann.send(b"first")
        await ann.reply()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"forged", seen[0])
        ann.send(b"second")
        assert (await ann.reply()).payload == b"second"
        assert ann.replies.empty()


async def test_a_closed_port_comes_back_as_an_icmp_error(flows: UdpFlows) -> None:
    ann = Agent(flows, ANN, ("127.0.0.1", closed_udp_port()))
    for _ in range(3):
        sent = ann.send(b"anybody?")
        error = await ann.reply()
        assert (error.protocol, error.icmp_type, error.icmp_code) == (PROTOCOL_ICMP, 3, 3)
        assert (error.source, error.destination) == (VIP, "127.0.0.1")
        assert sent.startswith(error.payload[:28])
    assert len(flows) == 1
    assert ann.chosen.failures == 3


async def test_flows_leave_a_backend_for_a_better_one(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, _seen):
        ann, bob = Agent(flows, ANN, backend), Agent(flows, BOB, ("127.0.0.1", closed_udp_port()))
        ann.send(b"x")
        await ann.reply()
        assert ann.chosen.successes == 1
        bob.send(b"x")
        flows.leave(bob.chosen.route, ann.chosen.backend)
        assert len(flows) == 1, "the same published port, whatever table says so"
        assert (ann.chosen.releases, bob.chosen.releases) == (1, 0)


async def test_a_datagram_may_find_that_its_flow_left_its_backend(flows: UdpFlows) -> None:
    ann = Agent(flows, ANN, ("127.0.0.1", closed_udp_port()))
    ann.chosen.failed = lambda: flows.leave(ann.chosen.route, ann.chosen.backend)  # type: ignore[method-assign]
    ann.send(b"refused by the time that")
    ann.send(b"this is sent")
    assert len(flows) == 0 and ann.chosen.releases == 1
    error = await ann.reply()
    assert (error.protocol, error.icmp_type, error.icmp_code) == (PROTOCOL_ICMP, 3, 3)
    ann.send(b"a new flow")
    assert len(flows) == 1


async def test_a_flow_survives_a_backend_that_comes_later(flows: UdpFlows) -> None:
    port = closed_udp_port()
    ann = Agent(flows, ANN, ("127.0.0.1", port))
    ann.send(b"too early")
    await ann.reply()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as backend:
        backend.bind(("127.0.0.1", port))
        backend.settimeout(WAIT_SECONDS)
        ann.send(b"now")
        payload, address = backend.recvfrom(100)
        backend.sendto(payload, address)
        assert (await ann.reply()).payload == b"now"


async def test_a_datagram_too_big_for_the_way_says_so(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, _seen):
        ann = Agent(flows, ANN, backend)
        sent = build_udp("127.0.0.1", 40_000, VIP, VIP_PORT, b"small")
        flows.open(key(ANN), ANN[1], ann.chosen, backend, packet=sent, reply=ann._reply)
        # More than any UDP datagram: the kernel says EMSGSIZE as it does for a small path MTU.
        flows.send(key(ANN), bytes(65_530), sent)
        error = await ann.reply()
        assert (error.icmp_type, error.icmp_code) == (3, 4)


async def test_no_route_to_the_backend_is_an_icmp_error(flows: UdpFlows) -> None:
    ann = Agent(flows, ANN, ("255.255.255.255", 53))
    packet = build_udp("127.0.0.1", 40_000, VIP, VIP_PORT, b"x")
    flows.open(key(ANN), ANN[1], ann.chosen, ("255.255.255.255", 53), packet=packet, reply=ann._reply)
    assert (await ann.reply()).icmp_type == 3
    assert len(flows) == 0
    assert ann.chosen.releases == 1


async def test_who_makes_room_is_the_one_used_longest_ago_and_told_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "flows.log"
    log = FlowLog(str(file))
    flows = UdpFlows(per_agent=2, total=20, log=log)
    async with udp_echo() as (backend, _):
        ann = Agent(flows, ANN, backend)
        for port in (1, 2, 1, 3):  # the second was used longest ago
            ann.send(b"x", port)
            await ann.reply()
        assert not flows.send(key(ANN, 2), b"x", b"") and flows.send(key(ANN, 1), b"x", b"")
        log.close()
        (line,) = [json.loads(each) for each in file.read_text().splitlines()]
        assert (line["source"], line["ended"], line["reason"]) == ("127.0.0.1:2", "evicted", "limit_reached")
    flows.close()


async def test_limits_and_ends(flows: UdpFlows) -> None:
    async with udp_echo() as (backend, seen):
        ann, bob = Agent(flows, ANN, backend), Agent(flows, BOB, backend)
        for port in range(1, 12):
            ann.send(b"x", port)
            await ann.reply()
        assert len(flows) == 10 and len(set(seen)) == 11
        for port in range(1, 11):
            bob.send(b"x", port)
        carol = Agent(flows, (("relay-2", 2), SessionId("c" * 16)), backend)
        with pytest.raises(Refused) as refused:
            carol.send(b"x")
        assert refused.value.reason is Reason.LIMIT_REACHED
        assert carol.chosen.releases == 1, "what was counted at its backend is taken back"
        flows.end_session(ANN)
        assert len(flows) == 10
        assert (ann.chosen.releases, bob.chosen.releases) == (11, 0)
        assert not flows.send(key(ANN, 5), b"x", b"")
        flows.expire()
        assert len(flows) == 10
