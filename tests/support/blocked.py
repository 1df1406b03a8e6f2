"""A mesh around one relay on port 443, and networks that let only some of its packets through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ipaddress import IPv4Network
from typing import Any

from tests.support.lab import lab
from tests.support.namespaces import Host
from tests.support.relayed import Mesh
from ztna.config import Endpoint, RouteConfig

RELAY = "edge"
PORT, FORWARDER_PORT, LINK_PORT = 443, 4434, 4435
_PORTS = f"{{ {PORT}, {FORWARDER_PORT}, {LINK_PORT} }}"

UDP_OF_MESH = (f"udp dport {_PORTS}", f"udp sport {_PORTS}")
"""What the mesh sends by UDP, and not DNS, on which relays live."""
ALL_BUT_443_TCP = (*UDP_OF_MESH, f"tcp dport {FORWARDER_PORT}", f"tcp dport {LINK_PORT}")
TCP_OF_MESH = (f"tcp dport {_PORTS}", f"tcp sport {_PORTS}")


@contextmanager
def blocked_mesh(kind: str, routes: Sequence[RouteConfig], *, direct: bool = False) -> Iterator[Mesh]:
    """A mesh whose connector and agent are started, and not waited for: they may have to do without some packets."""
    with lab("core", "laptop", RELAY) as made:
        made.host(RELAY).run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        made.start_consul(kind)
        core, edge = made.host("core"), made.host(RELAY)
        listen: dict[str, Any] = {
            "listen": Endpoint("0.0.0.0", 5533),
            "allow": (IPv4Network("0.0.0.0/0"),),
        }
        dnsd = made.dnsd(**listen).wait_ready()
        relay = made.relay(
            RELAY,
            host=RELAY,
            listen=Endpoint(edge.address, PORT),
            resolvers=(Endpoint(core.address, 5533),),
            dns_insecure=True,
        ).wait_ready()
        services = [str(route.service) for route in routes]
        relays = (made.target(RELAY, host=RELAY, port=PORT),)
        yield Mesh(
            made,
            services,
            dnsd,
            {RELAY: relay},
            made.connector("alpha", routes, relays=relays),
            made.agent("laptop", services, host="laptop", direct=direct, relays=relays),
        )


def dropping(host: Host, rules: Sequence[str]) -> AbstractContextManager[None]:
    """Drop what matches at a host, in and out, without a word to anybody, while inside."""
    return host.dropping(*rules)


def transport(mesh: Mesh) -> str | None:
    """Return over what the agent speaks to the relay now."""
    (relay,) = mesh.status()["relays"]
    found: str | None = relay["transport"]
    return found
