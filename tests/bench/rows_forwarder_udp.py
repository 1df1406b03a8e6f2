"""The forwarder's CPU time per 1,200-byte packet in user space, beside coturn relaying ChannelData.

One load generator for both: it keeps a window of packets in flight and counts those that arrive, so that
none is lost and both forwarders see the same pattern.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Figures,
    Measure,
    Row,
    cpu_seconds,
    free_port,
    need,
    running,
    wait_until,
)
from tests.support.forwarding import ForwarderProcess, LinkPeer, udp_socket
from tests.support.namespaces import Host, LocalNetwork, network, why_not
from ztna.udp import RawSocket, encode_address

PACKETS = 200_000
PACKET_BYTES = 1200
WINDOW = 128
BURST = 32
WAIT_SECONDS = 2.0


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    directory = directory / "forwarder-udp"
    directory.mkdir()
    here = LocalNetwork().host("here")
    return Row(
        f"forwarder: CPU per {PACKET_BYTES:,}-byte packet, one link, user space",
        "<= 1.0 x coturn",
        [
            Contender("ztna forwarder", lambda: ours(directory, Hosts(here, here, here), "user")),
            Contender("coturn", lambda: coturn(directory, Hosts(here, here, here))),
        ],
    )


def kernel_row(directory: Path) -> Row:
    """Return the row of three hosts, where the kernel can forward; `all` has the load's own share too."""
    directory = directory / "forwarder-kernel"
    directory.mkdir()

    return Row(
        f"forwarder: CPU per {PACKET_BYTES:,}-byte packet, one link, between hosts, in the kernel",
        "reported",
        [
            Contender("ztna, kernel", lambda: between_hosts(lambda hosts: ours(directory, hosts, "kernel"))),
            Contender(
                "ztna, user space", lambda: between_hosts(lambda hosts: ours(directory, hosts, "user"))
            ),
            Contender("coturn", lambda: between_hosts(lambda hosts: coturn(directory, hosts))),
        ],
    )


class Hosts(NamedTuple):
    """Where the relay and the two ends are."""

    relay: Host
    left: Host
    right: Host


@contextlib.contextmanager
def between_hosts(
    contender: Callable[[Hosts], contextlib.AbstractContextManager[Measure]],
) -> Iterator[Measure]:
    """Run a contender on three network namespaces; CannotMeasure without root."""
    if (reason := why_not()) is not None:
        raise CannotMeasure(reason)
    with network("relay", "left", "right") as net:
        hosts = Hosts(*(net.hosts[name] for name in Hosts._fields))
        hosts.relay.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        with contender(hosts) as measure:
            yield measure


def blast(source: RawSocket, target: tuple[str, int], sink: RawSocket, packet: bytes) -> int:
    """Send PACKETS through, WINDOW in flight at the most; returns how many arrived."""
    to = encode_address(target)
    burst = [(packet, to)] * BURST
    sent = arrived = 0
    while arrived < PACKETS:
        while sent < PACKETS and sent - arrived <= WINDOW - BURST:
            source.send(burst)
            sent += BURST
        if not select.select([sink], [], [], WAIT_SECONDS)[0]:
            raise CannotMeasure(f"{sent} packets sent, {arrived} arrived, then none for {WAIT_SECONDS} s")
        while got := sink.receive():
            arrived += len(got)
    return arrived


def measure(pid: int, source: RawSocket, target: tuple[str, int], sink: RawSocket, packet: bytes) -> Measure:
    """Return what measures one blast."""

    def once() -> Figures:
        before, all_before = cpu_seconds([pid]), cpu_seconds([pid, os.getpid()])
        count = blast(source, target, sink, packet)
        return {
            "CPU us/packet": (cpu_seconds([pid]) - before) / count * 1e6,
            "all, CPU us/packet": (cpu_seconds([pid, os.getpid()]) - all_before) / count * 1e6,
        }

    return once


@contextlib.contextmanager
def ours(directory: Path, hosts: Hosts, forwarding: str) -> Iterator[Measure]:
    """The forwarder with both sides bound."""
    port = free_port()
    process = ForwarderProcess(hosts.relay, forwarding, directory / "ours.log", port=port)
    try:
        if (why := process.say(add="a")["forwarding"]["why_user"]) and forwarding == "kernel":
            raise CannotMeasure(why)
        agent = LinkPeer(hosts.left, "a", hosts.relay, port)
        connector = LinkPeer(hosts.right, "A", hosts.relay, port)
        for side in (agent, connector):
            side.bind()
        packet = b"\x40" + bytes(PACKET_BYTES - 1)  # the fixed bit of QUIC: opaque otherwise
        yield measure(process.pid, agent.raw, (hosts.relay.address, port), connector.raw, packet)
        agent.close()
        connector.close()
    finally:
        process.kill()


_MAGIC = struct.pack("!I", 0x2112A442)


def _stun(kind: int, attributes: bytes) -> bytes:
    return struct.pack("!HH", kind, len(attributes)) + _MAGIC + b"bench-trans1" + attributes


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def _xor_address(host: str, port: int) -> bytes:
    (magic,) = struct.unpack("!I", _MAGIC)
    (address,) = struct.unpack("!I", socket.inet_aton(host))
    return struct.pack("!BBHI", 0, 1, port ^ (magic >> 16), address ^ magic)


@contextlib.contextmanager
def coturn(directory: Path, hosts: Hosts) -> Iterator[Measure]:
    """A TURN server with one allocation and one channel to the sink (RFC 8656)."""
    port = free_port()
    argv = [
        *hosts.relay.prefix,
        *(
            need("turnserver", "coturn"),
            "-n",
            "-L",
            hosts.relay.address,
            "-p",
            str(port),
            "-m",
            "1",
            "--no-auth",
        ),
        *("--allow-loopback-peers", "--no-cli", "--no-tls", "--no-dtls", "--log-file", "stdout"),
        *("--pidfile", str(directory / "turn.pid"), "--userdb", str(directory / "turn.db")),
    ]
    with running(argv, directory / "coturn.log") as pid:
        source, sink = (udp_socket(host) for host in (hosts.left, hosts.right))
        target = hosts.relay.address, port
        to, peer = encode_address(target), _attribute(0x0012, _xor_address(*sink.address))
        channel = _attribute(0x000C, struct.pack("!HH", 0x4000, 0))
        steps = (
            ("Allocate", 0x0003, _attribute(0x0019, struct.pack("!BBH", 17, 0, 0)), 0x0103),
            ("ChannelBind", 0x0009, channel + peer, 0x0109),
        )
        for name, kind, attributes, success in steps:

            def answered(kind: int = kind, attributes: bytes = attributes, success: int = success) -> bool:
                source.send([(_stun(kind, attributes), to)])
                ready = select.select([source], [], [], 0.2)[0]
                return bool(ready) and any(
                    data[:2] == struct.pack("!H", success) for data, _ in source.receive()
                )

            wait_until(f"TURN {name}", answered)
        packet = struct.pack("!HH", 0x4000, PACKET_BYTES) + bytes(PACKET_BYTES)
        yield measure(pid, source, target, sink, packet)
        source.close()
        sink.close()
