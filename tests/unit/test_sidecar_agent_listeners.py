"""sidecar.agent.listeners: sockets on virtual addresses of 127.0.0.0/8."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import pytest

from sidecar.agent.listeners import EXHAUSTED_PAUSE_SECONDS, Listeners, TcpPort, UdpPort, VirtualPort
from ztna.leases import Lease, Port, Protocol
from ztna.names import ServiceName
from ztna.telemetry import DROPS
from ztna.udp import SockAddr

WEB = ServiceName("web-app")
WAIT_SECONDS = 10


class Owner:
    """Takes what listeners hand on, and their warnings."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[tuple[VirtualPort, socket.socket, SockAddr]] = asyncio.Queue()
        self.received: asyncio.Queue[tuple[UdpPort, bytes, SockAddr]] = asyncio.Queue()
        self.warnings: dict[str, str] = {}
        self.listeners = Listeners(
            lambda *args: self.accepted.put_nowait(args),
            lambda *args: self.received.put_nowait(args),
            self.warn,
        )

    def warn(self, name: str, detail: str | None) -> None:
        if detail is None:
            del self.warnings[name]
        else:
            self.warnings[name] = detail


@pytest.fixture
def ip() -> str:
    return f"127.{random.randrange(110, 250)}.{random.randrange(256)}.{random.randrange(1, 255)}"


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    owner = Owner()
    yield owner
    owner.listeners.close()


def lease(ip: str, *ports: Port) -> dict[ServiceName, Lease]:
    return {WEB: Lease(IPv4Address(ip), 1, ports)}


async def test_connections_and_datagrams_are_handed_on(owner: Owner, ip: str) -> None:
    owner.listeners.apply(lease(ip, Port("tcp", 8080), Port("udp", 53000), Port("icmp", 0)))
    assert owner.listeners.bound == {
        VirtualPort(WEB, "tcp", ip, 8080, ip),
        VirtualPort(WEB, "udp", ip, 53000, ip),
    }
    async with asyncio.timeout(WAIT_SECONDS):
        with socket.create_connection((ip, 8080)) as program:
            at, local, source = await owner.accepted.get()
            assert (at.port, source) == (8080, program.getsockname())
            assert local.getblocking() is False
            local.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.settimeout(WAIT_SECONDS)
            asker.connect((ip, 53000))
            asker.send(b"x" * 60_000)
            port, data, source = await owner.received.get()
            assert (len(data), source) == (60_000, asker.getsockname())
            port.send(b"answer", source)
            assert asker.recv(100) == b"answer"


async def test_who_may_not_is_reset_and_not_heard(ip: str) -> None:
    owner, asked = Owner(), []

    def may_use(protocol: Protocol, program: SockAddr, called: SockAddr) -> bool:
        asked.append((protocol, program, called))
        return len(asked) > 2

    owner.listeners = Listeners(
        lambda *args: owner.accepted.put_nowait(args),
        lambda *args: owner.received.put_nowait(args),
        owner.warn,
        may_use=may_use,
    )
    owner.listeners.apply(lease(ip, Port("tcp", 8080), Port("udp", 53000)))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_SECONDS):
        with socket.create_connection((ip, 8080)) as program:
            program.setblocking(False)
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(program, 1)
            assert asked == [("tcp", program.getsockname(), (ip, 8080))]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.connect((ip, 53000))
            asker.send(b"refused")
            asker.send(b"allowed")
            assert (await owner.received.get())[1] == b"allowed"
            assert asked[1:] == [("udp", asker.getsockname(), (ip, 53000))] * 2
    assert owner.accepted.empty()
    owner.listeners.close()


async def test_a_held_port_is_told_and_had_once_it_is_free(owner: Owner, ip: str) -> None:
    wanted = lease(ip, Port("tcp", 8080), Port("udp", 53000))
    with socket.create_server((ip, 8080)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((ip, 53000))
        owner.listeners.apply(wanted)
        assert set(owner.warnings) == {f"port tcp {ip}:8080", f"port udp {ip}:53000"}
        assert set(owner.listeners.held.values()) == {"another program holds it"}
        owner.listeners.retry()
        owner.listeners.apply(wanted)
        assert owner.listeners.bound == frozenset()
    owner.listeners.retry()
    assert owner.warnings == {}
    assert len(owner.listeners.bound) == 2
    assert owner.listeners.held == {}


async def test_a_service_is_called_where_its_place_is_and_known_by_its_lease(owner: Owner, ip: str) -> None:
    owner.listeners.apply(lease("192.0.2.1", Port("tcp", 8080)), lambda service, lease: [ip])
    async with asyncio.timeout(WAIT_SECONDS):
        with socket.create_connection((ip, 8080)):
            at, local, _ = await owner.accepted.get()
            local.close()
    assert (at.called, at.leased, str(at)) == ((ip, 8080), ("192.0.2.1", 8080), f"tcp {ip}:8080")
    owner.listeners.apply(lease("192.0.2.1", Port("tcp", 8080)), lambda service, lease: [])
    assert owner.listeners.bound == frozenset()


async def test_ipv6_places_have_the_same_ports(owner: Owner) -> None:
    wanted = lease("192.0.2.1", Port("tcp", 38_080), Port("udp", 38_053))
    owner.listeners.apply(wanted, lambda service, lease: ["::1"])
    assert {str(at) for at in owner.listeners.bound} == {"tcp [::1]:38080", "udp [::1]:38053"}
    async with asyncio.timeout(WAIT_SECONDS):
        with socket.create_connection(("::1", 38_080)) as program:
            _, local, source = await owner.accepted.get()
            assert source == program.getsockname()[:2]
            local.close()
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as asker:
            asker.settimeout(WAIT_SECONDS)
            asker.connect(("::1", 38_053))
            asker.send(b"question")
            port, _, asked_from = await owner.received.get()
            port.send(b"answer", asked_from)
            assert asker.recv(100) == b"answer"


async def test_an_address_that_is_not_local_is_told(owner: Owner) -> None:
    owner.listeners.apply(lease("192.0.2.1", Port("tcp", 8080)))
    assert list(owner.listeners.held.values()) == ["Cannot assign requested address"]


async def test_the_program_that_left_is_not_the_others_business(owner: Owner, ip: str) -> None:
    owner.listeners.apply(lease(ip, Port("udp", 53000)))
    async with asyncio.timeout(WAIT_SECONDS):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.connect((ip, 53000))
            asker.send(b"one")
            port, _, gone = await owner.received.get()
        port.send(b"nobody is there", gone)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.connect((ip, 53000))
            asker.send(b"two")
            assert (await owner.received.get())[1] == b"two"
        dropped = DROPS.labels("agent_udp", "kernel_refused")._value.get()
        owner.listeners.apply({})
        assert port.is_closed
        port.send(b"late", gone)
        assert DROPS.labels("agent_udp", "kernel_refused")._value.get() == dropped + 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED, errno.EPROTO, errno.EHOSTUNREACH])
async def test_after_a_failed_accept_the_next_connection_is_taken(
    ip: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without descriptors after a pause; what happened to one that waited is nobody else's business (accept(2))."""
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    port = TcpPort(VirtualPort(WEB, "tcp", ip, 8080, ip), lambda _, sock, source: accepted.put_nowait(sock))
    real = port._socket
    failures = [OSError(number, os.strerror(number))]

    class Exhausted:
        def accept(self) -> object:
            if failures:
                raise failures.pop()
            return real.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    monkeypatch.setattr(port, "_socket", Exhausted())
    with socket.create_connection((ip, 8080)):
        async with asyncio.timeout(WAIT_SECONDS + EXHAUSTED_PAUSE_SECONDS):
            (await accepted.get()).close()
    assert not failures
    port.close()
