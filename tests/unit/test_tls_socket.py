"""TLS in the place of a plain socket, against `ssl`'s own server: half-close, slow readers, ends."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.certificates import Pki
from ztna.tls_socket import TlsSocket, secure_client

WAIT_SECONDS = 20.0
BLOB = hashlib.shake_128(b"blob").digest(5_000_000)

Talk = Callable[[ssl.SSLSocket], None]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context and a client's that believes it."""
    pki = Pki(Path(tmp_path_factory.mktemp("pki")))
    tls = pki.relay()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls.certificate, tls.key)
    client = ssl.create_default_context(cafile=tls.ca)
    client.check_hostname = False
    return server, client


class Server:
    """One connection, talked to by a thread that blocks; what it raised is raised by `done`."""

    def __init__(self, context: ssl.SSLContext, talk: Talk) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        self._error: Exception | None = None
        self._context, self._talk = context, talk
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            sock, _ = self._listening.accept()
            sock.settimeout(WAIT_SECONDS)
            with self._context.wrap_socket(sock, server_side=True) as tls:
                self._talk(tls)
        except Exception as error:
            self._error = error

    async def done(self) -> None:
        await asyncio.to_thread(self._thread.join, WAIT_SECONDS)
        self._listening.close()
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


async def connected(server: Server, context: ssl.SSLContext) -> TlsSocket:
    sock = socket.create_connection(server.address)
    sock.setblocking(False)
    async with asyncio.timeout(WAIT_SECONDS):
        return await secure_client(sock, context, "relay")


async def ready(add: Callable[..., object], remove: Callable[[int], object], sock: TlsSocket) -> None:
    event = asyncio.Event()
    add(sock.fileno(), event.set)
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await event.wait()
    finally:
        remove(sock.fileno())


async def read(sock: TlsSocket, size: int = 10_000) -> bytes:
    """Read once, as a flow does: when the socket is readable, unless it says that it has more."""
    loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(size))
    cuts = (0, size // 3, size // 2, size)
    parts = [buffer[start:end] for start, end in itertools.pairwise(cuts)]
    while True:
        if not sock.has_more:
            await ready(loop.add_reader, loop.remove_reader, sock)
        try:
            return bytes(buffer[: sock.recvmsg_into(parts)[0]])
        except BlockingIOError:
            assert not sock.has_more


async def read_all(sock: TlsSocket, size: int = 10_000) -> bytes:
    parts = []
    while part := await read(sock, size):
        parts.append(part)
    return b"".join(parts)


async def write_all(sock: TlsSocket, data: bytes) -> None:
    loop, view = asyncio.get_running_loop(), memoryview(data)
    while view:
        try:
            view = view[sock.send(view[:200_000]) :]
        except BlockingIOError:
            await ready(loop.add_writer, loop.remove_writer, sock)


def received(tls: ssl.SSLSocket) -> bytes:
    parts = []
    while part := tls.recv(65_536):
        parts.append(part)
    return b"".join(parts)


async def test_bytes_go_both_ways(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    def talk(tls: ssl.SSLSocket) -> None:
        assert tls.recv(5) == b"hello"
        tls.sendall(BLOB)
        tls.unwrap()

    server = Server(contexts[0], talk)
    with closing(await connected(server, contexts[1])) as sock:
        assert sock.sendmsg([b"he", b"llo"]) == 5
        assert await read_all(sock) == BLOB
        sock.shutdown(socket.SHUT_WR)
        await server.done()


async def test_a_half_close_loses_nothing_of_what_is_under_way(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    def talk(tls: ssl.SSLSocket) -> None:
        sending = threading.Thread(target=tls.sendall, args=(BLOB,))
        sending.start()
        assert received(tls) == b"question"
        sending.join()
        tls.sendall(b"answer")

    server = Server(contexts[0], talk)
    with closing(await connected(server, contexts[1])) as sock:
        await write_all(sock, b"question")
        first = await read(sock, 100)
        sock.shutdown(socket.SHUT_WR)
        assert first + await read_all(sock, 70_000) == BLOB + b"answer"
    await server.done()


async def test_a_reader_that_is_slow_gets_everything_and_then_the_end(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    go = threading.Event()

    def talk(tls: ssl.SSLSocket) -> None:
        assert go.wait(WAIT_SECONDS)
        assert received(tls) == BLOB
        tls.sendall(b"got it")

    server = Server(contexts[0], talk)
    with closing(await connected(server, contexts[1])) as sock:
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += sock.send(memoryview(BLOB)[sent : sent + 100_000])
        go.set()
        await write_all(sock, BLOB[sent:])
        sock.shutdown(socket.SHUT_WR)
        assert await read_all(sock) == b"got it"
    await server.done()


async def test_the_last_record_waits_for_room(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    go = threading.Event()

    def talk(tls: ssl.SSLSocket) -> None:
        assert go.wait(WAIT_SECONDS)
        assert received(tls) == BLOB[:count]

    server, count = Server(contexts[0], talk), 0
    with closing(await connected(server, contexts[1])) as sock:
        with pytest.raises(BlockingIOError):
            while True:
                count += sock.send(memoryview(BLOB)[count : count + 65_536])
        count += 65_536  # what is promised goes out, too: it would be asked for again
        sock.shutdown(socket.SHUT_WR)
        go.set()
        assert await read_all(sock) == b""
    await server.done()


async def test_a_program_that_just_closes_has_ended(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    def talk(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"all there is")
        tls.shutdown(socket.SHUT_RDWR)  # no close_notify

    server = Server(contexts[0], talk)
    with closing(await connected(server, contexts[1])) as sock:
        assert await read_all(sock, 4) == b"all there is"
        assert await read(sock) == b""
    await server.done()


async def test_what_has_come_is_read_in_one_go_whatever_the_records(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server = Server(contexts[0], lambda tls: tls.sendall(BLOB[:300_000]))
    with closing(await connected(server, contexts[1])) as sock:
        await server.done()  # all of it is in the kernel
        assert await read(sock, 100_001) == BLOB[:100_001]
        assert await read(sock, 190_000) == BLOB[100_001:290_001]
        assert await read_all(sock) == BLOB[290_001:300_000]


async def test_what_came_before_a_reset_is_given_out_first(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    go = threading.Event()

    def talk(tls: ssl.SSLSocket) -> None:
        tls.sendall(BLOB[:10_000])
        assert go.wait(WAIT_SECONDS)
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    server = Server(contexts[0], talk)
    with closing(await connected(server, contexts[1])) as sock:
        assert await read(sock, 4_000) == BLOB[:4_000]
        go.set()
        await server.done()
        # The rest of the record fills the first two of the three parts, whose third meets the reset.
        assert await read(sock, 12_000) == BLOB[4_000:10_000]
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                await read(sock)


async def test_another_name_is_refused(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server = Server(contexts[0], lambda tls: None)
    strict = ssl.create_default_context()
    sock = socket.create_connection(server.address)
    sock.setblocking(False)
    with closing(sock), pytest.raises(ssl.SSLCertVerificationError):
        async with asyncio.timeout(WAIT_SECONDS):
            await secure_client(sock, strict, "relay")
    with pytest.raises(ssl.SSLError):
        await server.done()


async def test_what_is_no_tls_is_refused() -> None:
    loop = asyncio.get_running_loop()
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        sock = socket.create_connection(listening.getsockname())
        sock.setblocking(False)
        far, _ = await loop.sock_accept(listening)
        with closing(sock), pytest.raises(OSError, match="closed in the TLS handshake"):
            far.close()
            await secure_client(sock, ssl.create_default_context(), "x")
