"""The forwarder's CPU time per 1,200-byte packet in user space, beside coturn relaying ChannelData.

One load generator for both: it keeps a window of packets in flight and counts those that arrive, so that
none is lost and both forwarders see the same pattern.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

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
from ztna.udp import RawSocket, encode_address
from ztna.wire import forwarder as wire

PACKETS = 200_000
PACKET_BYTES = 1200
WINDOW = 128
BURST = 32
WAIT_SECONDS = 2.0


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    directory = directory / "forwarder-udp"
    directory.mkdir()
    return Row(
        f"forwarder: CPU per {PACKET_BYTES:,}-byte packet, one link, user space",
        "<= 1.0 x coturn",
        [
            Contender("ztna forwarder", lambda: ours(directory)),
            Contender("coturn", lambda: coturn(directory)),
        ],
    )


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
        before = cpu_seconds([pid])
        count = blast(source, target, sink, packet)
        return {"CPU us/packet": (cpu_seconds([pid]) - before) / count * 1e6}

    return once


@contextlib.contextmanager
def ours(directory: Path) -> Iterator[Measure]:
    """The forwarder with both sides bound."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.bench.forwarder_process", str(port)]
    with running(argv, directory / "ours.log") as pid:
        sides = [_bound(("127.0.0.1", port), letter) for letter in (b"a", b"c")]
        packet = b"\x40" + bytes(PACKET_BYTES - 1)  # the fixed bit of QUIC: opaque otherwise
        yield measure(pid, sides[0], ("127.0.0.1", port), sides[1], packet)
        for side in sides:
            side.close()


def _bound(forwarder: tuple[str, int], letter: bytes) -> RawSocket:
    """Bind one side: bind, challenge, bind again."""
    side = RawSocket.open(("127.0.0.1", 0))
    bind_id, secret, mac = letter * 16, letter * 32, wire.NO_MAC
    to = encode_address(forwarder)

    def answered() -> bool:
        nonlocal mac
        side.send([(wire.encode(wire.Bind(bind_id, mac)), to)])
        if not select.select([side], [], [], 0.2)[0]:
            return False
        for data, _ in side.receive():
            message = wire.decode(data)
            if isinstance(message, wire.Challenge):
                mac = wire.bind_mac(secret, message.nonce)
            elif isinstance(message, wire.Bound):
                return True
        return False

    wait_until("the forwarder binds", answered)
    return side


_MAGIC = struct.pack("!I", 0x2112A442)


def _stun(kind: int, attributes: bytes) -> bytes:
    return struct.pack("!HH", kind, len(attributes)) + _MAGIC + b"bench-trans1" + attributes


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def _xor_address(port: int) -> bytes:
    (magic,) = struct.unpack("!I", _MAGIC)
    (address,) = struct.unpack("!I", socket.inet_aton("127.0.0.1"))
    return struct.pack("!BBHI", 0, 1, port ^ (magic >> 16), address ^ magic)


@contextlib.contextmanager
def coturn(directory: Path) -> Iterator[Measure]:
    """A TURN server with one allocation and one channel to the sink (RFC 8656)."""
    port = free_port()
    argv = [
        *(need("turnserver", "coturn"), "-n", "-L", "127.0.0.1", "-p", str(port), "-m", "1", "--no-auth"),
        *("--allow-loopback-peers", "--no-cli", "--no-tls", "--no-dtls", "--log-file", "stdout"),
        *("--pidfile", str(directory / "turn.pid"), "--userdb", str(directory / "turn.db")),
    ]
    with running(argv, directory / "coturn.log") as pid:
        source, sink = RawSocket.open(("127.0.0.1", 0)), RawSocket.open(("127.0.0.1", 0))
        to, peer = encode_address(("127.0.0.1", port)), _attribute(0x0012, _xor_address(sink.address[1]))
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
        yield measure(pid, source, ("127.0.0.1", port), sink, packet)
        source.close()
        sink.close()
