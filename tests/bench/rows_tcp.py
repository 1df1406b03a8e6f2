"""TCP through agent and connector, direct, beside a stunnel pair with certificates of the same kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Figures,
    Measure,
    Row,
    accepts,
    cpu_seconds,
    free_port,
    need,
    running,
    wait_until,
)
from tests.bench.mesh import bench_mesh
from tests.support.lab import tcp_route
from ztna.ca import Authority, write_private
from ztna.config import Endpoint

SECONDS = 4
STREAMS = (1, 16)
SHORT_FLOWS = 400
SHORT_AT_ONCE = 4
SHORT_BYTES = 1000


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    tcp = Tcp(directory / "tcp")
    return Row(
        "TCP through agent and connector, direct",
        "CPU per GB and end <= 1.0 x stunnel, MB/s >= 1.0 x stunnel; short flows per second >= 1.0 x",
        [Contender("ztna agent + connector", tcp.ours), Contender("stunnel pair", tcp.stunnel)],
    )


def iperf(address: str, port: int, streams: int, prefix: Sequence[str] = ()) -> float:
    """Return the bytes that iperf3, run behind `prefix`, got through in SECONDS."""
    argv = [
        *prefix,
        need("iperf3", "iperf3"),
        "-c",
        address,
        "-p",
        str(port),
        "-t",
        str(SECONDS),
        "-P",
        str(streams),
        "-J",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS + 60)
    try:
        return float(json.loads(done.stdout)["end"]["sum_received"]["bytes"])
    except (ValueError, KeyError):
        raise CannotMeasure(f"iperf3: {done.stdout[-300:]}{done.stderr[-300:]}") from None


def bulk(address: str, port: int, ends: dict[str, int], prefix: Sequence[str] = ()) -> Figures:
    """Return MB/s and each end's CPU seconds per GB, with 1 and with 16 streams. `ends`: name -> pid."""
    figures: dict[str, float] = {}
    for streams in STREAMS:
        before = {name: cpu_seconds([pid]) for name, pid in ends.items()}
        size = iperf(address, port, streams, prefix)
        figures[f"MB/s x{streams}"] = size / SECONDS / 1e6
        for name, pid in ends.items():
            figures[f"{name} CPU s/GB x{streams}"] = (cpu_seconds([pid]) - before[name]) / (size / 1e9)
    return figures


def short_flows(address: str, port: int) -> Figures:
    """Return new connections a second (1 kB each way) and their p50 in ms."""

    async def one() -> float:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(b"x" * SHORT_BYTES)
        await reader.readexactly(SHORT_BYTES)
        writer.close()
        return time.perf_counter() - started

    async def some(count: int) -> list[float]:
        return [await one() for _ in range(count)]

    async def all_of_them() -> list[float]:
        count = SHORT_FLOWS // SHORT_AT_ONCE
        shares = await asyncio.gather(*(some(count) for _ in range(SHORT_AT_ONCE)))
        return [taken for share in shares for taken in share]

    started = time.perf_counter()
    times = asyncio.run(all_of_them())
    elapsed = time.perf_counter() - started
    return {"short flows/s": len(times) / elapsed, "short p50 ms": statistics.median(times) * 1000}


@contextlib.contextmanager
def backends(directory: Path) -> Iterator[tuple[int, int]]:
    """An iperf3 server and a 1 kB TCP echo; yields their ports."""
    iperf_port, echo_port = free_port(), free_port()
    server = [need("iperf3", "iperf3"), "-s", "-B", "127.0.0.1", "-p", str(iperf_port)]
    directory.mkdir(exist_ok=True)
    with running(server, directory / "iperf3.log"), running(_echo(echo_port), directory / "echo.log"):
        # iperf3 serves one test at a time: a probe connection would count as one, so only the echo is asked.
        wait_until("the echo", lambda: accepts(echo_port))
        yield iperf_port, echo_port


def _echo(port: int) -> Sequence[str]:
    return (sys.executable, "-m", "tests.bench.tcp_echo", str(port))


class Tcp:
    """Starts ours and the stunnel pair in front of the same kind of backends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    @contextlib.contextmanager
    def ours(self) -> Iterator[Measure]:
        """The mesh, direct path."""
        with backends(self.directory) as (iperf_port, echo_port):
            routes = [
                tcp_route("iperf", Endpoint("127.0.0.1", iperf_port), 5201, kind="none"),
                tcp_route("echo", Endpoint("127.0.0.1", echo_port), 5202, kind="none"),
            ]
            with bench_mesh(self.directory / "ours", routes, direct=True) as mesh:
                ends = {"agent": mesh.agent.pid, "connector": mesh.connector.pid}
                iperf_vip, echo_vip = mesh.address("iperf"), mesh.address("echo")
                wait_until("the agent listens", lambda: accepts(5202, echo_vip))
                yield lambda: {**bulk(iperf_vip, 5201, ends), **short_flows(echo_vip, 5202)}

    @contextlib.contextmanager
    def stunnel(self) -> Iterator[Measure]:
        """A stunnel client and server, TLS 1.3 with both certificates verified."""
        with backends(self.directory) as (iperf_port, echo_port):
            ports = {"iperf": iperf_port, "echo": echo_port}
            with stunnel_pair(self.directory / "stunnel", ports) as pair:
                ends = {"agent": pair.client, "connector": pair.server}
                ports = pair.ports
                yield lambda: {
                    **bulk("127.0.0.1", ports["iperf"], ends),
                    **short_flows("127.0.0.1", ports["echo"]),
                }


class StunnelPair:
    """Two stunnel processes; where the client (`ports`) and the server listen, by service."""

    def __init__(self, client: int, server: int, ports: dict[str, int], server_ports: dict[str, int]) -> None:
        self.client, self.server, self.ports, self.server_ports = client, server, ports, server_ports


@contextlib.contextmanager
def stunnel_pair(
    directory: Path, backend_ports: dict[str, int], between: dict[str, int] | None = None
) -> Iterator[StunnelPair]:
    """Start both; `between` maps a service to a port that the client dials instead of the server's."""
    tool = need("stunnel4", "stunnel4")
    directory.mkdir()
    authority = Authority.create(directory / "ca", "bench")
    (directory / "ca.pem").write_bytes(authority.ca_pem)
    for name, grants in (
        ("server", {"connector": ("iperf",), "connector_id": "s"}),
        ("client", {"agent": ("iperf",)}),
    ):
        chain, key = authority.issue(name, days=2, **grants)  # type: ignore[arg-type]
        (directory / f"{name}.pem").write_bytes(chain)
        write_private(directory / f"{name}.key", key)
    servers = {name: free_port() for name in backend_ports}
    clients = {name: free_port() for name in backend_ports}
    dialled = {name: (between or {}).get(name) or servers[name] for name in backend_ports}
    configs = {
        "server": [(name, servers[name], backend_ports[name]) for name in backend_ports],
        "client": [(name, clients[name], dialled[name]) for name in backend_ports],
    }
    for end, services in configs.items():
        text = "foreground = yes\npid =\ndebug = err\nsslVersionMin = TLSv1.3\n" + "".join(
            f"[{name}]\nclient = {'yes' if end == 'client' else 'no'}\naccept = 127.0.0.1:{accept}\n"
            f"connect = 127.0.0.1:{connect}\ncert = {directory}/{end}.pem\nkey = {directory}/{end}.key\n"
            f"CAfile = {directory}/ca.pem\nverifyChain = yes\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
            for name, accept, connect in services
        )
        (directory / f"{end}.conf").write_text(text)
    with contextlib.ExitStack() as stack:
        pids = {
            end: stack.enter_context(
                running([tool, str(directory / f"{end}.conf")], directory / f"{end}.log")
            )
            for end in ("server", "client")
        }
        for port in servers.values():
            wait_until("stunnel server", lambda port=port: listens(port))
        for port in clients.values():
            wait_until("stunnel client", lambda port=port: listens(port))
        yield StunnelPair(pids["client"], pids["server"], clients, servers)


def listens(port: int) -> bool:
    """Whether somebody listens, found out without connecting: iperf3 would take that for a test."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())
