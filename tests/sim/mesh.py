"""Relays, connectors and agents, each no more than its deciding modules with connections to the others.

What doing modules do beside (sockets, TLS, local programs) is left out; a carrier goes straight to its connector.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

from tests.sim.agents import Agent
from tests.sim.connectors import Connector
from tests.sim.relays import RelayNode
from tests.sim.weather import Connection, End, World
from ztna.leases import Lease
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import parse
from ztna.wire.control import LeaseRef
from ztna.wire.datagram import split_service_packet

REDIAL_SECONDS_MAX = 2.0


class Mesh:
    """Two relays, two connectors, three agents and one that lies, two services; and who may hear what."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.services = (ServiceName("web"), ServiceName("db"))
        self.lease = Lease(IPv4Address("10.100.0.2"), 7)
        self.lease_ref = LeaseRef(self.lease.ip, self.lease.epoch)
        self.delivered = self.retired = 0
        self.unlisted: set[ConnectorId] = set()
        """The connectors that DNS does not name now."""
        self.distances = {"east": 0.01, "west": 0.02}
        """How far the relays are, in seconds."""
        self.control: list[Connection] = []
        self.carriers: list[Connection] = []
        self.relays = [RelayNode(self, name) for name in self.distances]
        self.connectors = {each: Connector(self, each) for each in ("con-x", "con-y")}
        self.agents = [Agent(self, name) for name in ("ann", "bob", "cem")]
        self.liar = Agent(self, "eve")
        self.lies_refused = 0
        for who in (*self.connectors.values(), *self.agents, self.liar):
            for relay in self.relays:
                who.dial(relay)

    def relay(self, name: str) -> RelayNode:
        """Return a relay by its name."""
        return next(each for each in self.relays if each.name == name)

    def connect(self, who: Agent | Connector, relay: RelayNode) -> End:
        """Return the dialler's end of a new control connection."""
        connection = Connection(self.world)
        self.control = [*(each for each in self.control if not each.is_over), connection]
        relay.accept(connection, who)
        return connection.ends[0]

    def carrier(self, agent: Agent, connector: ConnectorId) -> End:
        """Return the agent's end of a new stream carrier."""
        connection = Connection(self.world)
        self.carriers = [*(each for each in self.carriers if not each.is_over), connection]
        self.connectors[connector].carry(connection.ends[1], agent)
        return connection.ends[0]

    def soon(self, act: Callable[[], object]) -> None:
        """Do something in a moment."""
        self.world.after(self.world.chance.uniform(0.1, REDIAL_SECONDS_MAX), act)

    def flow_keys(self) -> list[tuple[str, str]]:
        """Return every flow that ever was, as connectors know it."""
        return [(agent.name, flow.id) for agent in self.agents for flow in agent.flows.values()]

    def unlist(self, seconds: float) -> None:
        """Have DNS not name a connector for a while."""
        connector = self.world.chance.choice(sorted(self.connectors))
        self.unlisted.add(connector)
        self.world.after(seconds, lambda: self.unlisted.discard(connector))

    def turn(self) -> None:
        """Have the nearest relay be the farthest, and the other way round."""
        near, far = self.distances
        self.distances = {near: self.distances[far], far: self.distances[near]}

    # Datagrams, by the bind id of the side that they come to

    def to_connector(self, relay: str, bind_id: bytes, data: bytes) -> None:
        """Bring a datagram to the connector whose side of a link this is."""
        for connector in self.connectors.values():
            if connector.has_side(bind_id):
                connector.packet(self.relay(relay), bind_id, data)

    def to_agent(self, bind_id: bytes, data: bytes) -> None:
        """Bring an answer to the agent whose side of a link this is."""
        for agent in self.agents:
            for session in agent.sessions.sessions:
                forwarder = session.opened.forwarder
                if forwarder is not None and bytes(forwarder.bind_id) == bind_id:
                    self.arrived(agent.name, parse(split_service_packet(data)[1]).payload)
                    agent.answered += 1
                    return

    def arrived(self, owner: str, payload: bytes) -> None:
        """Note a datagram that came for an agent, or as one of it; it says itself whose it is."""
        assert payload.decode().split(" ")[0] == owner, f"{payload!r} came as one of {owner}"
        self.delivered += 1

    # The end

    def session_ids(self) -> dict[str, set[tuple[str, SessionId]]]:
        """Return what relays, agents and connectors take for live sessions: all should say the same."""
        return {
            "relays": {(relay.name, each) for relay in self.relays for each in relay.sessions.sessions},
            "agents": {
                (each.relay, each.opened.session) for agent in self.agents for each in agent.sessions.sessions
            },
            "connectors": {
                (each.key[0][0], each.key[1])
                for connector in self.connectors.values()
                for each in connector.sessions.live()
            },
        }
