"""Transfers and echoes that go on while something is wrong: every TCP byte comes, and no datagram goes astray."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.backends import stream_digest
from tests.support.lab import http_get, tcp_route, udp_ask, udp_route, until
from tests.support.namespaces import Host
from tests.support.relayed import Mesh
from ztna.config import Endpoint

TRANSFER_BYTES = 1 << 20
PATIENCE_SECONDS = 60.0
BLOCK_BYTES = 1 << 16
DATAGRAM_BYTES = (8, 1000)
"""Small ones and such as fit into every packet of a link, in turn."""
INTERVAL_SECONDS = 0.02
ANSWER_SECONDS = 1.0
"""What was asked so long ago and has no answer is lost; nothing here takes longer."""

HTTP_PORT, COUNTING_PORT, ECHO_PORT = 18080, 18081, 18007
ROUTES = (
    tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT), port=8080),
    tcp_route("counting", Endpoint("127.0.0.1", COUNTING_PORT), port=9001),
    udp_route("echo-service", Endpoint("127.0.0.1", ECHO_PORT)),
)


@dataclass
class Asker:
    """Asks at a steady pace, and knows when each question that has no answer was asked."""

    host: Host
    address: str
    sizes: tuple[int, ...] = (0,)
    """The least bytes of the questions, in turn."""
    asked: dict[bytes, float] = field(default_factory=dict)
    answered: dict[bytes, float] = field(default_factory=dict)
    repeated: int = 0

    @contextmanager
    def asking(self) -> Iterator[Asker]:
        """Ask while inside, and wait for the last answers at the end."""
        over = threading.Event()
        with self.host.socket(socket.SOCK_DGRAM) as asker:
            asker.connect((self.address, 7))
            asker.settimeout(ANSWER_SECONDS)
            threads = [threading.Thread(target=run, args=(asker, over)) for run in (self._ask, self._listen)]
            for thread in threads:
                thread.start()
            try:
                yield self
            finally:
                over.set()
                for thread in threads:
                    thread.join(30)

    def lost(self) -> list[float]:
        """Return when what was never answered was asked."""
        return sorted(at for question, at in self.asked.items() if question not in self.answered)

    def answers_after(self, moment: float, least: int = 0) -> int:
        """Count the answers to what was asked after a moment and had so many bytes."""
        return sum(
            self.asked[question] > moment and len(question) >= least for question in tuple(self.answered)
        )

    def strange(self) -> list[bytes]:
        """Return the answers that no question was asked for."""
        return [answer for answer in self.answered if answer not in self.asked]

    def _ask(self, asker: socket.socket, over: threading.Event) -> None:
        sizes = itertools.cycle(self.sizes)
        number = 0
        while not over.wait(INTERVAL_SECONDS):
            number += 1
            question = b"%d" % number
            question += os.urandom(max(0, next(sizes) - len(question)))
            self.asked[question] = time.monotonic()
            with contextlib.suppress(ConnectionRefusedError):  # by ICMP, about an earlier one
                asker.send(question)

    def _listen(self, asker: socket.socket, over: threading.Event) -> None:
        while True:
            try:
                answer = asker.recv(2048)
            except TimeoutError:
                if over.is_set():
                    return
            except ConnectionRefusedError:
                continue  # what that was about has no answer
            else:
                self.repeated += answer in self.answered
                self.answered[answer] = time.monotonic()


@dataclass
class Load:
    """One transfer each way after the other, and an asker."""

    laptop: Host
    web: str
    counting: str
    asker: Asker
    downloads: int = 0
    uploads: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    running: list[Future[None]] = field(default_factory=list)

    def passes(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until a whole transfer each way and echoes of each size that begin from now on have come through."""
        # The one under way began before; the next one did not.
        began, downloads, uploads = time.monotonic(), self.downloads + 2, self.uploads + 2
        until("downloads come", lambda: self._going and self.downloads >= downloads, seconds)
        until("uploads come", lambda: self._going and self.uploads >= uploads, seconds)
        self.echoes(began, seconds)

    def echoes(self, began: float | None = None, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until echoes of each size that begin from then on, or now, have come back."""
        began = time.monotonic() if began is None else began
        for size in self.asker.sizes:
            until(f"echoes of {size} bytes", lambda n=size: self.asker.answers_after(began, n) > 3, seconds)

    def download(self) -> None:
        """Get bytes that only their number gives; AssertionError when others come."""
        with self._connected(self.web, 8080) as sock:
            sock.sendall(b"GET /bytes/%d/%d HTTP/1.0\r\n\r\n" % (TRANSFER_BYTES, self.downloads))
            answer = b"".join(iter(lambda: sock.recv(BLOCK_BYTES), b""))
        content = answer.partition(b"\r\n\r\n")[2]
        assert len(content) == TRANSFER_BYTES, f"download {self.downloads}: {len(content)} bytes"
        right = stream_digest(self.downloads, TRANSFER_BYTES)
        assert hashlib.sha256(content).hexdigest() == right, f"download {self.downloads}: other bytes"
        self.downloads += 1

    def upload(self) -> None:
        """Send bytes and hear their count and digest; AssertionError when others came."""
        with self.upload_begun() as sock:
            self.finish_upload(sock, os.urandom(TRANSFER_BYTES))
        self.uploads += 1

    def upload_begun(self) -> socket.socket:
        """Return a connection to what counts, to be held a while."""
        return self._connected(self.counting, 9001)

    def finish_upload(self, sock: socket.socket, data: bytes, said: bytes = b"") -> None:
        """Send the rest on such a connection, on which this was said, and hear that exactly all this came."""
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: sock.recv(BLOCK_BYTES), b""))
        sent = said + data
        right = b"%d %s\n" % (len(sent), hashlib.sha256(sent).hexdigest().encode())
        assert told == right, f"upload {self.uploads}: {told!r}"

    @property
    def _going(self) -> bool:
        for each in self.running:
            if each.done():
                each.result()
        return True

    def _connected(self, address: str, port: int) -> socket.socket:
        sock = self.laptop.socket()
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect((address, port))
        return sock


@contextmanager
def load(mesh: Mesh, *, transfers: bool = True) -> Iterator[Load]:
    """Keep a mesh that serves ROUTES busy while inside; AssertionError for any byte that is missing or another's.

    Nor may a daemon have been started anew, or have ended. Without `transfers` it only asks and hears echoes.
    """
    pids = [daemon.pid for daemon in mesh.lab.daemons]
    web, counting, echo = (mesh.address(str(route.service)) for route in ROUTES)
    asker = Asker(mesh.laptop, echo, DATAGRAM_BYTES)
    made = Load(mesh.laptop, web, counting, asker)

    def again_and_again(transfer: str) -> None:
        while not made.over.is_set():
            getattr(made, transfer)()

    with ThreadPoolExecutor(2) as threads, asker.asking():
        made.running = [threads.submit(again_and_again, each) for each in ("download", "upload") if transfers]
        try:
            yield made
        finally:
            made.over.set()
    for each in made.running:
        each.result()
    assert asker.strange() == [], "answers to nothing that was asked"
    assert [daemon.pid for daemon in mesh.lab.daemons] == pids
    assert all(daemon.alive for daemon in mesh.lab.daemons)


def serve(mesh: Mesh) -> None:
    """Start the backends of ROUTES on the core, and wait until all of them are reached."""
    ports = ("--http", HTTP_PORT, "--counting", COUNTING_PORT, "--udp", ECHO_PORT)
    mesh.lab.python("backend", mesh.core, "-m", "tests.support.backends", *map(str, ports))
    web, _, echo = (mesh.address(str(route.service)) for route in ROUTES)
    mesh.wait_known()
    until("it is served", lambda: http_get(mesh.laptop, f"http://{web}:8080/")[0] == 200)
    until("it echoes", lambda: udp_ask(mesh.laptop, echo, 7, b"ask") == b"ask")
