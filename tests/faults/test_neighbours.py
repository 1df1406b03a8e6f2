"""A virtual address is for the programs of its own host: a neighbour that routes to it reaches nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import namespaces

pytestmark = pytest.mark.namespaces

VIRTUAL = "10.100.0.2"
LISTEN = """
import asyncio
from ipaddress import IPv4Address
from sidecar.agent.listeners import Listeners
from ztna.leases import Lease, Port
from ztna.names import ServiceName

async def main(ip):
    listeners = Listeners(
        lambda at, sock, source: (sock.close(), print("tcp", source[0], flush=True)),
        lambda port, data, source: (port.send(data, source), print("udp", source[0], flush=True)),
        lambda name, detail: print(name, detail, flush=True),
    )
    lease = Lease(IPv4Address(ip), 1, (Port("tcp", 8080), Port("udp", 53)))
    listeners.apply({ServiceName("web-app"): lease})
    print("listening", flush=True)
    await asyncio.get_running_loop().create_future()

import sys
asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def hosts() -> Iterator[tuple[namespaces.Host, namespaces.Host]]:
    with namespaces.network("laptop", "neighbour") as network:
        laptop, neighbour = network.hosts["laptop"], network.hosts["neighbour"]
        laptop.run("ip", "route", "add", "local", "10.100.0.0/16", "dev", "lo")
        neighbour.run("ip", "route", "add", "10.100.0.0/16", "via", laptop.address)
        yield laptop, neighbour


def test_only_the_host_s_own_programs_are_heard(hosts: tuple[namespaces.Host, namespaces.Host]) -> None:
    laptop, neighbour = hosts
    agent = subprocess.Popen(
        [*laptop.prefix, sys.executable, "-c", LISTEN, VIRTUAL], stdout=subprocess.PIPE, text=True
    )
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "listening\n"
        with neighbour.socket() as tcp, neighbour.socket(socket.SOCK_DGRAM) as udp:
            tcp.settimeout(5)
            udp.settimeout(5)
            with pytest.raises(ConnectionRefusedError):
                tcp.connect((VIRTUAL, 8080))
            udp.connect((VIRTUAL, 53))
            udp.send(b"let me in")
            with pytest.raises(ConnectionRefusedError):
                udp.recv(100)
        with laptop.socket() as tcp, laptop.socket(socket.SOCK_DGRAM) as udp:
            tcp.settimeout(5)
            udp.settimeout(5)
            tcp.connect((VIRTUAL, 8080))
            assert agent.stdout.readline().startswith("tcp ")
            udp.connect((VIRTUAL, 53))
            udp.send(b"hello")
            assert udp.recv(100) == b"hello"
            assert agent.stdout.readline().startswith("udp ")
    finally:
        agent.kill()
        agent.wait()
