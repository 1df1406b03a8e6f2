"""The soak's mesh: a real relay, dnsd and Consul as processes; agents and connectors as real bodies in this one.

Every agent serves its services at addresses of its own (`agent.overrides`), which is how 200 of them share a host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import sidecar.agent.ranges
from sidecar.agent import daemon as agent_daemon
from sidecar.connector import daemon as connector_daemon
from tests.soak.witness import Ledger, Witness
from tests.support.consul import free_ports
from tests.support.lab import Daemon as Process
from tests.support.lab import Lab, until
from tests.support.lab import Running as AnyProcess
from tests.support.namespaces import LocalNetwork
from tests.support.whole_mesh import Running
from ztna.config import (
    AgentConfig,
    CheckConfig,
    Config,
    ConnectorConfig,
    Endpoint,
    Override,
    RelayTarget,
    RouteConfig,
    TlsConfig,
)
from ztna.names import ConnectorId, ServiceName
from ztna.runtime import Daemon

SERVICES_OF_A_KIND = 10
"""Half as many as there are connectors, so that each service has two."""
PORT = 7007
STARTS_AT_ONCE = 8
PATIENCE_SECONDS = 120.0
"""Within which anything comes, though so many share one process, and the machine is another's too."""
CHECK = CheckConfig(kind="tcp", interval_s=2.0, timeout_s=2.0, failures_before_critical=2)
UNCHECKED = CheckConfig(kind="none")


@dataclass(frozen=True)
class Size:
    """How many there are."""

    agents: int
    connectors: int


@dataclass
class Client:
    """One agent, and where its programs call its two services."""

    number: int
    tls: TlsConfig
    services: dict[str, ServiceName]
    running: Running | None = None

    @property
    def name(self) -> str:
        """Its name, which its payloads carry."""
        return f"agent-{self.number}"

    def address(self, kind: str) -> str:
        """Return its own address for the service of a kind (tcp, udp)."""
        return f"127.{60 + (kind == 'udp')}.{self.number // 250}.{self.number % 250 + 1}"


@dataclass
class Server:
    """One connector, and the backends behind it."""

    number: int
    tls: TlsConfig
    routes: tuple[RouteConfig, ...]
    link: Endpoint
    running: Running | None = None


@dataclass
class SoakMesh:
    """All of it."""

    lab: Lab
    tasks: asyncio.TaskGroup
    size: Size
    ledger: Ledger
    clients: list[Client] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)
    witnesses: list[Witness] = field(default_factory=list)
    consul: AnyProcess = None  # type: ignore[assignment]
    dnsd: Process = None  # type: ignore[assignment]
    relay: Process = None  # type: ignore[assignment]

    async def start_processes(self) -> None:
        """Start Consul, dnsd and the relay; nobody is connected yet."""
        # Reading 200 times the routes of the one host that all of them share is not what this measures.
        sidecar.agent.ranges.LOOK_SECONDS = 3600.0
        consul, dns, control, forwarder = free_ports(4)
        lab = self.lab
        argv = (sys.executable, "-m", "ztna.consul.embedded", "--listen", f"127.0.0.1:{consul}")
        self.consul = lab.spawn("consul", lab.host("core"), *argv)
        lab.use_consul(f"http://127.0.0.1:{consul}")
        await self._wait("Consul", lambda: lab.consul_get("/v1/status/leader"))
        self.dnsd = lab.dnsd(listen=Endpoint("127.0.0.1", dns))
        self.relay = lab.relay(
            listen=Endpoint("127.0.0.1", control),
            forwarder=Endpoint("127.0.0.1", forwarder),
            resolvers=(Endpoint("127.0.0.1", dns),),
        )
        self.target = RelayTarget(address=Endpoint("127.0.0.1", control), name="relay")
        for process in (self.dnsd, self.relay):
            await self._wait(f"{process.name} ready", process.ready)

    async def start(self) -> None:
        """Issue the certificates and start every backend, connector and agent."""
        links = free_ports(self.size.connectors)
        for number in range(self.size.connectors):
            kinds = {kind: ServiceName(f"{kind}-{number % SERVICES_OF_A_KIND}") for kind in ("tcp", "udp")}
            routes = [await self._route(kind, service) for kind, service in kinds.items()]
            name = f"connector-{number}"
            tls = self.lab.certificate(name, connector=kinds.values(), connector_id=name)
            self.servers.append(Server(number, tls, tuple(routes), Endpoint("127.0.0.1", links[number])))
        for number in range(self.size.agents):
            services = {
                "tcp": ServiceName(f"tcp-{number % SERVICES_OF_A_KIND}"),
                "udp": ServiceName(f"udp-{number * 3 % SERVICES_OF_A_KIND}"),
            }
            tls = self.lab.certificate(f"agent-{number}", agent=services.values())
            self.clients.append(Client(number, tls, services))
        await self._each(self.servers, self.start_server)
        await self._each(self.clients, self.start_client)

    async def start_client(self, client: Client) -> None:
        """Start an agent (again); every other one never goes directly."""
        section = AgentConfig(
            tls=client.tls,
            relays=(self.target,),
            pool=self.lab.pool,
            overrides=tuple(
                Override(service=service, ip=IPv4Address(client.address(kind)))
                for kind, service in client.services.items()
            ),
            direct=client.number % 2 == 0,
            udp_idle_s=5.0,
            drain_s=0.1,
        )
        client.running = self._body(client.name, agent_daemon.body, agent=section)

    async def start_server(self, server: Server) -> None:
        """Start a connector (again)."""
        section = ConnectorConfig(
            id=ConnectorId(f"connector-{server.number}"),
            tls=server.tls,
            relays=(self.target,),
            routes=server.routes,
            link=server.link,
            drain_s=0.1,
        )
        server.running = self._body(f"connector-{server.number}", connector_daemon.body, connector=section)

    async def stop(self, one: Client | Server) -> None:
        """Stop an agent or a connector cleanly."""
        running, one.running = one.running, None
        if running is not None:
            await running.stop(PATIENCE_SECONDS)

    async def stop_all(self) -> None:
        """Stop every agent and connector, and the backends."""
        await self._each(self.clients, self.stop)
        await self._each(self.servers, self.stop)
        for witness in self.witnesses:
            await witness.close()

    async def _route(self, kind: Any, service: ServiceName) -> RouteConfig:
        witness = Witness(service, self.ledger)
        self.witnesses.append(witness)
        port = await witness.start(kind)
        check = CHECK if kind == "tcp" else UNCHECKED
        backend = Endpoint("127.0.0.1", port)
        return RouteConfig(service=service, backend=backend, port=PORT, protocol=kind, checks=(check,))

    def _body(self, name: str, body: Callable[[Daemon], Awaitable[None]], **section: Any) -> Running:
        return Running(Daemon(name, Config(consul=self.lab.consul, **section), self.tasks), body)

    async def _each(self, those: list[Any], do: Callable[[Any], Awaitable[None]]) -> None:
        limit = asyncio.Semaphore(STARTS_AT_ONCE)

        async def one(each: Any) -> None:
            async with limit:
                await do(each)
                if each.running is not None:
                    await each.running.ready(PATIENCE_SECONDS)

        async with asyncio.TaskGroup() as tasks:
            for each in those:
                tasks.create_task(one(each))

    async def _wait(self, what: str, condition: Callable[[], Any]) -> None:
        await asyncio.to_thread(until, what, condition, PATIENCE_SECONDS)


@contextlib.asynccontextmanager
async def processes(directory: Path, size: Size) -> Any:
    """Run the processes; the tails of their logs go with an error."""
    lab = Lab(LocalNetwork(), directory, IPv4Network("127.100.0.0/16"))
    try:
        async with asyncio.TaskGroup() as tasks:
            mesh = SoakMesh(lab, tasks, size, Ledger())
            await mesh.start_processes()
            yield mesh
            lab.check_nothing_unexpected()
            wrong = await asyncio.to_thread(lab.close)
            assert not wrong, "\n".join(wrong)
    except BaseException:
        print("\n".join(f"---- {title}\n{tail}" for title, tail in lab.tails()))
        raise
    finally:
        await asyncio.to_thread(lab.close)


def descriptors(pid: int | None = None) -> int:
    """Return how many a process has open, this one without a pid."""
    return len(os.listdir(f"/proc/{pid or os.getpid()}/fd"))


def resident(pid: int | None = None) -> int:
    """Return its resident size in bytes."""
    pages = int(Path(f"/proc/{pid or os.getpid()}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
