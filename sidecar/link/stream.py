"""An agent's end of stream carriers: dialling, opening flows (protocol.md, Link: stream carrier).

Which carrier to use or keep is sidecar.agent's; the other end is sidecar.link.listener's; moving bytes is
sidecar.link.flow's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection

import msgspec

from sidecar.link.budget import Budget
from sidecar.link.carrier import ByteStream, FrameStream
from sidecar.link.flow import TcpFlow, reset_code
from sidecar.link.packet_stream import PacketStream
from sidecar.link.patience import patience
from sidecar.link.quic_stream import QuicStream
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused, ZtnaError
from ztna.identity import Identity
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.telemetry import refused
from ztna.tls_tcp import SockAddr, connect, secure
from ztna.wire.forwarder import BOUND_V4_BYTES, bound_bytes, decode, dial_in
from ztna.wire.stream import (
    Frame,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    PacketsFrame,
    ResetFrame,
    ResumedFrame,
    ResumeFrame,
    encode,
)

ALPN = "ztna-stream"
DIRECT_CONNECT_SECONDS = 0.25
FORWARDER_BOUND_SECONDS = 5.0
OPENED_SECONDS = 15.0

_BOUND_START_BYTES = 13
_WHERE = "stream_carrier"


class FlowRefused(ZtnaError):
    """The connector (or the own budget) does not carry this flow; `status` is OPENED's."""

    def __init__(self, status: OpenStatus, detail: str = "") -> None:
        super().__init__(f"flow refused: {status.name.lower()}" + (f": {detail}" if detail else ""))
        self.status = status


class OpenLost(LinkError):
    """The carrier broke before OPEN was answered: `flow` may have begun there, which its RESUME will tell."""

    def __init__(self, detail: str, flow: TcpFlow) -> None:
        super().__init__(detail)
        self.flow = flow


_Request = tuple[OpenFrame | ResumeFrame, TcpFlow] | tuple[PacketsFrame, PacketStream]


class Carrier:
    """An agent's end of one stream carrier."""

    def __init__(self, tls: ByteStream, budget: Budget, *, forwarded: bool, is_tcp: bool = True) -> None:
        self.forwarded = forwarded
        self.is_tcp = is_tcp
        """Whether it goes over TCP, and not over a packet link."""
        self.closed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self._budget = budget
        self._frames = FrameStream(tls, self._answered, self._ended)
        self._asked: _Request | None = None
        self._answer: asyncio.Future[OpenStatus] | None = None
        self._frames.start()

    @classmethod
    async def dial_direct(
        cls,
        address: SockAddr,
        credentials: Credentials,
        check: Callable[[Identity], None],
        *,
        budget: Budget,
        timeout_s: float = DIRECT_CONNECT_SECONDS,
    ) -> Carrier:
        """Connect to a connector's link address; `timeout_s` is for TCP alone.

        `check` raises for a connector that is not the one meant. Raises LinkError, IdentityError.
        """
        sock = await connect(address, timeout_s)
        return await cls._secured(sock, credentials, check, budget, forwarded=False)

    @classmethod
    async def dial_forwarder(
        cls,
        address: SockAddr,
        token: bytes,
        credentials: Credentials,
        check: Callable[[Identity], None],
        *,
        budget: Budget,
        timeout_s: float = FORWARDER_BOUND_SECONDS,
    ) -> Carrier:
        """Dial in at a forwarder with a `dial_token`, wait until the connector came too, then TLS through it.

        Such a carrier serves only the session that dialled it. Raises LinkError, IdentityError.
        """
        sock = await dial_in_at(address, token, timeout_s)
        return await cls._secured(sock, credentials, check, budget, forwarded=True)

    @classmethod
    def over_link(cls, stream: QuicStream, *, budget: Budget) -> Carrier:
        """Return a carrier on a stream of a packet link, whose ends have checked each other."""
        return cls(stream, budget, forwarded=False, is_tcp=False)

    @property
    def farewell(self) -> asyncio.Future[bool]:
        """Whether the connector has had all that was sent; known a while after the end."""
        return self._frames.farewell

    @property
    def peer(self) -> Identity:
        """The connector."""
        return self._frames.peer

    @property
    def peer_address(self) -> SockAddr:
        """Whom the TCP connection goes to: the connector, or the forwarder."""
        return self._frames.peer_address

    @property
    def is_idle(self) -> bool:
        """Whether it can carry a flow now."""
        return not self._frames.is_closed and self._frames.flow is None and self._answer is None

    def look(self, now: float) -> None:
        """Close when the way to the connector, or the forwarder, is dead; call it each LOOK_SECONDS."""
        if not self.is_idle:
            self._frames.look(now)

    def network_changed(self, held: Collection[str]) -> None:
        """Close when it stands on an address that this host holds no more."""
        self._frames.network_changed(held)

    def close_if_unheard(self) -> None:
        """Close when an answer is awaited and nobody says that the other end has heard what was asked.

        Its kernel acknowledges what it has; of a forwarded one the relay's does, which says nothing.
        """
        if self._answer is not None and (self.forwarded or self._frames.unacknowledged_bytes):
            self.close(Reason.PEER_GONE)

    async def open(self, frame: OpenFrame, local: socket.socket) -> TcpFlow:
        """Open a flow for a connected local socket, which belongs to the flow once this returns.

        The frame's window is replaced by what the budget gives. Raises FlowRefused, after which the carrier is
        closed and the local socket still the caller's, LinkError when the carrier is not idle, and OpenLost when it
        breaks; then the flow it names has the socket. When cancelled, the carrier is closed too.
        """
        if not self.is_idle:
            raise LinkError("the carrier is not idle")
        share = self._budget.open(self.peer.name)
        if share is None:
            refused(_WHERE, Reason.LIMIT_REACHED)
            raise FlowRefused(OpenStatus.DENIED, "this agent's flow memory is used up")
        frame = msgspec.structs.replace(frame, window=share.window)
        flow = TcpFlow(frame, self.peer, share, local)
        try:
            await self._ask((frame, flow))
        except LinkError as error:
            raise OpenLost(str(error), flow) from None
        except BaseException:
            if not flow.has_begun:
                flow.abandon()
            raise
        return flow

    async def resume(self, flow: TcpFlow, session: SessionId, attempt: int) -> None:
        """Go on with a detached flow; `attempt` is one higher than before, OPEN was 0.

        Raises FlowRefused and LinkError as `open`. When this returns the flow runs, or was reset by the connector.
        """
        if not self.is_idle:
            raise LinkError("the carrier is not idle")
        received, window = flow.state.received_position, flow.state.receive_window
        await self._ask((ResumeFrame(session, flow.opened.flow, attempt, received, window), flow))
        flow.session = session

    async def open_packets(self, frame: PacketsFrame, packets: PacketStream) -> None:
        """Carry a session's packets from now on, and nothing else. Raises FlowRefused and LinkError as `resume`."""
        if not self.is_idle:
            raise LinkError("the carrier is not idle")
        await self._ask((frame, packets))

    def close(self, reason: Reason = Reason.CLOSED_BY_PEER) -> None:
        """Close at once; a running flow is lost. Again is harmless."""
        self._frames.close(reason)

    @classmethod
    async def _secured(
        cls,
        sock: socket.socket,
        credentials: Credentials,
        check: Callable[[Identity], None],
        budget: Budget,
        *,
        forwarded: bool,
    ) -> Carrier:
        tls = await secure(sock, credentials, ALPN, server_side=False)
        try:
            check(tls.identity)
        except Refused as error:
            refused(_WHERE, error.reason)
            tls.close()
            raise
        return cls(tls, budget, forwarded=forwarded)

    async def _ask(self, asked: _Request) -> None:
        """Send the request and wait for its answer, upon which the flow is carried here."""
        self._answer = answer = asyncio.get_running_loop().create_future()
        self._asked = asked
        self._frames.send(encode(asked[0]))
        try:
            async with asyncio.timeout(OPENED_SECONDS):
                status = await answer
        except TimeoutError:
            self.close(Reason.PEER_GONE)
            raise LinkError(f"no answer within {OPENED_SECONDS:g} s") from None
        except asyncio.CancelledError:
            self._frames.send(encode(ResetFrame(0)))
            raise
        finally:
            self._answer = None
            if self._asked is not None:  # nothing was begun
                self._asked = None
                self._frames.finish(Reason.CLOSED_BY_PEER)
        if status is not OpenStatus.OK:
            raise FlowRefused(status)

    def _answered(self, frame: Frame) -> None:
        if self._asked is None:
            raise ProtocolError(f"{type(frame).__name__} on an idle carrier")
        request, flow = self._asked
        status = OpenStatus.OK
        # Carried from here and not after the await: the flow's first DATA may be in this very read.
        match frame, request, flow:
            case OpenedFrame(OpenStatus.OK, window), OpenFrame(), TcpFlow():
                self._asked = None
                self._frames.carry(flow, 0, window)
            case OpenedFrame(OpenStatus.OK), PacketsFrame(), PacketStream():
                self._asked = None
                self._frames.carry_packets(flow)
            case ResumedFrame(received, window), ResumeFrame(), TcpFlow():
                self._resumed(flow, received, window)
            case ResetFrame(), ResumeFrame(), TcpFlow():
                flow.frame_received(frame)
            case OpenedFrame(), _, _ if frame.status is not OpenStatus.OK:
                status = frame.status
            case _:
                raise ProtocolError(f"{type(frame).__name__} in answer to {type(request).__name__}")
        self._settle(status)

    def _settle(self, status: OpenStatus) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def _resumed(self, flow: TcpFlow, received: int, window: int) -> None:
        if flow.owes_reset:
            flow.owes_reset = False
            self._settle(OpenStatus.OK)  # before the end of the carrier does
            self._frames.send(encode(ResetFrame(reset_code(None))))
            self._frames.finish(Reason.CLOSED_BY_PEER)
            return
        self._asked = None
        try:
            self._frames.carry(flow, received, window)
        except ProtocolError:
            self._frames.send(encode(ResetFrame(reset_code(Reason.MALFORMED))))
            self._frames.finish(Reason.MALFORMED)
            flow.reset(Reason.MALFORMED)

    def _ended(self, reason: Reason) -> None:
        if reason is Reason.MALFORMED:
            refused(_WHERE, reason)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LinkError(f"the carrier closed before the answer: {reason}"))
        if not self.closed.done():
            self.closed.set_result(reason)


async def dial_in_at(address: SockAddr, token: bytes, timeout_s: float) -> socket.socket:
    """Return a TCP connection that a forwarder has spliced to the other side. Raises LinkError."""
    sock = await connect(address, timeout_s)
    loop = asyncio.get_running_loop()
    try:
        async with patience(timeout_s):
            await loop.sock_sendall(sock, dial_in(token))
            start = await _read_exactly(sock, _BOUND_START_BYTES)
            decode(start + await _read_exactly(sock, bound_bytes(start) - len(start)))
    except TimeoutError:
        sock.close()
        raise LinkError(f"forwarder {address[0]}:{address[1]} did not bind within {timeout_s:g} s") from None
    except (OSError, ProtocolError) as error:
        sock.close()
        raise LinkError(f"forwarder {address[0]}:{address[1]}: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read so many bytes and not one more: the next belong to TLS."""
    got = b""
    while len(got) < size:
        more = await asyncio.get_running_loop().sock_recv(sock, size - len(got))
        if not more:
            raise ProtocolError("closed the connection before it was bound")
        got += more
    return got


assert _BOUND_START_BYTES < BOUND_V4_BYTES
