"""A connector's TCP flows, from OPEN on: dialled once, carried, detached, resumed, remembered (Link: Once only).

    dialling --backend answered--> carried --carrier broke--> detached --DETACHED_SECONDS--> (reset)
                                      ^                          |
                                      +----------RESUME----------+

Who may open or resume is the caller's `Authority`; how flows that ended are answered sidecar.link.known's.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from sidecar.link.budget import Budget, Share
from sidecar.link.carrier import BREAKING, FrameStream
from sidecar.link.flow import TcpFlow, reset_code
from sidecar.link.known import Ending, FlowKey, KnownFlows, Refused, WasReset, answer
from sidecar.link.packet_stream import PacketStream
from sidecar.link.stream import FlowRefused
from ztna.errors import ProtocolError
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.telemetry import TCP_FLOWS, logger, refused
from ztna.wire.stream import (
    WINDOW_BYTES_MIN,
    Frame,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    PacketsFrame,
    ResetFrame,
    ResumedFrame,
    ResumeFrame,
)

DETACHED_SECONDS = 30.0
_WHERE = "stream_carrier"

_log = logger(__name__)


class Authority(Protocol):
    """Says what an agent may do; each raises FlowRefused."""

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        """Return a socket connected to the backend of a new flow. Cancelled when the agent gives up."""

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        """Check the session of a RESUME; `service` is the flow's, None when no such flow lives."""

    def packets(self, peer: Identity, frame: PacketsFrame) -> PacketStream:
        """Return what takes the packets of a session."""


class AcceptedCarrier(Protocol):
    """What a flow needs of a connector's end of a carrier."""

    frames: FrameStream
    session: SessionId | None
    served: ServedFlow | None

    def refuse(self, *answers: Frame) -> None:
        """Say that it carries nothing, and close."""

    def freed(self) -> None:
        """The flow has ended."""


class ServedFlows:
    """All flows of one connector. `tasks` owns the dialling of backends."""

    def __init__(self, authority: Authority, *, tasks: asyncio.TaskGroup, budget: Budget) -> None:
        self.authority = authority
        self.began: Callable[[TcpFlow], object] = lambda flow: None
        """Called with each flow once its backend is dialled; `finished` tells of its end."""
        self.known: KnownFlows[ServedFlow] = KnownFlows()
        self._tasks = tasks
        self._budget = budget

    def open(self, carrier: AcceptedCarrier, frame: OpenFrame) -> None:
        """Answer an OPEN, once the backend did; the flow's key is known from here on, whatever comes of it."""
        peer = carrier.frames.peer
        key = (peer.name, frame.flow)
        if carrier.session not in (None, frame.session):
            _deny(carrier, Reason.NOT_YOUR_SESSION)
            return
        served = ServedFlow(self, carrier, frame)
        if not self.known.begin(key, served, time.monotonic()):
            _deny(carrier, Reason.MALFORMED)
            return
        # The memory is had before the backend is dialled: a flow that cannot be carried disturbs nobody.
        share = self._budget.open(peer.name)
        if share is None:
            self.known.finish(key, Refused(OpenStatus.DENIED), time.monotonic())
            _deny(carrier, Reason.LIMIT_REACHED)
            return
        carrier.served = served
        served.start(self._tasks, peer, share)

    def resume(self, carrier: AcceptedCarrier, frame: ResumeFrame) -> None:
        """Answer a RESUME. Whose flow it is the certificate says: another agent's is one that nobody knows."""
        peer = carrier.frames.peer
        key = (peer.name, frame.flow)
        served = self._living(key)
        if carrier.session not in (None, frame.session):
            _deny(carrier, Reason.NOT_YOUR_SESSION)
            return
        try:
            self.authority.resume(peer, frame, served.opened.service if served is not None else None)
        except FlowRefused as error:
            carrier.refuse(OpenedFrame(error.status, 0))
            return
        if served is None:
            ended = self.known.ended(key, time.monotonic())
            unknown = (OpenedFrame(OpenStatus.UNKNOWN_FLOW, 0),)
            carrier.refuse(*(answer(ended, frame) if ended is not None else unknown))
        elif frame.attempt <= served.attempt:
            _deny(carrier, Reason.MALFORMED)
        else:
            served.resume(carrier, frame)

    def carry_packets(self, carrier: AcceptedCarrier, frame: PacketsFrame) -> None:
        """Answer PACKETS: the carrier carries that session's packets from now on, if they may pass."""
        if carrier.session not in (None, frame.session):
            _deny(carrier, Reason.NOT_YOUR_SESSION)
            return
        try:
            packets = self.authority.packets(carrier.frames.peer, frame)
        except FlowRefused as error:
            carrier.refuse(OpenedFrame(error.status, 0))
        else:
            carrier.frames.carry_packets(packets, OpenedFrame(OpenStatus.OK, WINDOW_BYTES_MIN))

    def flows(self) -> Iterator[TcpFlow]:
        """Yield the flows that run, detached ones too; each has `.session`, `.opened`, `.peer`, `.reset(reason)`."""
        for served in self.known.all_live():
            if served.flow is not None:
                yield served.flow

    def end_session(self, session: SessionId, agent: str, reason: Reason) -> None:
        """Reset the flows of an agent's session."""
        for served in self.known.all_live():
            if (served.session, served.agent) == (session, agent):
                served.end(reason)

    def close(self, reason: Reason) -> None:
        """Reset every flow."""
        for served in self.known.all_live():
            served.end(reason)

    def _living(self, key: FlowKey) -> ServedFlow | None:
        served = self.known.live(key)
        if served is not None and served.is_over:
            served.settle()  # in this very turn: its callback is yet to come
            return None
        return served


class ServedFlow:
    """One flow of an agent."""

    def __init__(self, flows: ServedFlows, carrier: AcceptedCarrier, opened: OpenFrame) -> None:
        self.opened = opened
        self.agent = carrier.frames.peer.name
        self.session = opened.session
        self.attempt = 0
        self.flow: TcpFlow | None = None
        self._flows = flows
        self._carrier: AcceptedCarrier | None = carrier
        self._request: OpenFrame | ResumeFrame = opened
        self._timer: asyncio.TimerHandle | None = None
        self._share: Share | None = None
        self._dialling: asyncio.Task[None] | None = None

    def start(self, tasks: asyncio.TaskGroup, peer: Identity, share: Share) -> None:
        """Have the backend dialled. Whatever carries the flow by then gets the answer."""
        self._share = share
        self._dialling = tasks.create_task(self._dial(peer, share), name="open flow")

    def resume(self, carrier: AcceptedCarrier, frame: ResumeFrame) -> None:
        """Go on upon this carrier; the old one is dropped unread."""
        old, self._carrier = self._carrier, carrier
        if old is not None:
            old.served = None
            old.frames.close(Reason.PEER_GONE)
        self._stop_waiting()
        self.attempt, self.session, self._request = frame.attempt, frame.session, frame
        carrier.served = self
        TCP_FLOWS.labels("resumed").inc()
        if self.flow is not None:
            self.flow.session = frame.session
            self._begin()

    def cut(self, reason: Reason) -> None:
        """Its carrier is closed: wait for another, unless the agent has done wrong."""
        self._carrier = None
        if self.flow is None and reason not in BREAKING:
            self.given_up(reset_code(reason))
        elif not self.is_over:
            TCP_FLOWS.labels("detached").inc()
            _log.info("flow_detached", agent=self.agent, service=self.opened.service, flow=self.opened.flow)
            self._timer = asyncio.get_running_loop().call_later(DETACHED_SECONDS, self._forsaken)

    def given_up(self, code: int) -> None:
        """The agent sent RESET before there was an answer."""
        self._give_up(WasReset(code))

    def end(self, reason: Reason) -> None:
        """Reset it, or refuse it when its backend is still being dialled."""
        if self.flow is not None:
            self.flow.reset(reason)
        else:
            self._give_up(Refused(OpenStatus.DENIED), OpenedFrame(OpenStatus.DENIED, 0))

    @property
    def is_over(self) -> bool:
        """Whether it began and has ended."""
        return self.flow is not None and self.flow.finished.done()

    def settle(self) -> None:
        """Remember how the flow ended; again is harmless."""
        assert self.flow is not None
        if self._flows.known.live(self._key) is self:
            self._flows.known.finish(self._key, self.flow.ending, time.monotonic())
            self._stop_waiting()
            if self._carrier is not None:
                self._carrier.freed()

    @property
    def _key(self) -> FlowKey:
        return self.agent, self.opened.flow

    async def _dial(self, peer: Identity, share: Share) -> None:
        try:
            backend = await self._flows.authority.open(peer, self.opened)
        except FlowRefused as error:
            self._give_up(Refused(error.status), OpenedFrame(error.status, 0))
        else:
            self.flow = TcpFlow(self.opened, peer, share, backend)
            self.flow.session = self.session
            self._flows.began(self.flow)
            self.flow.finished.add_done_callback(lambda _: self.settle())
            self._begin()

    def _begin(self) -> None:
        """Answer OPEN or RESUME and carry the flow."""
        if self._carrier is None:
            return
        assert self.flow is not None
        frames, window = self._carrier.frames, self.flow.state.receive_window
        try:
            if isinstance(self._request, OpenFrame):
                frames.carry(self.flow, 0, self._request.window, OpenedFrame(OpenStatus.OK, window))
            else:
                resumed = ResumedFrame(self.flow.state.received_position, window)
                frames.carry(self.flow, self._request.received, self._request.window, resumed)
        except ProtocolError as error:
            refused(_WHERE, Reason.MALFORMED)
            _log.warning("resume_malformed", agent=self.agent, flow=self.opened.flow, detail=error)
            self._carrier.refuse(ResetFrame(reset_code(Reason.MALFORMED)))
            self._carrier = None
            self.flow.reset(Reason.MALFORMED)

    def _give_up(self, ending: Ending, *answers: Frame) -> None:
        """End what has not begun."""
        if self._dialling is not None and self._dialling is not asyncio.current_task():
            self._dialling.cancel()
        if self._share is not None:
            self._share.close()
        self._flows.known.finish(self._key, ending, time.monotonic())
        self._stop_waiting()
        if self._carrier is not None:
            self._carrier.refuse(*answers)

    def _forsaken(self) -> None:
        TCP_FLOWS.labels("forsaken").inc()
        if self.flow is not None:
            self.flow.reset(Reason.PEER_GONE)
        else:
            self._give_up(WasReset(reset_code(Reason.PEER_GONE)))

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _deny(carrier: AcceptedCarrier, reason: Reason) -> None:
    refused(_WHERE, reason)
    carrier.refuse(OpenedFrame(OpenStatus.DENIED, 0))
