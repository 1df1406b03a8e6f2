"""What the daemons hold of memory when much is there and nothing happens: services, agents, flows.

Relay, dnsd, connector and one agent are real processes; the other agents share one more, which is not measured. Every
flow goes by the forwarder, which costs the relay most, and ends at the one connector, which costs that most: OpenSSL
alone takes 25 KB a connection, half of it for the certificates of its peer. What a flow costs is told beside.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Measure,
    Row,
    free_port,
    memory_bytes,
    running,
    wait_until,
)
from tests.bench.idle_agents import ECHO_SECONDS, HELLO
from tests.bench.mesh import BenchMesh, bench_mesh
from tests.bench.rows_relay import Process
from tests.support.consul import NEWEST, peers_folder
from tests.support.lab import Daemon, tcp_route
from ztna import config as configuration
from ztna.cli.mesh import dev_consul_argv
from ztna.config import AgentConfig, Config, Endpoint, Override
from ztna.names import ServiceName

SERVICES = 1_000
AGENTS = 200
FLOWS_OF_AN_AGENT = 10
PORT = 7000
KNOWN_SECONDS = 180.0
TTL_SECONDS = 60.0
"""Of the checks in Consul: 200 reports a second, as by default, are no mesh in which nothing happens."""
KB, MB = 1e3, 1e6


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    flows = AGENTS * FLOWS_OF_AN_AGENT
    return Row(
        f"memory: {SERVICES:,} services, {AGENTS} agents, {flows:,} idle TCP flows by the forwarder, Consul {NEWEST}",
        "relay < 150 MB, dnsd < 80 MB, connector and agent < 120 MB each",
        [Contender("ztna", lambda: idle(directory / "memory"))],
    )


@contextlib.contextmanager
def idle(directory: Path) -> Iterator[Measure]:
    """Run everything, and say what each process holds."""
    names = [f"service-{number:04}" for number in range(SERVICES)]
    port = free_port()
    routes = [tcp_route(name, Endpoint("127.0.0.1", port), port=PORT, interval_s=10.0) for name in names]
    echo = [sys.executable, "-m", "tests.bench.tcp_echo", str(port)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(echo, directory.parent / "memory-echo.log"))
        mesh = stack.enter_context(
            bench_mesh(
                directory,
                routes,
                direct=False,
                grants=["*"],
                consul_argv=_consul(),
                ready_s=KNOWN_SECONDS,
                ttl_s=TTL_SECONDS,
            )
        )
        wait_until("the agent serves all names", lambda: _served(mesh) == SERVICES, KNOWN_SECONDS)
        before = memory_bytes(mesh.connector.pid)
        flows = stack.enter_context(_other_agents(mesh, directory, names))
        for name in names[:FLOWS_OF_AN_AGENT]:
            stack.enter_context(_flow(mesh.address(name)))
            flows += 1
        yield (
            lambda: (
                {"flows": flows}
                | {f"{role} MB": memory_bytes(each.pid) / MB for role, each in _measured(mesh).items()}
                | {"connector KB a flow": (memory_bytes(mesh.connector.pid) - before) / KB / flows}
            )
        )


def _consul() -> Callable[[int], Sequence[str]]:
    """Return how to start a real Consul: 1,000 checks a few times a TTL are too much for the embedded one."""
    binary = peers_folder() / f"consul-{NEWEST}"
    if not binary.exists():
        raise CannotMeasure("no Consul: run `make peers`")
    # In dev mode it logs a line of each service at each check's report, gigabytes of them in a minute, which leaves it
    # no time for the reports. And one host may hold 200 connections to it: here all agents are on one.
    settings = ("-log-level=warn", "-hcl", "limits { http_max_conns_per_client = 2000 }")
    return lambda port: [*dev_consul_argv(str(binary), NEWEST, port, free_port(), free_port()), *settings]


def _measured(mesh: BenchMesh) -> dict[str, Daemon]:
    return {"relay": mesh.relay, "dnsd": mesh.dnsd, "connector": mesh.connector, "agent": mesh.agent}


def _served(mesh: BenchMesh) -> int:
    return sum(bool(each["listening"]) for each in mesh.agent.status()["agent"]["services"])


@contextlib.contextmanager
def _other_agents(mesh: BenchMesh, directory: Path, names: list[str]) -> Iterator[int]:
    """Run all agents but one in one process; yields how many flows they hold."""
    lab, told = mesh.lab, []
    for number in range(1, AGENTS):
        own = [names[(number * FLOWS_OF_AN_AGENT + each) % SERVICES] for each in range(FLOWS_OF_AN_AGENT)]
        hosts = [IPv4Address(f"127.60.{number}.{1 + each}") for each in range(FLOWS_OF_AN_AGENT)]
        section = AgentConfig(
            tls=lab.certificate(f"agent-{number}", agent=own),
            relays=(lab.target(port=mesh.relay_port),),
            pool=lab.pool,
            overrides=tuple(
                Override(service=ServiceName(name), ip=host) for name, host in zip(own, hosts, strict=True)
            ),
            direct=False,
        )
        file = directory / f"agent-{number}.yaml"
        file.write_text(configuration.dump(Config(consul=lab.consul, agent=section), secrets=True))
        told.append((str(file), [(str(host), PORT) for host in hosts]))
    process = Process(directory / "agents.log", "tests.bench.idle_agents")
    try:
        try:
            held = int(process.ask(json.dumps(told))["flows"])
        except CannotMeasure as error:
            counted = {each.name: each.status()["counted"] for each in (mesh.relay, mesh.connector)}
            raise CannotMeasure(f"{error}\ncounted: {counted}") from None
        yield held
    finally:
        process.end()


@contextlib.contextmanager
def _flow(address: str) -> Iterator[None]:
    """A flow of the measured agent, echoed once."""
    with socket.create_connection((address, PORT), ECHO_SECONDS) as flow:
        flow.sendall(HELLO)
        if flow.recv(len(HELLO)) != HELLO:
            raise CannotMeasure(f"{address} does not echo")
        yield
