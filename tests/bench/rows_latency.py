"""What the mesh adds to a 64-byte UDP echo on the forwarded path."""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import Contender, Figures, Measure, Row, free_port, running, wait_until
from tests.bench.mesh import bench_mesh
from tests.support.lab import udp_ask, udp_route
from tests.support.namespaces import LocalHost
from ztna.config import Endpoint

ECHOES = 2000
PAYLOAD = b"x" * 64


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    latency = Latency(directory / "latency")
    return Row(
        "added latency: 64-byte UDP echo, agent to backend and back, forwarded path",
        "p50 minus the direct echo's < 1 ms",
        [Contender("through the mesh", latency.ours), Contender("the backend itself", latency.direct)],
    )


def echoes(address: str, port: int) -> Figures:
    """Return the p50 and p99 in ms of one echo after the other."""
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(2)
        asker.connect((address, port))
        for _ in range(ECHOES):
            started = time.perf_counter()
            asker.send(PAYLOAD)
            asker.recv(2048)
            times.append((time.perf_counter() - started) * 1000)
    return {"p50 ms": statistics.median(times), "p99 ms": statistics.quantiles(times, n=100)[98]}


class Latency:
    """Echo backends, asked through the mesh and directly."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    @contextlib.contextmanager
    def ours(self) -> Iterator[Measure]:
        """Through agent, forwarder and connector."""
        with self._backend() as port:
            routes = [udp_route("echo", Endpoint("127.0.0.1", port))]
            with bench_mesh(self.directory / "ours", routes, direct=False) as mesh:
                vip, host = mesh.address("echo"), LocalHost("here", "", "127.0.0.1")
                wait_until("an echo through the mesh", lambda: udp_ask(host, vip, 7, PAYLOAD) == PAYLOAD)
                yield lambda: echoes(vip, 7)

    @contextlib.contextmanager
    def direct(self) -> Iterator[Measure]:
        """A backend of the same kind."""
        with self._backend() as port:
            host = LocalHost("here", "", "127.0.0.1")
            wait_until("the echo", lambda: udp_ask(host, "127.0.0.1", port, PAYLOAD) == PAYLOAD)
            yield lambda: echoes("127.0.0.1", port)

    @contextlib.contextmanager
    def _backend(self) -> Iterator[int]:
        port = free_port()
        argv = [sys.executable, "-m", "tests.support.backends", "--udp", str(port)]
        with running(argv, self.directory / "echo.log"):
            yield port
