"""sidecar.link.packet and .switch: real QUIC through the real forwarder on loopback."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from relay.forwarder import Forwarder
from sidecar.link.network import standing
from sidecar.link.packet import HALF_OPEN_MAX, PacketLink
from sidecar.link.paths import Paths, State
from sidecar.link.switch import BIND_REFRESH_SECONDS, PathSwitch
from tests.support.certificates import Pki
from tests.support.hostile import client_connection
from ztna import udp
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError, ZtnaError
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.telemetry import DROPS
from ztna.tls_tcp import connect
from ztna.udp_bulk import BulkSocket
from ztna.wire.control import Address, ForwarderBind
from ztna.wire.forwarder import Bound, encode, probe

ECHO = ServiceName("echo-service")
DEADLINE_SECONDS = 10
PROBE_KEY = Secret(b"p" * 32)


def anybody(_identity: Identity) -> None:
    """Let everybody in whose certificate verified."""


class Inbox:
    """Packets received, and a way to wait for so many."""

    def __init__(self) -> None:
        self.packets: list[tuple[ServiceName, bytes]] = []
        self._arrived = asyncio.Event()

    def __call__(self, _link: PacketLink, service: ServiceName, packet: bytes) -> None:
        self.packets.append((service, packet))
        self._arrived.set()

    async def wait(self, count: int) -> list[tuple[ServiceName, bytes]]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(self.packets) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.packets


class Ground:
    """A forwarder, one link's binds, both ends' credentials and inboxes."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        self.pki = Pki(directory)
        self.forwarder = Forwarder(BulkSocket.open((host, 0)))
        self.agent = Credentials.load(self.pki.agent())
        self.connector = Credentials.load(self.pki.connector())
        self.near, self.far = Inbox(), Inbox()
        address = Address(*self.forwarder.address)
        self.binds = [
            ForwarderBind(address, Binary(os.urandom(16)), Secret(os.urandom(32))) for _ in range(2)
        ]
        agent, connector = ((bytes(each.bind_id), each.bind_secret) for each in self.binds)
        self.forwarder.add_link("link", agent, connector)
        self.links: list[PacketLink] = []

    def serve(
        self,
        admit: Callable[[Identity], None] = anybody,
        *,
        addresses: Sequence[str] = (),
        allow_private: bool = False,
    ) -> PacketLink:
        link = PacketLink.serve(
            self.binds[1],
            PROBE_KEY,
            self.connector,
            admit=admit,
            receive=self.far,
            addresses=lambda: addresses,
            allow_private=allow_private,
        )
        self.links.append(link)
        return link

    async def dial(
        self,
        check: Callable[[Identity], None] = anybody,
        *,
        addresses: Sequence[str] = (),
        allow_private: bool = False,
        timeout_s: float = DEADLINE_SECONDS,
    ) -> PacketLink:
        link = await PacketLink.dial(
            self.binds[0],
            PROBE_KEY,
            self.agent,
            check=check,
            receive=self.near,
            addresses=lambda: addresses,
            allow_private=allow_private,
            timeout_s=timeout_s,
        )
        self.links.append(link)
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.forwarder.close()


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    ground = Ground(tmp_path)
    yield ground
    ground.close()


async def test_packets_go_both_ways_with_their_service(ground: Ground) -> None:
    far = ground.serve()
    near = await ground.dial()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await far.established
    assert near.send(ECHO, b"ping")
    assert await ground.far.wait(1) == [(ECHO, b"ping")]
    assert far.send(ECHO, b"pong")
    assert await ground.near.wait(1) == [(ECHO, b"pong")]
    assert near.peer.fingerprint == ground.connector.identity.fingerprint
    assert far.peer.name == ground.agent.identity.name
    assert near.path == far.path == "forwarded"


async def test_a_link_binds_again_and_again_so_that_a_forgotten_mapping_comes_back(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BIND_REFRESH_SECONDS <= 30, "RFC 4787, REQ-5: some NATs forget after so long"
    monkeypatch.setattr("sidecar.link.switch.BIND_REFRESH_SECONDS", 0.1)
    far = ground.serve()
    near = await ground.dial()
    ground.forwarder.remove_link("link")
    agent, connector = ((bytes(each.bind_id), each.bind_secret) for each in ground.binds)
    ground.forwarder.add_link("link", agent, connector)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await far.established
        for link, inbox in ((near, ground.far), (far, ground.near)):
            while not inbox.packets:
                link.send(ECHO, b"is anybody there?")
                await asyncio.sleep(0.05)


async def test_a_packet_above_the_datagram_limit_arrives_whole(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    packets = [os.urandom(size) for size in (1150, 1200, 9000, 65_535)]
    for packet in packets:
        assert near.send(ECHO, packet)
    arrived = await ground.far.wait(len(packets))
    assert sorted(packet for _, packet in arrived) == sorted(packets)


async def test_large_packets_that_wait_are_bounded(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    sent = sum(near.send(ECHO, bytes(2000)) for _ in range(1000))
    assert 100 < sent < 1000
    assert len(await ground.far.wait(sent)) == sent


async def test_closing_tells_the_other_end_why(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    near.close(Reason.DRAINING)
    assert near.closed.result() is Reason.DRAINING
    assert not near.send(ECHO, b"late")
    near.close()


async def test_the_agents_link_ends_when_the_connector_closes(ground: Ground) -> None:
    far = ground.serve()
    near = await ground.dial()
    far.close(Reason.STALE_EPOCH)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await near.closed is Reason.STALE_EPOCH


async def test_an_agent_that_connects_again_is_served_again(ground: Ground) -> None:
    far = ground.serve()
    first = await ground.dial()
    first.close()
    second = await ground.dial()
    assert second.send(ECHO, b"again")
    assert await ground.far.wait(1) == [(ECHO, b"again")]
    assert not far.closed.done()


async def test_a_second_connection_takes_over(ground: Ground) -> None:
    far = ground.serve()
    first = await ground.dial()
    second = await ground.dial()
    assert second.send(ECHO, b"two")
    assert await ground.far.wait(1) == [(ECHO, b"two")]
    assert far.send(ECHO, b"to the second")
    assert await ground.near.wait(1) == [(ECHO, b"to the second")]
    assert not second.closed.done()
    assert first is not second


def refuse(_identity: Identity) -> None:
    raise IdentityError(Reason.NO_GRANT, "not the one that was meant")


async def test_the_agent_refuses_another_connector(ground: Ground) -> None:
    ground.serve()
    with pytest.raises(IdentityError, match="no_grant"):
        await ground.dial(check=refuse)


async def test_the_connector_refuses_another_agent(ground: Ground) -> None:
    far = ground.serve(admit=refuse)
    with pytest.raises(LinkError, match="no_grant"):
        await ground.dial()
    assert not far.established.done()
    with pytest.raises(LinkError):
        _ = far.peer
    assert not far.send(ECHO, b"to nobody")


async def test_another_authority_s_certificate_is_refused(ground: Ground) -> None:
    ground.serve(admit=anybody)
    rogue = Pki(ground.pki.directory / "rogue-pki")
    ground.agent = Credentials.load(rogue.agent())
    with pytest.raises(ZtnaError):
        await ground.dial()


async def test_without_a_socket_dialling_is_a_link_error(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors, or a forwarder of an address family that this host lacks: the link fails, not the agent."""

    def nothing_left(*_: object) -> object:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(udp.UdpSocket, "open", nothing_left)
    with pytest.raises(LinkError, match="too many open files"):
        await ground.dial()
    monkeypatch.setattr(socket, "socket", nothing_left)
    with pytest.raises(LinkError, match="too many open files"):
        await connect(("127.0.0.1", 1), 1.0)


async def test_a_dial_that_goes_on_is_not_given_up_on_a_long_way(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round trips of 0.7 s, two of which QUIC needs; each is in time."""
    send, loop = PathSwitch.send, asyncio.get_running_loop()

    def send_late(way: PathSwitch, packets: Sequence[tuple[bytes, tuple[str, int]]]) -> None:
        loop.call_later(0.35, send, way, packets)

    monkeypatch.setattr(PathSwitch, "send", send_late)
    ground.serve()
    began_at = loop.time()
    near = await ground.dial(timeout_s=1.2)
    assert loop.time() - began_at > 1.2
    assert near.send(ECHO, b"ping")
    assert await ground.far.wait(1) == [(ECHO, b"ping")]


async def test_without_a_connector_dialling_ends_in_time(ground: Ground) -> None:
    with pytest.raises(LinkError, match=r"within 0\.5 s|does not answer"):
        await ground.dial(timeout_s=0.5)


async def test_a_cut_binding_closes_nothing_of_others_and_garbage_is_dropped(ground: Ground) -> None:
    far = ground.serve()
    near = await ground.dial()
    before = DROPS.labels("packet_carrier", "malformed")._value.get()
    forged = DROPS.labels("packet_carrier", "forged_probe")._value.get()
    stranger = udp.UdpSocket.open(("127.0.0.1", 0), lambda _: None)
    target = ("127.0.0.1", far.carrying._out.address[1])
    stranger.send(
        [
            (b"", target),
            (b"\x00garbage", target),
            (b"\x40" + bytes(40), target),
            (probe(b"wrong key", bytes(12)), target),
            (encode(Bound(bytes(8), Address("192.0.2.1", 1))), target),
        ]
    )
    near.send(ECHO, b"\x00")
    await ground.far.wait(1)
    assert far.carrying.reflexive != Address("192.0.2.1", 1)
    assert DROPS.labels("packet_carrier", "malformed")._value.get() >= before + 1
    assert DROPS.labels("packet_carrier", "forged_probe")._value.get() == forged + 1
    stranger.close()


async def test_strangers_take_no_part_of_the_handshakes(ground: Ground) -> None:
    """Only a few may be half open: who is neither the forwarder nor proved the probe key gets none of them."""
    far = ground.serve()
    stranger = udp.UdpSocket.open(("127.0.0.1", 0), lambda _: None)
    target = ("127.0.0.1", far.carrying._out.address[1])
    before = DROPS.labels("packet_carrier", "unknown_source")._value.get()
    for _ in range(2 * HALF_OPEN_MAX):
        client = client_connection("ztna-link", None)
        client.connect(target, time.monotonic())
        stranger.send([(data, target) for data, _ in client.datagrams_to_send(time.monotonic())])
    near = await ground.dial()
    near.send(ECHO, b"all the same")
    assert await ground.far.wait(1) == [(ECHO, b"all the same")]
    assert DROPS.labels("packet_carrier", "unknown_source")._value.get() >= before + 2 * HALF_OPEN_MAX
    stranger.close()


async def test_malformed_messages_of_the_peer_are_dropped(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    connection = near._connection
    assert connection is not None
    for message in (b"", b"\x2f", b"\x2f\x04Caps....", b"\x2f\x02\xff\xfe....", b"\x45" + bytes(30)):
        connection.send_datagram(message)
    near.send(ECHO, b"good")
    assert await ground.far.wait(1) == [(ECHO, b"good")]


async def test_a_bidirectional_stream_ends_the_connection(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    connection = near._connection
    assert connection is not None
    connection.send_stream(connection.open_stream(), b"TCP?", end=True)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await near.closed


async def test_a_validated_candidate_carries_and_the_forwarder_rests(tmp_path: Path) -> None:
    """Needs an address that is not loopback; packets to it stay on this machine all the same."""
    hosts = (await asyncio.to_thread(standing)).addresses
    if not hosts:
        pytest.skip("no interface with an address beside loopback")
    ground = Ground(tmp_path, host=hosts[0])
    try:
        far = ground.serve(addresses=hosts, allow_private=True)
        near = await ground.dial(addresses=hosts, allow_private=True)
        assert near.local_candidates(near.carrying.bind_id)
        near.probe(near.carrying.bind_id, far.local_candidates(far.carrying.bind_id))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while near.path != "direct" or far.path != "direct":  # the far end learns from our probe
                await asyncio.sleep(0.05)
        ground.forwarder.close()
        near.send(ECHO, b"direct")
        assert await ground.far.wait(1) == [(ECHO, b"direct")]
        far.send(ECHO, b"direct too")
        assert await ground.near.wait(1) == [(ECHO, b"direct too")]
        assert near.unanswered_s == 0
    finally:
        ground.close()


async def test_packets_that_nothing_answers_are_noticed(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    near.send(ECHO, b"x")
    await ground.far.wait(1)
    ground.forwarder.close()
    stranger = udp.UdpSocket.open(("127.0.0.1", 0), lambda _: None)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while near.unanswered_s < 0.1:
            near.send(ECHO, b"y")
            stranger.send([(b"\x40" + bytes(40), ("127.0.0.1", near.carrying._out.address[1]))])
            await asyncio.sleep(0.01)  # the time that passes is what is seen
    stranger.close()


async def test_loopback_is_never_a_candidate(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial()
    assert all(not each.ip.startswith("127.") for each in near.local_candidates(near.carrying.bind_id))
    assert near.probe(near.carrying.bind_id, [Address("127.0.0.1", 4435), Address("169.254.0.1", 4435)]) == 2


async def test_another_path_owes_no_answers_of_the_one_before(ground: Ground) -> None:
    """Or a link that has just left a dead path would be taken for dead itself."""
    far = ground.serve()
    near = await ground.dial()
    near.send(ECHO, b"x")
    await ground.far.wait(1)
    far.carrying.close()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while near.unanswered_s < 0.1:
            near.send(ECHO, b"y")
            await asyncio.sleep(0.01)  # the time that passes is what is seen
    near._path_changed(near.carrying.bind_id)
    assert near.unanswered_s == 0


async def test_after_a_change_of_the_network_it_is_bound_anew_and_the_candidates_told(ground: Ground) -> None:
    hosts = ["8.8.8.8"]
    ground.serve()
    near = await ground.dial(addresses=hosts)
    told: asyncio.Queue[bytes] = asyncio.Queue()
    near.candidates_changed = lambda link, bind_id: told.put_nowait(bind_id)
    way = near.carrying
    assert [each.ip for each in near.local_candidates(way.bind_id)] == hosts
    hosts[:] = ["8.8.4.4", "8.8.8.8"]
    near.network_changed()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await told.get() == way.bind_id
    assert [each.ip for each in near.local_candidates(way.bind_id)] == hosts

    way.reflexive = Address("192.0.2.9", 9)  # as after a NAT was restarted: the next bind shows another
    way._bind_at = 0.0
    way._tick()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await told.get()
    assert way.reflexive == Address("127.0.0.1", way._out.address[1])
    assert told.empty()


async def test_candidates_of_the_other_family_have_a_socket_of_their_own(ground: Ground) -> None:
    ground.serve()
    near = await ground.dial(addresses=["2600::1", "8.8.8.8"])
    six, four = near.local_candidates(near.carrying.bind_id)
    assert (six.ip, four.ip) == ("2600::1", "8.8.8.8")
    assert four.port == near.carrying._out.address[1] != six.port
    assert near.local_candidates(near.carrying.bind_id) == (six, four)


async def test_a_family_that_this_host_lacks_is_neither_offered_nor_tried(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = udp.UdpSocket.open

    def open_ipv4(address: tuple[str, int], receive: object) -> object:
        if ":" in address[0]:
            raise ZtnaError("no such family")
        return opened(address, receive)

    monkeypatch.setattr(udp.UdpSocket, "open", open_ipv4)
    ground.serve()
    near = await ground.dial(addresses=["2600::1", "8.8.8.8"])
    bind_id = near.carrying.bind_id
    assert [each.ip for each in near.local_candidates(bind_id)] == ["8.8.8.8"]
    assert near.probe(bind_id, [Address("2600::2", 4435)]) == 1


async def test_a_direct_path_is_doubted_when_the_other_end_leaves_it(tmp_path: Path) -> None:
    """Needs an address that is not loopback, as above."""
    hosts = (await asyncio.to_thread(standing)).addresses
    if not hosts:
        pytest.skip("no interface with an address beside loopback")
    ground = Ground(tmp_path, host=hosts[0])
    try:
        far = ground.serve(addresses=hosts, allow_private=True)
        near = await ground.dial(addresses=hosts, allow_private=True)
        near.probe(near.carrying.bind_id, far.local_candidates(far.carrying.bind_id))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while near.path != "direct" or far.path != "direct":
                await asyncio.sleep(0.05)
        # Dead for the near end, which sends by the forwarder; the far end hears it there, and no answer of its own.
        near.carrying.paths = Paths(near.carrying.forwarder)
        near.carrying._look_at_path()
        near.carrying._probed = lambda packet, source: None  # type: ignore[method-assign]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while far.path == "direct":
                near.send(ECHO, b"by the forwarder")
                await asyncio.sleep(0.05)
        assert State.PROBING in [each.state for each in far.carrying.paths.seen], (
            "what falls silent by itself rests"
        )
    finally:
        ground.close()
