"""A relay: its sessions, who is connected, and the pairs that its forwarder copies between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from relay import commands as relay_commands
from relay.policy import Route, SrvEntry, SrvTable
from relay.rules import Rules
from relay.sessions import Sessions as RelaySessions
from tests.sim.weather import Connection, End, drizzle
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address

if TYPE_CHECKING:
    from tests.sim.agents import Agent
    from tests.sim.connectors import Connector
    from tests.sim.mesh import Mesh


RULES = Rules(per_identity=100, per_service=500, total=1_000, leaving="move", leave_grace_s=1.0)
HOLD_SECONDS = 600.0
TICK_SECONDS = 0.5


class RelayNode:
    """One relay: who is connected, and the forwarder's pairs of bind ids."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh, self.name = mesh, name
        self.sessions = self._fresh()
        self._ends: dict[int, End] = {}
        self._connections: dict[int, Connection] = {}
        self._links: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self._numbers = 0
        mesh.world.every(TICK_SECONDS, self._tick)

    def _fresh(self) -> RelaySessions:
        return RelaySessions(RULES, self.mesh.world.chance.randbytes)

    def accept(self, connection: Connection, who: Agent | Connector) -> None:
        """Take a connection of somebody whose certificate is good."""
        self._numbers += 1
        key, end, reader = self._numbers, connection.ends[1], control.FrameReader()
        self._ends[key], self._connections[key] = end, connection
        self._do(self.sessions.connected(key, who.identity, Address("192.0.2.1", 4434)))
        end.heard = lambda data: [self._hear(key, each) for each in reader.feed(data)]
        end.lost = lambda: self._lost(key)

    def crash(self) -> None:
        """Lose everything, and be there again at once."""
        for connection in self._connections.values():
            connection.cut()
        self._ends.clear()
        self._connections.clear()
        self._links.clear()
        self.sessions = self._fresh()

    def forward(self, bind_id: bytes, data: bytes, deliver: Callable[[bytes, bytes], object]) -> None:
        """Copy a datagram to the other side of its link, if there is one."""
        for sides in self._links.values():
            if bind_id in sides:
                other = sides[1 - sides.index(bind_id)]
                drizzle(self.mesh.world, partial(deliver, other, data))

    def _hear(self, key: int, message: control.AnyMessage | control.UnknownMessage) -> None:
        if key in self._ends and not isinstance(message, control.UnknownMessage):
            self._do(self.sessions.message(key, message, self.mesh.world.now))

    def _lost(self, key: int) -> None:
        if self._ends.pop(key, None) is not None:
            del self._connections[key]
            self._do(self.sessions.disconnected(key, Reason.PEER_GONE, self.mesh.world.now))

    def _tick(self) -> None:
        now = self.mesh.world.now
        routes = tuple(Route(0, 1, each) for each in sorted(self.mesh.connectors.keys() - self.mesh.unlisted))
        entries = {service: SrvEntry(routes, now) for service in self.mesh.services}
        self._do(self.sessions.policy_changed(SrvTable(entries, {"": now}, HOLD_SECONDS), now))
        self._do(self.sessions.tick(now))
        while self.sessions.has_news:
            self._do(self.sessions.tell(now))

    def _do(self, commands: Iterable[relay_commands.Command]) -> None:
        for each in commands:
            match each:
                case relay_commands.Send(to, message):
                    self._ends[to].send(control.encode(message))
                case relay_commands.SendHealth(to, news):
                    for message in news:
                        self._ends[to].send(control.encode(message))
                case relay_commands.AddLink(link, agent, connector):
                    self._links[link] = agent.bind_id, connector.bind_id
                case relay_commands.RemoveLink(link):
                    del self._links[link]
                case relay_commands.Refusal(reason=Reason.NOT_YOUR_SESSION):
                    assert each.name == self.mesh.liar.name, f"{each} is no lie"
                    self.mesh.lies_refused += 1
        carried = {each.link for each in self.sessions.sessions.values()}
        assert self._links.keys() == carried, "a link is there from its first session to its last"
