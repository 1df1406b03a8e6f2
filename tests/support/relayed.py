"""A lab whose relays stand on hosts of their own, so that each can be killed, drained or swallowed by the network.

Nothing goes directly, unless a test wants it: what an agent carries, a relay forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from tests.support.lab import Daemon, Lab, lab, until
from tests.support.namespaces import Host
from ztna.config import Endpoint, RelayRecordConfig, RouteConfig
from ztna.wire.control import Address

SWALLOWED = ('iifname "eth0"', 'oifname "eth0"')
DRAIN_SECONDS = 20.0


@dataclass
class Mesh:
    """One connector and one agent, each with a connection to all relays."""

    lab: Lab
    services: list[str]
    dnsd: Daemon
    relays: dict[str, Daemon]
    connector: Daemon
    agent: Daemon

    @property
    def core(self) -> Host:
        """Where Consul, dnsd and the connector are."""
        return self.lab.host("core")

    @property
    def laptop(self) -> Host:
        """Where the agent is."""
        return self.lab.host("laptop")

    def address(self, service: str) -> str:
        """Return a service's virtual address, once it has one."""
        return self.lab.address(service, "laptop", server=self.core.address)

    def status(self) -> dict[str, Any]:
        """Return what the agent says of itself."""
        said: dict[str, Any] = self.agent.status()["agent"]
        return said

    def carrier(self) -> str:
        """Return the relay that the one packet link goes by now."""
        (link,) = self.status()["links"]
        return str(link["relay"])

    def wait_known(self, relays: Sequence[str] | None = None) -> None:
        """Wait until relays, all unless some are named, may send sessions of all services to the connector."""
        asked = [self.relays[name] for name in (relays if relays is not None else self.relays)]

        def is_known() -> bool:
            found = [relay.status()["srv"]["services"] for relay in asked]
            return all(each.get(service, {}).get("connectors") for each in found for service in self.services)

        until("the relays know the connector", is_known, 30)


@contextmanager
def relayed_mesh(
    kind: str,
    routes: Sequence[RouteConfig],
    relays: Sequence[str] = ("east", "west"),
    *,
    found: Sequence[str] | None = None,
    drain_s: float = DRAIN_SECONDS,
    direct: bool = False,
    prepare: Callable[[Lab], None] = lambda made: None,
    dnsd_keys: Mapping[str, Any] | None = None,
    connector_keys: Mapping[str, Any] | None = None,
    agent_keys: Mapping[str, Any] | None = None,
    **relay_keys: Any,
) -> Iterator[Mesh]:
    """A mesh with these relays, each on the host of its name, which routes; all of it is ready.

    With `found` nobody is told of relays but by DNS, which at first names these. `prepare` is called before anything is
    started.
    """
    with lab("core", "laptop", *relays) as made:
        for name in relays:
            made.host(name).run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        prepare(made)
        made.start_consul(kind)
        core = made.host("core")
        listen: dict[str, Any] = {
            "listen": Endpoint("0.0.0.0", 5533),
            "allow": (IPv4Network("0.0.0.0/0"),),
            "relays": records(made, found or ()),
            **(dnsd_keys or {}),
        }
        dnsd = made.dnsd(**listen).wait_ready()
        keys: dict[str, Any] = {
            "resolvers": (Endpoint(core.address, 5533),),
            "dns_insecure": True,
            "drain_s": drain_s,
            **relay_keys,
        }
        services = [str(route.service) for route in routes]
        told: dict[str, Any] = {"relays": tuple(made.target(name, host=name) for name in relays)}
        if found is not None:
            told = {"relays": (), "resolvers": (Endpoint(core.address, 5533),)}
        mesh = Mesh(
            made,
            services,
            dnsd,
            {name: made.relay(name, host=name, **keys) for name in relays},
            made.connector("alpha", routes, **told, **(connector_keys or {})),
            made.agent("laptop", services, host="laptop", direct=direct, **told, **(agent_keys or {})),
        )
        for daemon in (*mesh.relays.values(), mesh.connector, mesh.agent):
            daemon.wait_ready()
        yield mesh


def records(made: Lab, relays: Sequence[str]) -> tuple[RelayRecordConfig, ...]:
    """Return what a dnsd is told of relays."""
    return tuple(
        RelayRecordConfig(name=name, address=Address(made.host(name).address, 4433)) for name in relays
    )


def killed(mesh: Mesh, relay: str) -> AbstractContextManager[None]:
    """End a relay with -9."""
    mesh.relays[relay].kill()
    return nullcontext()


def swallowed(mesh: Mesh, relay: str) -> AbstractContextManager[None]:
    """Let nothing reach a relay or leave it, without a word to anybody, while inside."""
    return mesh.lab.host(relay).dropping(*SWALLOWED)
