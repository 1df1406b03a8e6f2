"""A mesh as nodes, edges and services, from what its daemons say.

Pure. One status is enough, and each further one adds what only that daemon knows: a relay knows sessions, a connector
its backends, an agent its paths, dnsd what Consul has. Where they differ, who is nearer to the thing is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from ztna.pages.seen import Agent, Connector, Daemon, Dnsd, Port, Relay

Kind = Literal["agent", "relay", "connector", "backend"]
Way = Literal["direct", "forwarded", "dialling", "unseen"]

HEALTHS = ("passing", "warning", "critical", "unknown")
"""From best to worst known: one instance that passes is enough for a service."""
UNKNOWN = "unknown"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon or a backend; `id` is its kind and its name."""

    id: str
    kind: Kind
    name: str
    health: str = UNKNOWN
    detail: str = ""


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A service with its lease; `connectors` and `backends` are ids of nodes."""

    name: str
    address: str | None = None
    ports: tuple[Port, ...] = ()
    health: str = UNKNOWN
    why: str | None = None
    connectors: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """A path that sessions of an agent with a connector go (`way`), or the control connection of two nodes (no way).

    `via` is the relay of a path, and `carrier` what carries: quic, tls or tcp.
    """

    start: str
    end: str
    carrier: str = ""
    way: Way | None = None
    via: str | None = None
    rtt_ms: float | None = None
    services: tuple[str, ...] = ()


class Mesh(msgspec.Struct, frozen=True):
    """The whole of it, each in the order of its names."""

    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()
    services: tuple[Service, ...] = ()

    def of(self, kind: Kind) -> tuple[Node, ...]:
        """Return the nodes of a kind."""
        return tuple(node for node in self.nodes if node.kind == kind)

    @property
    def paths(self) -> tuple[Edge, ...]:
        """The edges that sessions go."""
        return tuple(edge for edge in self.edges if edge.way is not None)


def mesh_of(statuses: Iterable[Daemon]) -> Mesh:
    """Return the mesh that these daemons make."""
    gathered = _Gathered()
    for status in statuses:
        match status:
            case Relay():
                gathered.relay(status)
            case Connector():
                gathered.connector(status)
            case Agent():
                gathered.agent(status)
            case Dnsd():
                gathered.dnsd(status)
            case _:
                pass
    return gathered.mesh()


# Who is believed first about a service's health and a session's path.
_AT_THE_CONNECTOR, _IN_CONSUL, _AT_THE_AGENT, _AT_THE_RELAY = range(4)


class _Found:
    """What is known of one service so far."""

    def __init__(self) -> None:
        self.address: str | None = None
        self.ports: tuple[Port, ...] = ()
        self.healths: dict[int, list[str]] = {}
        self.whys: dict[int, str] = {}
        self.connectors: set[str] = set()
        self.backends: set[str] = set()

    def tell(self, source: int, health: str, why: str | None) -> None:
        if health != UNKNOWN:
            self.healths.setdefault(source, []).append(health)
        if why:
            self.whys.setdefault(source, why)

    def lease(self, address: str | None, ports: tuple[Port, ...]) -> None:
        self.address, self.ports = self.address or address, self.ports or ports

    def service(self, name: str) -> Service:
        source = min(self.healths, default=None)
        health = UNKNOWN if source is None else best(self.healths[source])
        return Service(
            name=name,
            address=self.address,
            ports=self.ports,
            health=health,
            why=self.whys.get(min(self.whys, default=-1)) if health != "passing" else None,
            connectors=tuple(sorted(self.connectors)),
            backends=tuple(sorted(self.backends)),
        )


class _Gathered:
    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._services: dict[str, _Found] = {}
        self._control: dict[tuple[str, str], Edge] = {}
        self._sessions: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self._ways: dict[tuple[str, str], dict[int, list[Edge]]] = {}

    # --- one daemon

    def relay(self, status: Relay) -> None:
        own = self._node("relay", status.relay.name, status.readiness.ready, status.relay.address)
        for peer in status.connections:
            kind: Kind = "agent" if peer.connector_id is None else "connector"
            health = "warning" if peer.silent else "passing"
            node = self._known(kind, peer.connector_id or peer.peer, health, peer.address)
            self._connected(node, own, peer.transport)
            for service in peer.services:
                self._service(service).connectors.add(node)
        for name, srv in status.srv.services.items():
            health, why = ("passing", None) if srv.connectors else ("critical", "DNS names no connector")
            self._service(name).tell(_AT_THE_RELAY, health, why)
        for session in status.sessions:
            agent, connector = (
                self._known("agent", session.agent),
                self._known("connector", session.connector_id),
            )
            self._session(agent, connector, own, session.service)
            way = _way(session.path)
            # What the ends tell of is the packet carrier; what went through here is in one count or the other.
            is_quic = way == "direct" or session.link_bytes > 0
            self._path(_AT_THE_RELAY, agent, connector, own, way, "quic" if is_quic else "tls")

    def connector(self, status: Connector) -> None:
        told = status.connector
        own = self._node("connector", told.id, status.readiness.ready)
        for relay in told.relays:
            health = "passing" if relay.connected else "critical"
            node = self._known("relay", relay.name, health, relay.address)
            if relay.connected:
                self._connected(own, node, relay.transport or "")
        for name, route in told.services.items():
            found = self._service(name)
            found.connectors.add(own)
            found.tell(_AT_THE_CONNECTOR, route.verdict, route.refused or route.output)
            if route.lease is not None:
                found.lease(route.lease.ip, route.lease.ports)
            for backend in route.backends:
                health = "warning" if backend.ejected else backend.verdict
                detail = next(
                    (check.output for check in backend.checks if check.verdict == backend.verdict), ""
                )
                found.backends.add(self._known("backend", backend.backend, health, detail))
        for session in told.sessions:
            self._session(
                self._known("agent", session.agent, "passing"),
                own,
                _id("relay", session.relay),
                session.service,
            )
        for link in told.links:
            if link.path != "spare" and link.agent is not None:
                agent, relay_id = self._known("agent", link.agent), _id("relay", link.relay)
                self._path(_AT_THE_CONNECTOR, agent, own, relay_id, _way(link.path), "quic")

    def agent(self, status: Agent) -> None:
        told = status.agent
        name = status.certificate.name if status.certificate is not None else "this agent"
        own = self._node("agent", name, status.readiness.ready, f"{told.mode} {told.pool}".strip())
        for relay in told.relays:
            health = "passing" if relay.state == "up" else "critical"
            node = self._known("relay", relay.relay, health)
            if relay.state == "up":
                self._connected(own, node, relay.transport or "", relay.rtt_ms)
        for service in told.services:
            found = self._service(service.service)
            found.lease(service.ip, service.ports)
            found.tell(_AT_THE_AGENT, service.health, service.reason)
        relays = {}
        for session in told.sessions:
            connector = self._known("connector", session.connector, "passing")
            relay_id = _id("relay", session.relay)
            self._session(own, connector, relay_id, session.service)
            relays[session.connector] = relay_id
        for link in told.links:
            connector, relay_id = self._known("connector", link.connector), _id("relay", link.relay)
            way = _way(link.path)
            self._path(_AT_THE_CONNECTOR, own, connector, relay_id, way, link.carrier, link.rtt_ms)
        for connector, route in told.streams.routes.items():
            if route in ("direct", "forwarded") and connector in relays:
                node = self._known("connector", connector)
                self._path(_AT_THE_CONNECTOR, own, node, relays[connector], _way(route), "tcp")

    def dnsd(self, status: Dnsd) -> None:
        for name in status.names.services:
            found = self._service(name.service)
            found.lease(name.ip, name.ports)
            if name.problem is not None:
                found.tell(_AT_THE_CONNECTOR, "critical", name.problem)
            if not name.instances:
                found.tell(_IN_CONSUL, "critical", "Consul has no instance of it")
            for instance in name.instances:
                found.tell(_IN_CONSUL, instance.status, f"{instance.id} is {instance.status} in Consul")
                if instance.connector is not None:
                    # A check that passes is one that the connector has just refreshed.
                    health = "passing" if instance.status == "passing" else UNKNOWN
                    node = self._known("connector", instance.connector, health, instance.address)
                    found.connectors.add(node)

    # --- what they have in common

    def _service(self, name: str) -> _Found:
        return self._services.setdefault(name, _Found())

    def _node(self, kind: Kind, name: str, is_ready: bool, detail: str = "") -> str:
        """Note a daemon by what it says of itself."""
        id_ = _id(kind, name)
        before = self._nodes.get(id_)
        detail = detail or (before.detail if before is not None else "")
        self._nodes[id_] = Node(
            id=id_, kind=kind, name=name, health="passing" if is_ready else "warning", detail=detail
        )
        return id_

    def _known(self, kind: Kind, name: str, health: str = UNKNOWN, detail: str = "") -> str:
        """Note a node by what another says of it, which is believed while nothing else is known."""
        id_ = _id(kind, name)
        node = self._nodes.get(id_, Node(id=id_, kind=kind, name=name))
        health = node.health if node.health != UNKNOWN else health
        self._nodes[id_] = msgspec.structs.replace(node, health=health, detail=node.detail or detail)
        return id_

    def _connected(self, peer: str, relay: str, carrier: str, rtt_ms: float | None = None) -> None:
        before = self._control.get((peer, relay))
        rtt_ms = rtt_ms if before is None or before.rtt_ms is None else before.rtt_ms
        self._control[peer, relay] = Edge(start=peer, end=relay, carrier=carrier, rtt_ms=rtt_ms)

    def _session(self, agent: str, connector: str, relay: str, service: str) -> None:
        self._known("relay", relay.partition(":")[2])
        self._service(service).connectors.add(connector)
        self._sessions.setdefault((agent, connector), set()).add((relay, service))

    def _path(
        self,
        source: int,
        agent: str,
        connector: str,
        relay: str,
        way: Way,
        carrier: str,
        rtt_ms: float | None = None,
    ) -> None:
        path = Edge(start=agent, end=connector, carrier=carrier, way=way, via=relay, rtt_ms=rtt_ms)
        self._ways.setdefault((agent, connector), {}).setdefault(source, []).append(path)

    def mesh(self) -> Mesh:
        """Return what was gathered."""
        paths = []
        for ends, sessions in sorted(self._sessions.items()):
            told = self._ways.get(ends)
            services = tuple(sorted({service for _, service in sessions}))
            if told is None:
                relay = min(relay for relay, _ in sessions)
                paths.append(Edge(start=ends[0], end=ends[1], way="unseen", via=relay, services=services))
                continue
            ways = _distinct(told[min(told)])
            paths += [msgspec.structs.replace(path, services=self._on(path, ways, services)) for path in ways]
        control = [edge for _, edge in sorted(self._control.items())]
        return Mesh(
            tuple(self._nodes[id_] for id_ in sorted(self._nodes)),
            tuple(control + paths),
            tuple(self._services[name].service(name) for name in sorted(self._services)),
        )

    def _on(self, path: Edge, ways: Iterable[Edge], services: tuple[str, ...]) -> tuple[str, ...]:
        """Return which services go this way: where TCP has a carrier of its own, the other ways have the rest."""
        if all(each.carrier != "tcp" for each in ways):
            return services
        is_tcp = path.carrier == "tcp"
        protocols = {name: {port.protocol for port in self._service(name).ports} for name in services}
        fit = (
            name for name in services if (protocols[name] & {"tcp"} if is_tcp else protocols[name] - {"tcp"})
        )
        return tuple(fit) or services


def best(healths: Iterable[str]) -> str:
    """Return the best of healths; one with a name of its own is the worst."""
    return min(healths, key=lambda each: HEALTHS.index(each) if each in HEALTHS else len(HEALTHS))


def tally(healths: Iterable[str]) -> Mapping[str, int]:
    """Return how many there are of each health, best first."""
    found = list(healths)
    return {
        health: found.count(health)
        for health in (*HEALTHS, *sorted(set(found) - set(HEALTHS)))
        if health in found
    }


def _distinct(paths: Iterable[Edge]) -> list[Edge]:
    """Return one path of each way, relay and carrier; of two that differ in the round trip, the one that has it."""
    found: dict[tuple[str, str, str], Edge] = {}
    for path in paths:
        key = (str(path.way), path.via or "", path.carrier)
        if key not in found or found[key].rtt_ms is None:
            found[key] = path
    return [found[key] for key in sorted(found)]


def _way(path: str) -> Way:
    match path:
        case "direct":
            return "direct"
        case "forwarded" | "v1":
            return "forwarded"
        case "dialling":
            return "dialling"
        case _:
            return "unseen"


def _id(kind: Kind, name: str) -> str:
    return f"{kind}:{name}"
