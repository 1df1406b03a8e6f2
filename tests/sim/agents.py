"""An agent: its sessions, and the programs on its host; and one that speaks of what is not its own."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sidecar.agent import commands as agent_commands
from sidecar.agent.commands import (
    LeaseIs,
    Measured,
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
from sidecar.connector.sessions import DETACHED_SECONDS
from tests.sim.halves import Half
from tests.sim.weather import End
from tests.support.identities import identity
from ztna.names import ConnectorId, ServiceName
from ztna.packet import build_udp
from ztna.reasons import Reason
from ztna.wire import control, stream
from ztna.wire.control import Address
from ztna.wire.datagram import service_packet
from ztna.wire.stream import OpenedFrame, OpenFrame, OpenStatus, ResetFrame, ResumedFrame, ResumeFrame

if TYPE_CHECKING:
    from tests.sim.mesh import Mesh
    from tests.sim.relays import RelayNode


RESUME_AGAIN_SECONDS = 0.5
MEASURED_EVERY_SECONDS = 2.0
AGENT_IP, AGENT_PORT, SERVICE_PORT = "10.0.0.1", 4000, 80
WINDOW = stream.WINDOW_BYTES_MIN


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
        mesh.world.every(MEASURED_EVERY_SECONDS, self.measure)
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
                self.mesh.retired += isinstance(message, control.Retired)
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
        self._check()
        timer = self.sessions.next_timer()
        if timer is not None and (self._wakes_at is None or timer < self._wakes_at):
            self._wakes_at = timer
            self.mesh.world.after(max(0.0, timer - self.mesh.world.now), self._wake)

    def _check(self) -> None:
        """See that sessions end with what they are for: no flow is forgotten, and none uses what has ended."""
        held = self.sessions._held
        used = Counter(key for flow in held.flows.values() for key in (flow.session, *flow.former) if key)
        for key, live in held.live.items():
            assert live.uses == used.pop(key, 0)
            assert live.uses or live.retired is None, "nothing new may use it, and nothing does: it is over"
            assert live.uses or key in held.unused, "one that idles is known to idle"
        assert not used.keys() & held.live.keys()

    def measure(self) -> None:
        """Tell how near the relays are."""
        for relay in self._relays:
            self.handle(Measured(relay, self.mesh.distances[relay]))

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
            case agent_commands.RunOut():
                pass  # a TCP flow may finish there
            case agent_commands.Leave():
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
