"""A connector: its sessions, the flows it knows, and backends that echo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar.connector.flows import RelayConnection, SessionKey
from sidecar.connector.sessions import DETACHED_SECONDS, Sessions, standing
from sidecar.link.known import Complete, KnownFlows, WasReset, answer
from tests.sim.halves import Half
from tests.sim.weather import End
from tests.support.identities import identity
from ztna.errors import Refused
from ztna.names import ConnectorId, ServiceName
from ztna.packet import build_udp, parse
from ztna.wire import control, stream
from ztna.wire.control import Offering
from ztna.wire.datagram import service_packet, split_service_packet
from ztna.wire.stream import OpenedFrame, OpenFrame, OpenStatus, ResetFrame, ResumedFrame, ResumeFrame

if TYPE_CHECKING:
    from tests.sim.agents import Agent
    from tests.sim.mesh import Mesh
    from tests.sim.relays import RelayNode


TICK_SECONDS = 0.5
WINDOW = stream.WINDOW_BYTES_MIN


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
        for session in (*self.sessions.live(), *self.sessions.detached()):
            assert session.bind is not None
            assert self.sessions.carried(session.bind, session.service), (
                "a link carries what its sessions are for"
            )
        for served in self.known.all_live():
            if served.carrier is None and now - served.detached_at >= DETACHED_SECONDS:
                self._reset(served)

    def _end_flows(self, session: SessionKey) -> None:
        for served in self.known.all_live():
            if served.session == session:
                self._reset(served)

    # Datagrams

    def has_side(self, bind_id: bytes) -> bool:
        """Say whether this is our side of a link."""
        return bind_id in self._binds

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
