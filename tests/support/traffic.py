"""Downloads and idle flows through a mesh, to be disturbed: every byte must arrive, and nothing be reset.

ZTNA_DOWNLOAD_MIB makes the 20 downloads larger; 200 is what `make soak` runs.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.backends import stream_digest
from tests.support.lab import http_get, tcp_route, until
from tests.support.relayed import Mesh
from ztna.config import Endpoint

DOWNLOADS = 20
IDLE_FLOWS = 20
DOWNLOAD_BYTES = int(os.environ.get("ZTNA_DOWNLOAD_MIB", "20")) << 20
BLOCK_BYTES = 1 << 18
PATIENCE_SECONDS = 60.0 + DOWNLOADS * DOWNLOAD_BYTES / 10e6

HTTP_PORT, ECHO_PORT = 18080, 18081
SERVICES = ("web-app", "shell")
ROUTES = (
    tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT), port=8080),
    tcp_route("shell", Endpoint("127.0.0.1", ECHO_PORT), port=22),
)


@dataclass
class Download:
    """One GET of bytes that only its own number gives."""

    number: int
    received: int = 0
    digest: str = ""

    def run(self, mesh: Mesh, address: str) -> None:
        """Get everything; OSError when the connection is reset."""
        found = hashlib.sha256()
        with mesh.laptop.socket() as sock:
            sock.settimeout(PATIENCE_SECONDS)
            sock.connect((address, 8080))
            sock.sendall(b"GET /bytes/%d/%d HTTP/1.0\r\n\r\n" % (DOWNLOAD_BYTES, self.number))
            head = b""
            while b"\r\n\r\n" not in head:
                more = sock.recv(1)
                assert more, f"download {self.number}: closed within its head"
                head += more
            while block := sock.recv(BLOCK_BYTES):
                found.update(block)
                self.received += len(block)
        self.digest = found.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether every byte came, each in its place."""
        right = stream_digest(self.number, DOWNLOAD_BYTES)
        return self.received == DOWNLOAD_BYTES and self.digest == right


@dataclass
class Shells:
    """Connections on which almost nothing is said, as SSH sessions are."""

    mesh: Mesh
    sockets: list[socket.socket] = field(default_factory=list)

    def open(self, address: str) -> None:
        """Open them all, and say a word on each."""
        for _ in range(IDLE_FLOWS):
            sock = self.mesh.laptop.socket()
            sock.settimeout(PATIENCE_SECONDS)
            sock.connect((address, 22))
            self.sockets.append(sock)
        self.speak(b"at first")

    def speak(self, what: bytes) -> None:
        """Say something on each and hear it back; OSError for one that was reset."""
        for number, sock in enumerate(self.sockets):
            line = b"%s on %d\n" % (what, number)
            sock.sendall(line)
            answer = b""
            while len(answer) < len(line):
                more = sock.recv(4096)
                assert more, f"shell {number} was closed"
                answer += more
            assert answer == line

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@dataclass
class Traffic:
    """The downloads and idle flows of one test."""

    mesh: Mesh
    downloads: list[Download]
    shells: Shells
    done: list[Future[None]]

    def wait_for(self, share: float) -> None:
        """Wait until that share of all bytes has come."""
        wanted = share * DOWNLOADS * DOWNLOAD_BYTES
        until(
            f"{share:.0%} of the bytes", lambda: sum(each.received for each in self.downloads) >= wanted, 120
        )
        assert not all(future.done() for future in self.done), "they were to be in the middle"

    def check(self) -> None:
        """Wait for all; AssertionError for what is wrong with any of them."""
        for future in self.done:
            future.result(PATIENCE_SECONDS)
        assert [each.number for each in self.downloads if not each.is_right] == []
        self.shells.speak(b"afterwards")


@contextmanager
def traffic(mesh: Mesh) -> Iterator[Traffic]:
    """Begin all downloads and idle flows; they end with it."""
    ports = ("--http", str(HTTP_PORT), "--tcp", str(ECHO_PORT))
    mesh.lab.python("backend", mesh.core, "-m", "tests.support.backends", *ports)
    web, shell = (mesh.address(service) for service in SERVICES)
    mesh.wait_known()
    until("it is served", lambda: http_get(mesh.laptop, f"http://{web}:8080/")[0] == 200)
    shells = Shells(mesh)
    downloads = [Download(number) for number in range(DOWNLOADS)]
    with ThreadPoolExecutor(DOWNLOADS) as threads:
        try:
            shells.open(shell)
            done = [threads.submit(each.run, mesh, web) for each in downloads]
            yield Traffic(mesh, downloads, shells, done)
        finally:
            shells.close()
