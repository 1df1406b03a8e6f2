"""What routers and hosts on the way to a backend say by ICMP reaches the agent, about its own packet: a real router."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sidecar.connector import backends
from sidecar.connector.backends import UdpFlows
from sidecar.connector.flow_log import FlowLog
from sidecar.connector.flows import FlowKey, SessionKey
from tests.support.chosen import Chosen
from tests.support.namespaces import Host, network
from ztna.names import SessionId
from ztna.packet import PROTOCOL_ICMP, PROTOCOL_UDP, build_udp, parse
from ztna.udp import SockAddr

pytestmark = pytest.mark.namespaces

WAIT_SECONDS = 15.0
VIP, ASKER = ("10.100.0.2", 53), ("127.0.0.1", 40_000)
SESSION: SessionKey = (("relay-1", 1), SessionId("a" * 16))
KEY = FlowKey(SESSION, PROTOCOL_UDP, *ASKER, *VIP)
NARROW_MTU = 1300


@dataclass
class Ground:
    connector: Host
    backend: Host


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """A connector's host and a backend's, with a router between them whose far side is narrower."""
    with network("connector", "router") as made:
        connector, router = made.hosts["connector"], made.hosts["router"]
        backend = made.behind("backend", router, "192.168.77.2", "192.168.77.1")
        for host, device in ((router, "lan0"), (backend, "eth0")):
            host.run("ip", "link", "set", device, "mtu", str(NARROW_MTU))
        connector.run("ip", "route", "add", "192.168.77.0/24", "via", router.address)
        monkeypatch.setattr(
            backends,
            "connected_udp",
            lambda address: backends._connected(connector.socket(socket.SOCK_DGRAM), address),
        )
        yield Ground(connector, backend)


async def send(flows: UdpFlows, replies: asyncio.Queue[bytes], address: SockAddr, payload: bytes) -> bytes:
    """Send a datagram of the one flow and return the packet that comes back."""
    packet = build_udp(*ASKER, *VIP, payload)
    if not flows.send(KEY, payload, packet):
        flows.open(KEY, "ann", Chosen(address), address, packet=packet, reply=replies.put_nowait)
        flows.send(KEY, payload, packet)
    async with asyncio.timeout(WAIT_SECONDS):
        return await replies.get()


async def test_a_router_that_cannot_pass_it_on_says_how_much_it_can(ground: Ground) -> None:
    flows, replies = UdpFlows(per_agent=10, total=10, log=FlowLog(None)), asyncio.Queue[bytes]()
    loop = asyncio.get_running_loop()
    with ground.backend.socket(socket.SOCK_DGRAM) as server:
        server.setblocking(False)
        server.bind((ground.backend.address, 5353))
        loop.add_reader(server.fileno(), lambda: server.sendto(*server.recvfrom(65_535)))
        payload, address = os.urandom(1_400), (ground.backend.address, 5353)
        try:
            error = await send(flows, replies, address, payload)
            told = parse(error)
            assert (told.protocol, told.icmp_type, told.icmp_code) == (PROTOCOL_ICMP, 3, 4)
            assert (told.source, told.destination) == (VIP[0], ASKER[0])
            assert int.from_bytes(error[26:28], "big") == NARROW_MTU
            assert build_udp(*ASKER, *VIP, payload).startswith(told.payload[:28])
            # Now that the way is known the datagram goes in pieces, and comes whole.
            assert parse(await send(flows, replies, address, payload)).payload == payload
        finally:
            loop.remove_reader(server.fileno())
            flows.close()


async def test_a_host_without_the_port_says_so(ground: Ground) -> None:
    flows, replies = UdpFlows(per_agent=10, total=10, log=FlowLog(None)), asyncio.Queue[bytes]()
    try:
        told = parse(await send(flows, replies, (ground.backend.address, 5354), b"anybody?"))
        assert (told.protocol, told.icmp_type, told.icmp_code) == (PROTOCOL_ICMP, 3, 3)
        assert told.source == VIP[0], "not the backend's address, which is nobody's business"
    finally:
        flows.close()
