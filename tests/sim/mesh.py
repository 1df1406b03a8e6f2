"""Relays, connectors and agents, each no more than its deciding modules with connections to the others.

What doing modules do beside (sockets, TLS, local programs) is left out; a carrier goes straight to its connector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address

from relay import commands as relay_commands
from relay.policy import Route, SrvEntry, SrvTable
from relay.rules import Rules
from relay.sessions import Sessions as RelaySessions
from sidecar.agent import commands as agent_commands
from sidecar.agent.commands import (
    LeaseIs,
    Move,
    Received,
    RelayDown,
    RelayUp,
    Release,
    Retry,
    Settle,
    Tick,
    Want,
)
from sidecar.agent.sessions import Sessions as AgentSessions
from sidecar.connector.flows import RelayConnection, SessionKey
from sidecar.connector.sessions import DETACHED_SECONDS, Sessions, standing
from sidecar.link.known import Complete, KnownFlows, WasReset, answer
from tests.sim.halves import Half
from tests.sim.weather import Connection, End, World, drizzle
from tests.support.identities import identity
from ztna.errors import Refused
from ztna.leases import Lease
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import build_udp, parse
from ztna.reasons import Reason
from ztna.wire import control, stream
from ztna.wire.control import Address, LeaseRef, Offering
from ztna.wire.datagram import service_packet, split_service_packet
from ztna.wire.stream import OpenedFrame, OpenFrame, OpenStatus, ResetFrame, ResumedFrame, ResumeFrame

RULES = Rules(per_identity=100, per_service=500, total=1_000)
HOLD_SECONDS = 600.0
TICK_SECONDS = 0.5
REDIAL_SECONDS_MAX = 2.0
RESUME_AGAIN_SECONDS = 0.5
AGENT_IP, AGENT_PORT, SERVICE_PORT = "10.0.0.1", 4000, 80
WINDOW = stream.WINDOW_BYTES_MIN


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
        routes = (Route(0, 1, ConnectorId("con-x")), Route(0, 1, ConnectorId("con-y")))
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


@dataclass
class Served:
    """A flow at its connector."""

    half: Half
    session: SessionKey
    attempt: int = 0
    carrier: End | None = None
    detached_at: float = 0.0


class Connector:
    """One connector whose backends echo, for all services."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh, self.id = mesh, ConnectorId(name)
        self.identity = identity(name, connector=mesh.services, id_name=name)
        self.sessions = Sessions()
        self.known: KnownFlows[Served] = KnownFlows()
        self.ended: dict[tuple[str, str], Served] = {}
        self._relays: dict[RelayConnection, End] = {}
        self._binds: dict[bytes, RelayConnection] = {}
        self._dials = 0
        mesh.world.every(TICK_SECONDS, self._tick)

    def dial(self, relay: RelayNode) -> None:
        """Connect to a relay, and again whenever that is lost."""
        self._dials += 1
        key, reader = (relay.name, self._dials), control.FrameReader()
        end = self.mesh.connect(self, relay)
        self._relays[key] = end

        def lost() -> None:
            del self._relays[key]
            self.sessions.connection_lost(key, self.mesh.world.now)
            self.mesh.soon(lambda: self.dial(relay))

        end.heard = lambda data: [self._hear(key, each) for each in reader.feed(data)]
        end.lost = lost
        end.send(control.encode(control.Hello()))

    def _hear(self, key: RelayConnection, message: object) -> None:
        end, world = self._relays[key], self.mesh.world
        match message:
            case control.Hello():
                offerings = tuple(Offering(each) for each in self.mesh.services)
                end.send(control.encode(control.Register(self.id, offerings)))
            case control.Offered():
                assert standing(message.lease, self.mesh.lease) == "current" and message.forwarder is not None
                session = self.sessions.admit(key, message)
                self._binds[bytes(message.forwarder.bind_id)] = key
                assert session.bind is not None
                end.send(control.encode(control.Accepted(message.session)))
            case control.Closed():
                over = self.sessions.close(key, message.session, message.reason, world.now)
                if over is not None:
                    self._end_flows(over.key)

    def _tick(self) -> None:
        now = self.mesh.world.now
        for session in self.sessions.expire(now):
            self._end_flows(session.key)
        for served in self.known.all_live():
            if served.carrier is None and now - served.detached_at >= DETACHED_SECONDS:
                self._reset(served)

    def _end_flows(self, session: SessionKey) -> None:
        for served in self.known.all_live():
            if served.session == session:
                self._reset(served)

    # Datagrams

    def packet(self, relay: RelayNode, bind_id: bytes, data: bytes) -> None:
        """Take a datagram of a link, and answer it on the link of the session that it belongs to."""
        connection = self._binds[bind_id]
        service, packet = split_service_packet(data)
        session = self.sessions.carried((connection, bind_id), ServiceName(service.decode()))
        if session is None:
            return
        found = parse(packet)
        self.mesh.arrived(session.agent.name, found.payload)
        answered = build_udp(
            found.destination, found.destination_port, found.source, found.source_port, found.payload
        )
        relay.forward(bind_id, service_packet(service, answered), self.mesh.to_agent)

    # Flows

    def carry(self, end: End, agent: Agent) -> None:
        """Take a stream carrier of an agent, by the name that its certificate proved."""
        reader, frames = stream.FrameReader(), list[Half]()

        def heard(data: bytes) -> None:
            for frame in reader.feed(data):
                if frames:
                    self._running(agent.name, end, frames[0], frame)
                elif (half := self._first(agent, end, frame)) is not None:
                    frames.append(half)

        end.heard, end.lost = heard, lambda: self._detach(end)

    def _first(self, agent: Agent, end: End, frame: stream.Frame) -> Half | None:
        assert isinstance(frame, OpenFrame | ResumeFrame)
        world, key = self.mesh.world, (agent.name, frame.flow)
        who = agent.name, agent.identity.fingerprint
        served = self.known.live(key)
        try:
            service = frame.service if isinstance(frame, OpenFrame) else None
            session = self.sessions.authorised(frame.session, service, *who)
        except Refused:
            return self._refuse(end, OpenedFrame(OpenStatus.DENIED, 0))
        if isinstance(frame, OpenFrame):
            served = Served(Half(world, None), session.key)
            assert self.known.begin(key, served, world.now), "dialled twice"
            end.send(stream.encode(OpenedFrame(OpenStatus.OK, WINDOW)))
            served.carrier = end
            served.half.ride(end.send, 0, frame.window)
            return served.half
        if served is None:
            ending = self.known.ended(key, world.now)
            if ending is None:
                return self._refuse(end, OpenedFrame(OpenStatus.UNKNOWN_FLOW, 0))
            return self._refuse(end, *answer(ending, frame))
        if frame.attempt <= served.attempt:
            return self._refuse(end)
        if served.carrier is not None:
            served.carrier.close()
        served.attempt, served.session, served.carrier = frame.attempt, session.key, end
        end.send(stream.encode(ResumedFrame(served.half.state.received_position, WINDOW)))
        served.half.ride(end.send, frame.received, frame.window)
        return served.half

    def _refuse(self, end: End, *frames: stream.Frame) -> None:
        for frame in frames:
            end.send(stream.encode(frame))
        end.close()

    def _running(self, agent: str, end: End, half: Half, frame: stream.Frame) -> None:
        found = [(key, each) for key, each in self._live() if each.half is half and each.carrier is end]
        for key, served in found:
            if isinstance(frame, ResetFrame):
                self._reset(served)
                return
            half.take(frame)
            if half.state.is_complete:
                state = half.state
                self.ended[key] = served
                self.known.finish(
                    key, Complete(state.sent_position, state.received_position), self.mesh.world.now
                )

    def _live(self) -> list[tuple[tuple[str, str], Served]]:
        return [(key, each) for key in self.mesh.flow_keys() if (each := self.known.live(key)) is not None]

    def _detach(self, end: End) -> None:
        for _, served in self._live():
            if served.carrier is end:
                served.carrier, served.detached_at = None, self.mesh.world.now
                served.half.stop()

    def _reset(self, served: Served) -> None:
        for key, each in self._live():
            if each is served:
                if served.carrier is not None:
                    served.carrier.send(stream.encode(ResetFrame(0)))
                    served.carrier.close()
                served.half.stop()
                self.ended[key] = served
                self.known.finish(key, WasReset(0), self.mesh.world.now)


@dataclass
class Flow:
    """A flow at its agent; `outcome` is how it ended."""

    number: int
    id: str
    service: ServiceName
    content: bytes
    half: Half
    session: agent_commands.Session | None = None
    connector: ConnectorId | None = None
    attempt: int = 0
    is_open: bool = False
    was_asked_for: bool = False
    carrier: End | None = None
    outcome: str = ""
    places: list[ConnectorId] = field(default_factory=list)


class Agent:
    """One agent and the programs on its host."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh, self.name = mesh, name
        self.identity = identity(name, agent=mesh.services)
        self.sessions = AgentSessions([each.name for each in mesh.relays], 1_000)
        self.flows: dict[int, Flow] = {}
        self.answered = 0
        self._relays: dict[str, End] = {}
        self._commands: deque[agent_commands.Command] = deque()
        self._is_acting = False
        self._wakes_at: float | None = None
        for service in mesh.services:
            self.handle(LeaseIs(service, mesh.lease_ref))

    def dial(self, relay: RelayNode) -> None:
        """Connect to a relay, and again whenever that is lost."""
        end, reader = self.mesh.connect(self, relay), control.FrameReader()

        def hear(message: object) -> None:
            if isinstance(message, control.Hello):
                self._relays[relay.name] = end
                self.handle(RelayUp(relay.name))
            elif not isinstance(message, control.UnknownMessage):
                self.handle(Received(relay.name, message))  # type: ignore[arg-type]

        def lost() -> None:
            if self._relays.pop(relay.name, None) is not None:
                self.handle(RelayDown(relay.name))
            self.mesh.soon(lambda: self.dial(relay))

        end.heard = lambda data: [hear(each) for each in reader.feed(data)]
        end.lost = lost
        end.send(control.encode(control.Hello()))

    def handle(self, event: agent_commands.Event) -> None:
        """Tell what happened, do what is decided in its order, and see that time is told, too."""
        self._commands.extend(self.sessions.handle(event, self.mesh.world.now))
        if self._is_acting:
            return
        self._is_acting = True
        while self._commands:
            self._do(self._commands.popleft())
        self._is_acting = False
        timer = self.sessions.next_timer()
        if timer is not None and (self._wakes_at is None or timer < self._wakes_at):
            self._wakes_at = timer
            self.mesh.world.after(max(0.0, timer - self.mesh.world.now), self._wake)

    def _wake(self) -> None:
        self._wakes_at = None
        self.handle(Tick())

    def _do(self, command: agent_commands.Command) -> None:
        match command:
            case agent_commands.Send(relay, message):
                if relay in self._relays:
                    self._relays[relay].send(control.encode(message))
            case agent_commands.Proceed(number, session):
                self._proceed(self.flows[number], session)
            case agent_commands.Fail(number, reason):
                self._end(self.flows[number], "reset" if self.flows[number].is_open else "failed")
            case agent_commands.Ended(session, reason):
                for flow in self._on(session):
                    if reason is Reason.PEER_GONE:
                        self._move(flow)
                    else:
                        self.handle(Release(flow.number))
                        self._end(flow, "reset")
            case agent_commands.ReadLease(service):
                self.mesh.soon(lambda: self.handle(LeaseIs(service, self.mesh.lease_ref)))
            case agent_commands.Leave() | agent_commands.RunOut():
                raise AssertionError("no relay drains, or says that it is silent")

    def _on(self, session: agent_commands.Session) -> list[Flow]:
        return [each for each in self.flows.values() if not each.outcome and each.session is session]

    # Datagrams

    def say(self, text: str) -> None:
        """Send a datagram that says who sent it, under some session that is open."""
        usable = [each for each in self.sessions.sessions if each.opened.forwarder is not None]
        if usable:
            session = self.mesh.world.chance.choice(usable)
            assert session.opened.forwarder is not None
            payload = f"{self.name} {text}".encode()
            packet = build_udp(AGENT_IP, AGENT_PORT, str(self.mesh.lease.ip), SERVICE_PORT, payload)
            data = service_packet(session.service.encode(), packet)
            self.mesh.relay(session.relay).forward(
                bytes(session.opened.forwarder.bind_id), data, partial(self.mesh.to_connector, session.relay)
            )

    # Lies

    def lie(self) -> None:
        """Speak of a session of somebody else: to its relay, and to its connector."""
        others = [each for agent in self.mesh.agents if agent is not self for each in agent.sessions.sessions]
        if not others:
            return
        session = self.mesh.world.chance.choice(others)
        if session.relay in self._relays:
            lie = control.Closed(session.opened.session, Reason.CLOSED_BY_PEER)
            self._relays[session.relay].send(control.encode(lie))
        number = len(self.flows)
        self.flows[number] = flow = Flow(number, "f" * 32, session.service, b"", Half(self.mesh.world, b""))
        end, reader = self.mesh.carrier(self, session.opened.connector_id), stream.FrameReader()
        flow.outcome = "lied"

        def told(data: bytes) -> None:
            for frame in reader.feed(data):
                assert frame == OpenedFrame(OpenStatus.DENIED, 0), "nobody opens in a session of another"
                self.mesh.lies_refused += 1

        end.heard = told
        end.send(stream.encode(self._open(flow, session)))

    # Flows

    def begin(self, service: ServiceName, content: bytes) -> None:
        """Have a program send this, hear it back, and close."""
        number = len(self.flows)
        flow_id = self.mesh.world.chance.randbytes(16).hex()
        self.flows[number] = Flow(number, flow_id, service, content, Half(self.mesh.world, content))
        self.handle(Want(number, service))

    def _proceed(self, flow: Flow, session: agent_commands.Session) -> None:
        flow.session = session
        connector = session.opened.connector_id
        is_anew = not flow.was_asked_for
        assert is_anew or connector == flow.connector, "a flow is moved to its own connector alone"
        flow.connector = connector
        self._drop(flow)
        end = flow.carrier = self.mesh.carrier(self, connector)
        reader = stream.FrameReader()
        end.heard = lambda data: [self._hear(flow, end, each) for each in reader.feed(data)]
        end.lost = lambda: flow.carrier is end and self._move(flow)
        if is_anew:
            flow.was_asked_for = True
            flow.places.append(connector)
            end.send(stream.encode(self._open(flow, session)))
        else:
            flow.attempt += 1
            received = flow.half.state.received_position
            end.send(
                stream.encode(ResumeFrame(session.opened.session, flow.id, flow.attempt, received, WINDOW))
            )

    def _open(self, flow: Flow, session: agent_commands.Session) -> OpenFrame:
        source, destination = Address(AGENT_IP, AGENT_PORT), Address(str(self.mesh.lease.ip), SERVICE_PORT)
        opened = session.opened.session
        return OpenFrame(opened, flow.id, flow.service, self.mesh.lease_ref, source, destination, WINDOW)

    def _hear(self, flow: Flow, end: End, frame: stream.Frame) -> None:
        if flow.outcome or flow.carrier is not end:
            return
        match frame:
            case OpenedFrame(OpenStatus.OK, window):
                self._settle(flow, end, 0, window)
            case ResumedFrame(received, window):
                self._settle(flow, end, received, window)
            case OpenedFrame(OpenStatus.UNKNOWN_FLOW) if not flow.is_open:
                # Its OPEN never came: it may begin anew, wherever.
                flow.was_asked_for, flow.session = False, None
                self._drop(flow)
                self.handle(Retry(flow.number, agent_commands.Cause.FAILED))
            case OpenedFrame():
                self._drop(flow)
                self.mesh.world.after(RESUME_AGAIN_SECONDS, lambda: flow.outcome or self._move(flow))
            case ResetFrame():
                self.handle(Release(flow.number))
                self._end(flow, "reset")
            case _:
                flow.half.take(frame)
        if flow.half.state.is_complete and not flow.outcome:
            self.handle(Release(flow.number))
            self._end(flow, "finished")

    def _settle(self, flow: Flow, end: End, received: int, window: int) -> None:
        flow.is_open = True
        self.handle(Settle(flow.number))
        flow.half.ride(end.send, received, window)

    def _move(self, flow: Flow) -> None:
        if flow.outcome:
            return
        self._drop(flow)
        assert flow.connector is not None
        self.handle(Move(flow.number, flow.connector, DETACHED_SECONDS))

    def _drop(self, flow: Flow) -> None:
        flow.half.stop()
        if flow.carrier is not None:
            flow.carrier.close()
            flow.carrier = None

    def _end(self, flow: Flow, outcome: str) -> None:
        flow.outcome = outcome
        if flow.carrier is not None and outcome == "reset":
            flow.carrier.send(stream.encode(ResetFrame(0)))
        self._drop(flow)


class Mesh:
    """Two relays, two connectors, three agents and one that lies, two services; and who may hear what."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.services = (ServiceName("web"), ServiceName("db"))
        self.lease = Lease(IPv4Address("10.100.0.2"), 7)
        self.lease_ref = LeaseRef(self.lease.ip, self.lease.epoch)
        self.delivered = 0
        self.control: list[Connection] = []
        self.carriers: list[Connection] = []
        self.relays = [RelayNode(self, name) for name in ("east", "west")]
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

    # Datagrams, by the bind id of the side that they come to

    def to_connector(self, relay: str, bind_id: bytes, data: bytes) -> None:
        """Bring a datagram to the connector whose side of a link this is."""
        for connector in self.connectors.values():
            if bind_id in connector._binds:
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
