"""TCP where only UDP goes directly, between NATs in network namespaces: through the relay, or on the packet carrier."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import CannotMeasure, Contender, Measure, Row, need
from tests.bench.rows_tcp import bulk
from tests.support.lab import tcp_route, until
from tests.support.moving import FOUND_SECONDS, mesh_behind
from tests.support.namespaces import why_not
from tests.support.nat import Kind
from ztna.config import Endpoint

PORT = 5201


def row(directory: Path) -> Row:
    """Return the row; the meshes write beside `directory`, which is for others."""
    return Row(
        "TCP on a punched path, agent.tcp_on_punched: relay or packet",
        "the default is the faster",
        [
            Contender(f"ztna, {carrier}", lambda carrier=carrier: mesh(carrier))
            for carrier in ("relay", "packet")
        ],
    )


@contextlib.contextmanager
def mesh(carrier: str) -> Iterator[Measure]:
    """Agent and connector, each behind a NAT, with a direct path for UDP."""
    if (reason := why_not()) is not None or shutil.which("conntrack") is None:
        raise CannotMeasure(reason or "not installed: conntrack")
    iperf = need("iperf3", "iperf3")
    route = tcp_route("iperf", Endpoint("127.0.0.1", PORT), PORT, kind="none")
    with mesh_behind(
        Kind.PORT, {"laptop": {"tcp_on_punched": carrier}}, connector=Kind.PORT, more=(route,)
    ) as made:
        rack, laptop = made.lab.host("rack"), made.lab.host("laptop")
        made.lab.spawn("iperf3", rack, iperf, "-s", "-B", "127.0.0.1", "-p", str(PORT))
        address = made.lab.address("iperf")
        (relay,) = [each for each in made.lab.running if each.name == "relay"]
        ends = {"relay": relay.pid, "agent": made.agents["laptop"].pid, "connector": made.connector.pid}
        # iperf3 serves one test at a time: a connection to find out would count as one.
        until(
            "the agent listens",
            lambda: f"{address}:{PORT}" in made.agents["laptop"].get("/status")[1],
            FOUND_SECONDS,
        )
        yield lambda: bulk(address, PORT, ends, prefix=laptop.prefix)
