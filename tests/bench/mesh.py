"""A mesh on 127.0.0.1 for measuring: a Consul (the embedded one by default), dnsd, relay, one connector, one agent."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from tests.bench.harness import CannotMeasure, free_port, wait_until
from tests.support.lab import READY_SECONDS, Daemon, Lab
from tests.support.namespaces import LocalNetwork
from ztna.config import Endpoint, RouteConfig


@dataclass
class BenchMesh:
    """The daemons whose CPU time is counted, and where the services are."""

    lab: Lab
    dns_port: int
    relay_port: int
    dnsd: Daemon
    relay: Daemon
    connector: Daemon
    agent: Daemon

    def address(self, service: str) -> str:
        """Return a service's virtual address."""
        return self.lab.address(service, port=self.dns_port)


@contextlib.contextmanager
def bench_mesh(
    directory: Path,
    routes: Sequence[RouteConfig],
    *,
    direct: bool,
    grants: Sequence[str] | None = None,
    consul_argv: Callable[[int], Sequence[str]] | None = None,
    ready_s: float = READY_SECONDS,
    **connector_keys: Any,
) -> Iterator[BenchMesh]:
    """Start a mesh that fronts these routes; CannotMeasure when it does not come up.

    `consul_argv` starts a Consul on an HTTP port; by default it is the embedded one.
    `grants` of connector and agent are the routes' services unless given; each daemon has `ready_s` to be ready.
    `connector_keys` are more of the connector's configuration.
    """
    directory.mkdir()
    lab = Lab(LocalNetwork(), directory, IPv4Network("127.100.0.0/16"))
    try:
        consul, dns, control, forwarder, link = (free_port() for _ in range(5))
        lab.spawn("consul", lab.host("core"), *(consul_argv or _embedded)(consul))
        lab.use_consul(f"http://127.0.0.1:{consul}")
        wait_until("Consul", lambda: bool(lab.consul_get("/v1/status/leader")))
        dnsd = lab.dnsd(listen=Endpoint("127.0.0.1", dns))
        relay = lab.relay(
            listen=Endpoint("127.0.0.1", control),
            forwarder=Endpoint("127.0.0.1", forwarder),
            resolvers=(Endpoint("127.0.0.1", dns),),
        )
        relays = (lab.target(port=control),)
        link_at = Endpoint("127.0.0.1", link)
        connector = lab.connector(
            "bench", routes, grants=grants, link=link_at, relays=relays, **connector_keys
        )
        granted = grants or [str(route.service) for route in routes]
        agent = lab.agent("agent", granted, relays=relays, direct=direct)
        try:
            for daemon in (dnsd, relay, connector, agent):
                daemon.wait_ready(ready_s)
        except AssertionError as error:
            raise CannotMeasure(str(error)) from None
        yield BenchMesh(lab, dns, control, dnsd, relay, connector, agent)
    finally:
        lab.close()


def _embedded(port: int) -> list[str]:
    return [sys.executable, "-m", "ztna.consul.embedded", "--listen", f"127.0.0.1:{port}"]
