"""TCP through the relay's forwarder, beside HAProxy in TCP mode with splice between a stunnel pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import Contender, Measure, Row, accepts, free_port, need, running, wait_until
from tests.bench.mesh import bench_mesh
from tests.bench.rows_tcp import backends, bulk, listens, stunnel_pair
from tests.support.lab import tcp_route
from ztna.config import Endpoint


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    tcp = Relayed(directory / "tcp-relay")
    return Row(
        "TCP through the relay",
        "relay CPU per GB <= 0.5 x HAProxy; ends as direct",
        [Contender("ztna, forwarded", tcp.ours), Contender("stunnel + HAProxy splice", tcp.haproxy)],
    )


class Relayed:
    """Starts ours without the direct path, and HAProxy in the relay's place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    @contextlib.contextmanager
    def ours(self) -> Iterator[Measure]:
        """The mesh; agents may not dial directly."""
        with backends(self.directory) as (iperf_port, echo_port):
            routes = [
                tcp_route("iperf", Endpoint("127.0.0.1", iperf_port), 5201, kind="none"),
                tcp_route("echo", Endpoint("127.0.0.1", echo_port), 5202, kind="none"),
            ]
            with bench_mesh(self.directory / "ours", routes, direct=False) as mesh:
                ends = {"relay": mesh.relay.pid, "agent": mesh.agent.pid, "connector": mesh.connector.pid}
                vip, echo = mesh.address("iperf"), mesh.address("echo")
                wait_until("the agent listens", lambda: accepts(5202, echo))
                yield lambda: bulk(vip, 5201, ends)

    @contextlib.contextmanager
    def haproxy(self) -> Iterator[Measure]:
        """stunnel client -> HAProxy -> stunnel server."""
        between = free_port()
        with backends(self.directory) as (iperf_port, _):
            pair = stunnel_pair(self.directory / "stunnel", {"iperf": iperf_port}, {"iperf": between})
            with pair as stunnels, self._haproxy(between, stunnels.server_ports["iperf"]) as pid:
                ends = {"relay": pid, "agent": stunnels.client, "connector": stunnels.server}
                port = stunnels.ports["iperf"]
                yield lambda: bulk("127.0.0.1", port, ends)

    @contextlib.contextmanager
    def _haproxy(self, listen: int, connect: int) -> Iterator[int]:
        file = self.directory / "haproxy.cfg"
        file.write_text(
            "global\n  nbthread 1\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n"
            "  timeout server 60s\n  option splice-auto\n  option splice-request\n  option splice-response\n"
            f"listen relay\n  bind 127.0.0.1:{listen}\n  server s 127.0.0.1:{connect}\n"
        )
        with running(
            [need("haproxy", "haproxy"), "-db", "-f", str(file)], self.directory / "haproxy.log"
        ) as pid:
            wait_until("HAProxy", lambda: listens(listen))
            yield pid
