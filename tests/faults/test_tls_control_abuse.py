"""Abuse of a relay's TLS port: by strangers, and by peers with a good certificate that speak nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay import splicer, tls_door
from tests.support.certificates import Pki
from tests.support.relay import SERVICE, RunningRelay, running_relay
from tests.support.tls_peer import TlsPeer
from ztna.errors import LinkError
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS
from ztna.wire import control

WAIT_SECONDS = 30.0
HALF_OPEN_MAX = 20
SOURCE_MAX = 30
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    async with running_relay(tmp_path, half_open_max=HALF_OPEN_MAX) as made:
        yield made


async def stranger(mesh: RunningRelay, first: bytes = CLIENT_HELLO, source: str = "127.0.0.1") -> Streams:
    reader, writer = await asyncio.open_connection(*mesh.address, local_addr=(source, 0))
    writer.write(first)
    return reader, writer


async def honest(mesh: RunningRelay) -> None:
    """Somebody with a certificate comes in, is answered, and goes."""
    credentials = mesh.pki.credentials(mesh.pki.agent("honest", (SERVICE,)))
    peer = await TlsPeer.connect(mesh.address, credentials)
    peer.close()
    await until(lambda: not mesh.relay.peers)


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def ended(streams: Streams) -> None:
    reader, writer = streams
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), WAIT_SECONDS)
    writer.close()


def count(reason: Reason, where: str = "relay_tls") -> float:
    return float(REFUSALS.labels(where, reason.value)._value.get())


async def test_who_dawdles_in_the_handshake_is_closed(
    mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps no handshake alive: its time is counted from the start."""
    monkeypatch.setattr(tls_door, "HANDSHAKE_SECONDS", 1.0)
    reader, writer = await stranger(mesh, b"\x16")
    await until(lambda: mesh.relay.door.half_open == 1)
    end = asyncio.ensure_future(reader.read())
    async with asyncio.timeout(WAIT_SECONDS):
        for byte in CLIENT_HELLO[1:] * 100:
            done, _ = await asyncio.wait((end,), timeout=0.05)
            if done:
                break
            with contextlib.suppress(ConnectionError):
                writer.write(bytes((byte,)))
    assert end.done() and mesh.relay.door.half_open == 0
    writer.close()
    await honest(mesh)


async def test_who_says_nothing_at_all_is_closed(mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splicer, "BIND_SECONDS", 0.2)
    await ended(await stranger(mesh, b""))
    assert mesh.relay.splicer.refusals["late"] == 1


@pytest.mark.parametrize("first", [b"\x16" + os.urandom(400), b"\x16\x03\x01\xff\xff" + bytes(70_000)])
async def test_what_only_begins_as_tls_is_closed(mesh: RunningRelay, first: bytes) -> None:
    await ended(await stranger(mesh, first))
    await until(lambda: mesh.relay.door.half_open == 0)
    await honest(mesh)


async def test_nobody_without_a_certificate(mesh: RunningRelay) -> None:
    before = count(Reason.NO_CERTIFICATE)
    context = ssl.create_default_context(cafile=mesh.config.tls.ca)
    context.check_hostname = False
    context.set_alpn_protocols(["ztna-v2"])
    reader, writer = await asyncio.open_connection(*mesh.address, ssl=context)
    writer.write(control.encode(control.Hello()))
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    writer.close()
    await until(lambda: count(Reason.NO_CERTIFICATE) == before + 1)
    assert not mesh.relay.peers


async def test_nobody_with_a_strangers_certificate(mesh: RunningRelay, tmp_path: Path) -> None:
    before = count(Reason.UNTRUSTED)
    strangers = Pki(tmp_path / "strangers")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    tls = strangers.agent("agent-a", (SERVICE,))
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["ztna-v2"])
    reader, writer = await asyncio.open_connection(*mesh.address, ssl=context)
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    writer.close()
    await until(lambda: count(Reason.UNTRUSTED) == before + 1)
    assert not mesh.relay.peers


async def test_a_relay_s_certificate_is_none_of_a_peer(mesh: RunningRelay) -> None:
    with contextlib.suppress(LinkError):
        peer = await TlsPeer.dial(mesh.address, mesh.pki.credentials(mesh.pki.relay("other")))
        peer.say(control.Hello())
        await peer.closed()
        assert not peer.inbox
    assert not mesh.relay.peers


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack(">I", control.MESSAGE_BYTES_MAX + 1),
        struct.pack(">I", 0),
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 4) + b"\xff\xfe\xfd\xfc",
        b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
    ],
)
async def test_nonsense_costs_its_speaker_the_connection(mesh: RunningRelay, nonsense: bytes) -> None:
    before = count(Reason.MALFORMED)
    credentials = mesh.pki.credentials(mesh.pki.agent("agent-a", (SERVICE,)))
    peer = await TlsPeer.connect(mesh.address, credentials)
    peer.say_bytes(nonsense)
    code, _reason = await peer.closed()
    assert code == 2 and count(Reason.MALFORMED) == before + 1
    await until(lambda: not mesh.relay.peers)
    await honest(mesh)


async def test_a_frame_of_exactly_the_limit_is_read(mesh: RunningRelay) -> None:
    credentials = mesh.pki.credentials(mesh.pki.agent("agent-a", (SERVICE,)))
    peer = await TlsPeer.connect(mesh.address, credentials)
    body = b'{"type":"novel","padding":"%s"}'
    body %= b"x" * (control.MESSAGE_BYTES_MAX - len(body) + 2)
    peer.say_bytes(struct.pack(">I", len(body)) + body)
    peer.connection.ping()
    await until(lambda: peer.connection.rtt_s is not None)
    assert peer.ended is None
    peer.close()


async def test_pings_that_nobody_wants_answers_to_are_bounded(mesh: RunningRelay) -> None:
    """Who never reads the answers is closed by the relay, which keeps no more than a megabyte of them."""
    credentials = mesh.pki.credentials(mesh.pki.agent("agent-a", (SERVICE,)))
    peer = await TlsPeer.connect(mesh.address, credentials)
    peer.stop_reading()
    pings = control.encode(control.Ping()) * 1000
    async with asyncio.timeout(WAIT_SECONDS):
        while mesh.relay.peers:
            peer.connection.send_stream(0, pings)
            await asyncio.sleep(0)
    peer.vanish()


async def test_a_flood_of_half_open_ones_keeps_nobody_out(mesh: RunningRelay) -> None:
    """The longest handshake goes for a newcomer's: many sources at once, and one source alone."""
    before = count(Reason.LIMIT_REACHED)
    crowd = [await stranger(mesh, source=f"127.0.1.{number + 1}") for number in range(3 * HALF_OPEN_MAX)]
    await until(lambda: count(Reason.LIMIT_REACHED) - before >= 2 * HALF_OPEN_MAX)
    assert mesh.relay.door.half_open <= HALF_OPEN_MAX
    await honest(mesh)
    for each in crowd:
        await ended(each)


async def test_one_source_costs_only_itself(tmp_path: Path) -> None:
    async with running_relay(tmp_path, half_open_per_source=SOURCE_MAX) as mesh:
        other = await stranger(mesh, source="127.0.2.1")
        await until(lambda: mesh.relay.door.half_open == 1)
        crowd = [await stranger(mesh) for _ in range(SOURCE_MAX + 30)]
        await until(lambda: mesh.relay.door.half_open == SOURCE_MAX + 1)
        assert not other[0].at_eof()
        await honest(mesh)
        for each in (other, *crowd):
            each[1].close()
