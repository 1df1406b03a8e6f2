"""sidecar.agent.raw and .tun: whole packets to and from programs, and what is said where the host has no such thing."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest

from sidecar.agent import raw, tun
from sidecar.agent.raw import RawSockets
from sidecar.agent.tun import PACKETS_PER_WAKEUP, Tun
from ztna.errors import ZtnaError
from ztna.packet import build_udp
from ztna.telemetry import DROPS

DEADLINE_SECONDS = 5.0
FOUR = build_udp("10.100.0.2", 7, "10.0.0.9", 4000, b"x")
SIX = b"\x60" + bytes(23) + socket.inet_pton(socket.AF_INET6, "fd12::9") + b"x"


def drops(where: str) -> float:
    return float(DROPS.labels(where, "kernel_refused")._value.get())


class FakeSocket:
    """Takes what it is given, or refuses."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, tuple[str, int]]] = []
        self.fails = False
        self.is_closed = False

    def sendto(self, packet: bytes, address: tuple[str, int]) -> None:
        if self.fails:
            raise OSError(errno.EPERM, "no")
        self.sent.append((packet, address))

    def close(self) -> None:
        self.is_closed = True


def raw_with(
    monkeypatch: pytest.MonkeyPatch, **failures: OSError
) -> tuple[RawSockets, dict[str, FakeSocket]]:
    """Return raw sockets of which those of some families cannot be had, and those that can."""
    made: dict[str, FakeSocket] = {}

    def make(family: socket.AddressFamily) -> FakeSocket:
        if family.name in failures:
            raise failures[family.name]
        return made.setdefault(family.name, FakeSocket())

    monkeypatch.setattr(raw, "_raw", make)
    return RawSockets(), made


def test_a_packet_goes_to_the_address_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets, made = raw_with(monkeypatch)
    sockets.write(FOUR)
    sockets.write(SIX)
    assert made["AF_INET"].sent == [(FOUR, ("10.0.0.9", 0))]
    assert made["AF_INET6"].sent == [(SIX, ("fd12::9", 0))]
    made["AF_INET"].fails = True
    before = drops("agent_raw")
    sockets.write(FOUR)
    assert drops("agent_raw") == before + 1
    sockets.close()
    assert all(each.is_closed for each in made.values())


def test_a_host_without_ipv6_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets, made = raw_with(monkeypatch, AF_INET6=OSError(errno.EAFNOSUPPORT, "no family"))
    sockets.write(SIX)
    assert made["AF_INET"].sent == []


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_who_may_not_is_told(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    with pytest.raises(PermissionError):
        raw_with(monkeypatch, **{family: PermissionError(errno.EPERM, "not permitted")})


def test_a_host_without_tun_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tun, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(ZtnaError, match="load the module tun"):
        Tun()


@pytest.mark.parametrize(("number", "said"), [(errno.EPERM, "CAP_NET_ADMIN"), (errno.ENOMEM, "no device")])
def test_a_device_that_cannot_be_made_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    opened: list[int] = []

    def refuse(descriptor: int, *_: object) -> bytes:
        opened.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tun, "DEVICE", os.devnull)
    monkeypatch.setattr("fcntl.ioctl", refuse)
    with pytest.raises(ZtnaError, match=said):
        Tun()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(opened[0])


async def test_packets_are_read_and_written_whole_until_it_is_closed() -> None:
    device = Tun.__new__(Tun)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    device._fd, device._reading = os.dup(theirs.fileno()), None
    theirs.close()
    received: list[bytes] = []
    done = asyncio.Event()

    def receive(packet: bytes) -> None:
        received.append(packet)
        if len(received) > PACKETS_PER_WAKEUP:
            device.close()
            done.set()

    device.start(receive)
    device.write(FOUR)
    assert ours.recv(2048) == FOUR
    for _ in range(PACKETS_PER_WAKEUP + 2):
        ours.send(FOUR)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await done.wait()
    assert received == [FOUR] * (PACKETS_PER_WAKEUP + 1), "and nothing after it was closed"
    device.close()
    before = drops("agent_tun")
    device.write(FOUR)
    assert drops("agent_tun") == before + 1
    ours.close()
