"""A whole mesh on one machine: throw-away certificates, written configurations, one process a daemon.

What `ztna up` and the end-to-end tests start. Decides nothing about traffic; the daemons do.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

import aiohttp

from ztna import config as configuration
from ztna.ca import Authority, write_private
from ztna.cli.processes import Child, Ports, console_script, stop_in_order
from ztna.config import (
    AgentConfig,
    CheckConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    DnsdConfig,
    Endpoint,
    PoolConfig,
    RelayConfig,
    RelayTarget,
    RouteConfig,
    TlsConfig,
)
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulUnavailable, ZtnaError
from ztna.jsontypes import from_json
from ztna.leases import SERVICE_PREFIX, Lease
from ztna.names import ConnectorId, RelayName, ServiceName
from ztna.sections import Backend, Server
from ztna.wire.control import Address

START_SECONDS = 30.0
POLL_SECONDS = 0.05
STOP_EACH_SECONDS = 0.8
CONSUL_SECONDS = 3.0
CERTIFICATE_DAYS = 2
RELAY_NAME = RelayName("demo")
CONNECTOR_ID = "demo"

ECHO, WEB, DATABASE = ServiceName("echo-service"), ServiceName("web-app"), ServiceName("db")
SERVICES = (ECHO, WEB, DATABASE)
VIRTUAL_PORTS = {ECHO: 7007, WEB: 8080, DATABASE: 5432}
"""None below 1024: the agent of an ordinary user could not listen there."""

DEMO_POOL = IPv4Network("127.100.0.0/16")


@dataclass(frozen=True)
class MeshOptions:
    """What `ztna up` can be told."""

    directory: Path
    pool: IPv4Network = DEMO_POOL
    mode: Literal["listen", "anyip"] = "listen"
    consul_address: str | None = None
    consul_binary: str | None = None
    direct: bool = True


@dataclass
class Mesh:
    """The processes of one mesh and where to find them."""

    options: MeshOptions
    say: Callable[[str], None]
    ports: Ports = field(default_factory=Ports)
    children: list[Child] = field(default_factory=list)
    consul_kind: str = ""
    admin: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose = self.ports.choose
        self.dns_port = choose("dnsd", 5533)
        self.relay_port = choose("relay", 4433)
        self.forwarder_port = choose("relay forwarder", 4434)
        self.link_port = choose("connector link", 4435)
        for name, preferred in (("relay", 9431), ("dnsd", 9432), ("connector", 9433), ("agent", 9434)):
            self.admin[name] = choose(f"{name} admin", preferred)
        self.page_port = choose("mesh page", 9430)
        self.backend_ports = {service: choose(f"sample backend {service}", 0) for service in SERVICES}

    @property
    def agent_socket(self) -> Path:
        """The agent's admin socket."""
        return self.options.directory / "agent.sock"

    @property
    def consul_address(self) -> str:
        """The URL of the Consul in use."""
        return self._consul_address

    # -- starting ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything and wait until each daemon says that it is ready.

        Raises ZtnaError naming the daemon that ended or what is still awaited after START_SECONDS.
        """
        self.options.directory.mkdir(parents=True, exist_ok=True)
        if self.options.consul_address:
            await _require_leader(self.options.consul_address)
        consul = self._consul_child()
        for purpose, wanted, given in self.ports.taken:
            self.say(f"port {wanted} ({purpose}) is taken; using {given}")
        paths = self._write_files()
        samples = Child(
            "sample backends",
            [
                *(sys.executable, "-m", "ztna.cli.samples"),
                *("--echo-port", str(self.backend_ports[ECHO])),
                *("--web-port", str(self.backend_ports[WEB])),
                *("--database-port", str(self.backend_ports[DATABASE])),
            ],
            self._log("samples"),
        )
        daemons = [
            Child("dnsd", [console_script("ztna-dnsd"), "--config", str(paths["dnsd"])], self._log("dnsd")),
            Child(
                "relay", [console_script("ztna-relay"), "--config", str(paths["relay"])], self._log("relay")
            ),
            Child(
                "connector",
                [console_script("ztna-sidecar"), "connector", "--config", str(paths["connector"])],
                self._log("connector"),
            ),
            Child(
                "agent",
                [console_script("ztna-sidecar"), "agent", "--config", str(paths["agent"])],
                self._log("agent"),
            ),
        ]
        self.children = [*([consul] if consul else []), samples, *daemons]
        for child in self.children:
            await child.start()
        await self._wait_ready()

    def _consul_child(self) -> Child | None:
        if self.options.consul_address:
            self._consul_address = self.options.consul_address
            self.consul_kind = f"the running one at {self.options.consul_address}"
            return None
        port = self.ports.choose("Consul", 8500)
        self._consul_address = f"http://127.0.0.1:{port}"
        binary = self.options.consul_binary or shutil.which("consul")
        if binary:
            version = consul_version(binary)
            self.consul_kind = f"{binary} {version} in dev mode, {self._consul_address}"
            serf, server = self.ports.choose("Consul serf", 0), self.ports.choose("Consul server", 0)
            return Child("consul", dev_consul_argv(binary, version, port, serf, server), self._log("consul"))
        self.consul_kind = f"embedded (no `consul` on PATH), {self._consul_address}"
        argv = [sys.executable, "-m", "ztna.consul.embedded", "--listen", f"127.0.0.1:{port}"]
        return Child("consul", argv, self._log("consul"))

    def _log(self, name: str) -> Path:
        return self.options.directory / f"{name}.log"

    def _write_files(self) -> dict[str, Path]:
        paths = {}
        for name, text in ((name, configuration.dump(config)) for name, config in self._configs().items()):
            paths[name] = self.options.directory / f"{name}.yaml"
            paths[name].write_text(text)
        return paths

    def _configs(self) -> dict[str, Config]:
        authority = Authority.create(self.options.directory / "ca", "ztna up")
        names = tuple(map(str, SERVICES))
        relay = self._issue(authority, "relay", relay=RELAY_NAME)
        connector = self._issue(authority, "connector", connector=names, connector_id=CONNECTOR_ID)
        agent = self._issue(authority, "agent", agent=names)
        # The identity `ztna up --check` is denied with: it may use one service only.
        self.stranger = self._issue(authority, "stranger", agent=(str(ECHO),))
        target = RelayTarget(address=Endpoint("127.0.0.1", self.relay_port), name=RELAY_NAME)
        consul = ConsulConfig(address=self._consul_address)
        relay_config = RelayConfig(
            name=RELAY_NAME,
            tls=relay,
            listen=Endpoint("127.0.0.1", self.relay_port),
            forwarder=Endpoint("127.0.0.1", self.forwarder_port),
            admin=self._admin("relay"),
            resolvers=(Server("127.0.0.1", self.dns_port),),
            drain_s=0.2,
        )
        dnsd_config = DnsdConfig(
            listen=Endpoint("127.0.0.1", self.dns_port),
            admin=self._admin("dnsd"),
            pool=PoolConfig(cidr=self.options.pool),
        )
        connector_config = ConnectorConfig(
            id=ConnectorId(CONNECTOR_ID),
            tls=connector,
            relays=(target,),
            routes=self._routes(),
            link=Endpoint("127.0.0.1", self.link_port),
            link_advertise=Address("127.0.0.1", self.link_port),
            api=str(self.options.directory / "connector.sock"),
            api_state=str(self.options.directory / "services.json"),
            admin=self._admin("connector"),
            drain_s=0.2,
        )
        agent_config = AgentConfig(
            tls=agent,
            relays=(target,),
            mode=self.options.mode,
            pool=self.options.pool,
            direct=self.options.direct,
            admin=self._admin("agent"),
            admin_socket=str(self.agent_socket),
            drain_s=0.2,
        )
        return {
            "dnsd": Config(consul=consul, dnsd=dnsd_config),
            "relay": Config(relay=relay_config),
            "connector": Config(consul=consul, connector=connector_config),
            "agent": Config(consul=consul, agent=agent_config),
        }

    def _admin(self, name: str) -> Endpoint:
        return Endpoint("127.0.0.1", self.admin[name])

    def _issue(
        self,
        authority: Authority,
        name: str,
        *,
        agent: tuple[str, ...] = (),
        connector: tuple[str, ...] = (),
        relay: str | None = None,
        connector_id: str | None = None,
    ) -> TlsConfig:
        chain, key = authority.issue(
            name,
            agent=agent,
            connector=connector,
            relay=relay,
            connector_id=connector_id,
            days=CERTIFICATE_DAYS,
        )
        certificate_file = self.options.directory / f"{name}.pem"
        key_file = self.options.directory / f"{name}.key"
        certificate_file.write_bytes(chain)
        write_private(key_file, key)
        authority_file = self.options.directory / "ca.pem"
        authority_file.write_bytes(authority.ca_pem)
        return TlsConfig(certificate=str(certificate_file), key=str(key_file), ca=str(authority_file))

    def _routes(self) -> tuple[RouteConfig, ...]:
        return (
            RouteConfig(
                service=ECHO,
                backend=Backend("127.0.0.1", self.backend_ports[ECHO]),
                port=VIRTUAL_PORTS[ECHO],
                protocol="udp",
                checks=(CheckConfig(kind="none"),),
            ),
            RouteConfig(
                service=WEB,
                backend=Backend("127.0.0.1", self.backend_ports[WEB]),
                port=VIRTUAL_PORTS[WEB],
                checks=(CheckConfig(kind="http", interval_s=1.0, timeout_s=1.0, failures_before_critical=1),),
            ),
            RouteConfig(
                service=DATABASE,
                backend=Backend("127.0.0.1", self.backend_ports[DATABASE]),
                port=VIRTUAL_PORTS[DATABASE],
                checks=(CheckConfig(kind="tcp", interval_s=1.0, timeout_s=1.0, failures_before_critical=1),),
            ),
        )

    # -- watching ------------------------------------------------------------------------------------

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            waiting = dict(self.admin)
            detail: dict[str, str] = {}
            while waiting:
                for child in self.children:
                    if not child.running:
                        raise child.ended_error()
                for name, port in list(waiting.items()):
                    ready, detail[name] = await _is_ready(http, port)
                    if ready:
                        del waiting[name]
                if waiting and time.monotonic() > deadline:
                    told = "; ".join(f"{name}: {detail[name]}" for name in waiting)
                    raise ZtnaError(f"not ready after {START_SECONDS:.0f} s: {told}")
                await asyncio.sleep(POLL_SECONDS)

    async def table(self, client: ConsulClient) -> list[dict[str, object]]:
        """Return one row a sample service: service, protocol, port, address (or None), health."""
        leases = {}
        for pair in await client.kv_list(SERVICE_PREFIX):
            leases[pair.key.removeprefix(SERVICE_PREFIX)] = from_json(pair.value, Lease)
        rows: list[dict[str, object]] = []
        for route in self._routes():
            instances = await client.service_instances(route.service, tag="ztna")
            lease = leases.get(route.service)
            states = [instance.status for instance in instances]
            rows.append(
                {
                    "service": str(route.service),
                    "protocol": route.protocol,
                    "port": route.port,
                    "address": str(lease.ip) if lease else None,
                    "health": "passing" if "passing" in states else (states[0] if states else "absent"),
                }
            )
        return rows

    async def stop(self) -> None:
        """End every process, those that talk to others first, so that they can say goodbye."""
        by_name = {child.name: child for child in self.children}
        order = (("agent", "connector"), ("relay", "dnsd"), ("sample backends", "consul"))
        groups = [[by_name[name] for name in names if name in by_name] for names in order]
        await stop_in_order(groups, STOP_EACH_SECONDS)


async def _require_leader(address: str) -> None:
    """Raise ConsulError at once for a Consul that does not answer or has no leader."""
    async with ConsulClient(ConsulConfig(address=address, timeout_s=CONSUL_SECONDS)) as client:
        if await client.leader() is None:
            raise ConsulUnavailable(f"Consul at {address} has no leader; wait for one, or name another")


async def _is_ready(http: aiohttp.ClientSession, port: int) -> tuple[bool, str]:
    try:
        async with http.get(f"http://127.0.0.1:{port}/readyz") as answer:
            return answer.status == 200, (await answer.text()).strip()
    except (aiohttp.ClientError, TimeoutError) as error:
        return False, f"admin port {port}: {error}"


def consul_version(binary: str) -> str:
    """Return the version that a consul binary prints, e.g. `1.19.2`; ZtnaError when it prints none."""
    try:
        printed = subprocess.run(
            [binary, "version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ZtnaError(f"{binary} version: {error}; name another one or take it off PATH") from None
    match = re.search(r"v(\d+\.\d+\.\d+)", printed)
    if match is None:
        raise ZtnaError(f"{binary} version printed {printed[:80]!r}; expected Consul")
    return match.group(1)


def dev_consul_argv(binary: str, version: str, http: int, serf: int, server: int) -> list[str]:
    """Return the command of a dev-mode Consul on 127.0.0.1 with these ports and no others."""
    ports = f"http = {http}, dns = -1, grpc = -1, serf_lan = {serf}, serf_wan = -1, server = {server}"
    if tuple(map(int, version.split("."))) >= (1, 14, 0):
        ports += ", grpc_tls = -1"
    hcl = f"ports {{ {ports.replace(', ', chr(10))} }}".replace("{ ", "{\n").replace(" }", "\n}")
    return [binary, "agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-hcl", hcl]
