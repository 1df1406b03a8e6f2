"""Many UDP and TCP flows at a steady pace in one thread, each answered by an echo: what is lost, and for how long.

A UDP flow sends numbered questions and remembers which were answered; a TCP flow sends numbered lines and must get
every one back in order. `Echoes` is the other end: in this process, on any test host, it remembers who asked.
"""

from __future__ import annotations

import itertools
import select
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.namespaces import Host

INTERVAL_SECONDS = 0.1
TURN_SECONDS = 0.02
LINE_BYTES = 8


@dataclass(eq=False)
class Flow:
    """One flow; a question is known by its number, and by when it was asked."""

    name: str
    sock: socket.socket
    is_tcp: bool
    asked: list[float] = field(default_factory=list)
    answered: dict[int, float] = field(default_factory=dict)
    broken: str = ""
    unread: bytes = b""
    unsent: bytes = b""

    def ask(self, now: float) -> None:
        """Send the next question."""
        line = b"%08d" % len(self.asked)
        self.asked.append(now)
        if not self.is_tcp:
            self._try(lambda: self.sock.send(line))
            return
        self.unsent += line
        sent = self._try(lambda: self.sock.send(self.unsent))
        self.unsent = self.unsent[sent:]

    def hear(self, now: float) -> None:
        """Take what has come."""
        data = b""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            return
        except OSError as error:
            self.broken = self.broken or str(error)
            return
        if not self.is_tcp:
            self.answered.setdefault(int(data), now)
            return
        if not data:
            self.broken = self.broken or "closed"
        self.unread += data
        while len(self.unread) >= LINE_BYTES:
            number, self.unread = int(self.unread[:LINE_BYTES]), self.unread[LINE_BYTES:]
            if number != len(self.answered):
                self.broken = self.broken or f"line {number} where {len(self.answered)} was due"
            self.answered[number] = now

    def is_answered_since(self, moment: float) -> bool:
        """Say whether a question was answered that was asked after a moment."""
        return any(self.asked[number] > moment for number in tuple(self.answered)[-50:])

    def longest_gap(self, since: float, until: float) -> float:
        """Return for how long at most nothing that was asked between two moments was answered.

        Of UDP by when the questions were asked; a TCP flow answers everything, so by when the answers came.
        """
        answered = tuple(self.answered.items())
        times = sorted(came if self.is_tcp else self.asked[number] for number, came in answered)
        inside = [since, *(at for at in times if since < at < until), until]
        return max(later - earlier for earlier, later in itertools.pairwise(inside))

    def _try(self, send: object) -> int:
        assert callable(send)
        try:
            sent: int = send()
        except (BlockingIOError, ConnectionRefusedError):
            return 0
        except OSError as error:
            if self.is_tcp:
                self.broken = self.broken or str(error)
            return 0
        return sent


class Flows:
    """All flows of a test, and the thread that runs them between `running`'s begin and end."""

    def __init__(self) -> None:
        self.all: list[Flow] = []
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self._lock = threading.Lock()

    def udp(self, name: str, host: Host, address: tuple[str, int]) -> Flow:
        """Begin a UDP flow."""
        sock = host.socket(socket.SOCK_DGRAM)
        sock.connect(address)
        return self._add(Flow(name, sock, is_tcp=False))

    def tcp(self, name: str, host: Host, address: tuple[str, int], seconds: float = 20.0) -> Flow:
        """Begin a TCP flow. OSError when it is refused."""
        sock = host.socket()
        sock.settimeout(seconds)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return self._add(Flow(name, sock, is_tcp=True))

    @contextmanager
    def running(self) -> Iterator[Flows]:
        """Ask while inside; every socket is closed at the end."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join(30)
            for flow in self.all:
                flow.sock.close()

    def _add(self, flow: Flow) -> Flow:
        flow.sock.setblocking(False)
        with self._lock:
            self.all.append(flow)
            self._selector.register(flow.sock, selectors.EVENT_READ, flow)
        return flow

    def _run(self) -> None:
        due_at = time.monotonic()
        while not self._over.is_set():
            if time.monotonic() >= due_at:
                due_at = time.monotonic() + INTERVAL_SECONDS
                for flow in tuple(self.all):
                    if not flow.broken:
                        flow.ask(time.monotonic())
            for key, _ in self._selector.select(TURN_SECONDS):
                flow = key.data
                flow.hear(time.monotonic())
                if flow.broken:
                    with self._lock:
                        self._selector.unregister(flow.sock)


class Echoes:
    """Echoes datagrams and TCP connections on hosts' loopbacks, in one thread."""

    def __init__(self) -> None:
        self.askers: dict[str, set[tuple[str, int]]] = {}
        self._poll = select.epoll()
        self._sockets: dict[int, tuple[str, socket.socket, bool]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def serve(self, host: Host, port: int) -> None:
        """Echo on a port of a host's 127.0.0.1, UDP and TCP."""
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            sock = host.socket(kind)
            sock.bind(("127.0.0.1", port))
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
            self._watch(host.name, sock, is_listener=kind == socket.SOCK_STREAM)

    @contextmanager
    def running(self) -> Iterator[Echoes]:
        """Echo while inside."""
        self._thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._thread.join(30)
            for _, sock, _ in self._sockets.values():
                sock.close()
            self._poll.close()

    def _watch(self, name: str, sock: socket.socket, *, is_listener: bool) -> None:
        sock.setblocking(False)
        self._sockets[sock.fileno()] = (name, sock, is_listener)
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _run(self) -> None:
        while not self._over.is_set():
            for number, _ in self._poll.poll(TURN_SECONDS):
                name, sock, is_listener = self._sockets[number]
                try:
                    self._serve(name, sock, is_listener)
                except OSError:
                    self._forget(sock)

    def _serve(self, name: str, sock: socket.socket, is_listener: bool) -> None:
        if is_listener:
            self._watch(name, sock.accept()[0], is_listener=False)
        elif sock.type == socket.SOCK_DGRAM:
            data, asker = sock.recvfrom(2048)
            self.askers.setdefault(name, set()).add(asker)
            sock.sendto(data, asker)
        elif data := sock.recv(65536):
            sock.sendall(data)
        else:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        self._poll.unregister(sock.fileno())
        del self._sockets[sock.fileno()]
        sock.close()
