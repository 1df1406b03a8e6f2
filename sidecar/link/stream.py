"""Stream carriers between agent and connector: dialling, accepting, opening flows (protocol.md, Link: stream carrier).

The agent is always the TLS client. Which session and service a flow may have is the connector's `authorise`; which
carrier to use or keep is the agent's. Moving bytes is sidecar.link.flow's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from sidecar.link.budget import Budget, Share
from sidecar.link.carrier import FrameStream
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.resume import KnownFlows
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused, ZtnaError
from ztna.identity import Identity
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.telemetry import refused
from ztna.tls_tcp import SockAddr, TlsStream, connect, notice_dead_peer, secure
from ztna.wire.forwarder import BOUND_V4_BYTES, bound_bytes, decode, dial_in
from ztna.wire.stream import (
    Frame,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    ResetFrame,
    ResumeFrame,
    encode,
)

ALPN = "ztna-stream"
DIRECT_CONNECT_SECONDS = 0.25
FORWARDER_BOUND_SECONDS = 5.0
FIRST_OPEN_SECONDS = 5.0
OPENED_SECONDS = 15.0
CONNECTOR_IDLE_SECONDS = 90.0
UNOWNED_SECONDS = 3.0
"""How long an idle carrier outlives its agent's last session; protocol.md allows 5 s."""
HANDSHAKES_MAX = 256
CARRIERS_MAX = 8192
ACCEPTS_PER_TURN = 32
ACCEPT_PAUSE_SECONDS = 0.1
BACKLOG = 1024

_BOUND_START_BYTES = 13
_WHERE = "stream_carrier"


class FlowRefused(ZtnaError):
    """The connector (or the own budget) does not carry this flow; `status` is OPENED's."""

    def __init__(self, status: OpenStatus, detail: str = "") -> None:
        super().__init__(f"flow refused: {status.name.lower()}" + (f": {detail}" if detail else ""))
        self.status = status


class Carrier:
    """An agent's end of one stream carrier."""

    def __init__(self, tls: TlsStream, budget: Budget, *, forwarded: bool) -> None:
        self.forwarded = forwarded
        self.closed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self._budget = budget
        self._frames = FrameStream(tls, self._answered, self._ended)
        self._opening: asyncio.Future[OpenedFrame] | None = None
        self._starting: tuple[OpenFrame, Share, socket.socket] | None = None
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
        sock = await _dial_in(address, token, timeout_s)
        return await cls._secured(sock, credentials, check, budget, forwarded=True)

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
        return not self._frames.is_closed and self._frames.flow is None and self._opening is None

    @property
    def unacknowledged_bytes(self) -> int:
        """How many written bytes the other end's kernel has not acknowledged; for long: the path is dead."""
        return self._frames.unacknowledged_bytes

    async def open(self, frame: OpenFrame, local: socket.socket) -> TcpFlow:
        """Open a flow for a connected local socket, which belongs to the flow once this returns.

        The frame's window is replaced by what the budget gives. Raises FlowRefused, after which the carrier is
        closed and the local socket still the caller's, and LinkError when the carrier is not idle or breaks. When
        cancelled, the carrier is closed too.
        """
        if not self.is_idle:
            raise LinkError("the carrier is not idle")
        share = self._budget.open(self.peer.name)
        if share is None:
            refused(_WHERE, Reason.LIMIT_REACHED)
            raise FlowRefused(OpenStatus.DENIED, "this agent's flow memory is used up")
        frame = msgspec.structs.replace(frame, window=share.window)
        self._opening = asyncio.get_running_loop().create_future()
        self._starting = (frame, share, local)
        self._frames.send(encode(frame))
        try:
            async with asyncio.timeout(OPENED_SECONDS):
                opened = await self._opening
        except TimeoutError:
            self.close(Reason.PEER_GONE)
            raise LinkError(f"no answer to OPEN within {OPENED_SECONDS:g} s") from None
        finally:
            self._opening = None
            if self._starting is not None:  # nothing was started
                self._starting = None
                share.close()
                self._frames.send(encode(ResetFrame(0)))
                self._frames.finish(Reason.CLOSED_BY_PEER)
        if opened.status is not OpenStatus.OK:
            raise FlowRefused(opened.status)
        flow = self._frames.flow
        if flow is None or flow.opened is not frame:
            raise LinkError("the flow ended as it was opened")
        return flow

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

    def _answered(self, frame: Frame) -> None:
        opening = self._opening
        if not isinstance(frame, OpenedFrame) or opening is None or opening.done():
            raise ProtocolError(f"{type(frame).__name__} on an idle carrier")
        if frame.status is OpenStatus.OK and self._starting is not None:
            # Started here and not after the await: the flow's first DATA may be in this very read.
            opened, share, local = self._starting
            self._starting = None
            flow = self._frames.flow = TcpFlow(self._frames, opened, frame.window, share)
            flow.start(local)
        opening.set_result(frame)

    def _ended(self, reason: Reason) -> None:
        if reason is Reason.MALFORMED:
            refused(_WHERE, reason)
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(LinkError(f"the carrier closed before OPENED: {reason}"))
        if not self.closed.done():
            self.closed.set_result(reason)


Authorise = Callable[[Identity, OpenFrame], Awaitable[socket.socket]]


class StreamListener:
    """A connector's end of all stream carriers: the link's TCP port, and dialling in at forwarders.

    `authorise` checks one OPEN against sessions and grants and returns a socket that is connected to the backend, or
    raises FlowRefused. It is called once for each (agent name, flow); when the agent gives up it is cancelled.
    `tasks` owns all that runs.
    """

    def __init__(
        self,
        credentials: Credentials,
        authorise: Authorise,
        *,
        tasks: asyncio.TaskGroup,
        budget: Budget,
        idle_s: float = CONNECTOR_IDLE_SECONDS,
        first_open_s: float = FIRST_OPEN_SECONDS,
    ) -> None:
        self.credentials = credentials  # may be replaced; carriers that stand keep theirs
        self._authorise = authorise
        self._tasks = tasks
        self._budget = budget
        self._idle_s = idle_s
        self._first_open_s = first_open_s
        self._known = KnownFlows()
        self._listening: socket.socket | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._carriers: set[_Accepted] = set()
        self._is_closed = False

    def listen(self, address: SockAddr) -> SockAddr:
        """Bind and accept from now on; return the bound address. Raises OSError when it cannot be bound."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        self._listening = sock
        self._resume_accepting()
        bound: SockAddr = sock.getsockname()[:2]
        return bound

    async def carry(self, address: SockAddr, token: bytes, session: SessionId) -> None:
        """Dial in at a forwarder where an agent waits (`carry`), and serve that session's flows on it.

        Returns once the agent is authenticated. Raises LinkError, IdentityError.
        """
        sock = await _dial_in(address, token, FORWARDER_BOUND_SECONDS)
        await self._serve(sock, session)

    def flows(self) -> Iterator[TcpFlow]:
        """Yield the flows that run; each has `.opened` (session, service, ...), `.peer`, `.reset(reason)`."""
        for carrier in tuple(self._carriers):
            flow = carrier.frames.flow
            if flow is not None:
                yield flow

    def end_session(self, session: SessionId, agent: str, reason: Reason) -> None:
        """Reset the flows of an agent's session and close the carriers that only it may use."""
        for carrier in tuple(self._carriers):
            if carrier.frames.peer.name == agent:
                carrier.end_session(session, reason)

    def close_unowned(self, has_session: Callable[[str], bool], now: float) -> None:
        """Close carriers that idle while their agent (by name) has no live session: call it about once a second."""
        for carrier in tuple(self._carriers):
            carrier.close_if_unowned(has_session, now)

    def stop_accepting(self) -> None:
        """Take no new connection (drain); those that stand go on."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening = None

    def close(self, reason: Reason = Reason.DRAINING) -> None:
        """Stop, reset every flow and close every carrier."""
        self._is_closed = True
        self.stop_accepting()
        for task in self._handshakes:
            task.cancel()
        for carrier in tuple(self._carriers):
            carrier.shut(reason)

    def _resume_accepting(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        listening = self._listening
        for _ in range(ACCEPTS_PER_TURN):
            if listening is None:
                return
            try:
                sock, _address = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                refused(_WHERE, Reason.LIMIT_REACHED)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listening.fileno())
                loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting)
                return
            self._accepted(sock)

    def _accepted(self, sock: socket.socket) -> None:
        if len(self._handshakes) >= HANDSHAKES_MAX or len(self._carriers) >= CARRIERS_MAX:
            refused(_WHERE, Reason.LIMIT_REACHED)
            sock.close()
            return
        sock.setblocking(False)
        task = self._tasks.create_task(self._serve_direct(sock), name="stream carrier handshake")
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _serve_direct(self, sock: socket.socket) -> None:
        # Anybody can reach this port: what they do wrong is counted and ends with their connection.
        with contextlib.suppress(LinkError, Refused):
            await self._serve(sock, None)

    async def _serve(self, sock: socket.socket, session: SessionId | None) -> None:
        deadline = time.monotonic() + self._first_open_s
        try:
            notice_dead_peer(sock)
            tls = await secure(sock, self.credentials, ALPN, server_side=True, timeout_s=self._first_open_s)
        except Refused as error:
            refused(_WHERE, error.reason)
            raise
        except OSError as error:
            sock.close()
            raise LinkError(f"the connection broke: {error.strerror or error}") from None
        if self._is_closed:
            tls.close()
            raise LinkError("the listener is closed")
        self._carriers.add(_Accepted(self, tls, session, deadline - time.monotonic()))


class _Accepted:
    """A connector's end of one carrier."""

    def __init__(
        self, listener: StreamListener, tls: TlsStream, session: SessionId | None, first_open_s: float
    ) -> None:
        self.frames = FrameStream(tls, self._frame, self._ended)
        self._listener = listener
        self._session = session
        self._opening: asyncio.Task[None] | None = None
        self._opening_session: SessionId | None = None
        self._unowned_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._idle_timer = self._loop.call_later(max(first_open_s, 0), self._idled)
        self.frames.start()

    def end_session(self, session: SessionId, reason: Reason) -> None:
        flow = self.frames.flow
        if flow is not None and flow.opened.session == session:
            flow.reset(reason)
        elif session in (self._session, self._opening_session):
            # Also one whose backend is being dialled: what was allowed when that began is not any more.
            self.frames.finish(reason)

    def close_if_unowned(self, has_session: Callable[[str], bool], now: float) -> None:
        if self.frames.flow is not None or self._opening is not None or has_session(self.frames.peer.name):
            self._unowned_since = None
        elif self._unowned_since is None:
            self._unowned_since = now
        elif now - self._unowned_since >= UNOWNED_SECONDS:
            self.frames.finish(Reason.NOT_YOUR_SESSION)

    def shut(self, reason: Reason) -> None:
        flow = self.frames.flow
        if flow is not None:
            flow.reset(reason)
        else:
            self.frames.finish(reason)

    def _idled(self) -> None:
        self.frames.finish(Reason.CLOSED_BY_PEER)

    def _frame(self, frame: Frame) -> None:
        if self._opening is not None:
            if not isinstance(frame, ResetFrame):
                raise ProtocolError(f"{type(frame).__name__} before OPENED")
            self.frames.finish(Reason.CLOSED_BY_PEER)
        elif isinstance(frame, OpenFrame):
            self._idle_timer.cancel()
            self._opening_session = frame.session
            self._opening = self._listener._tasks.create_task(self._open(frame), name="open flow")
        elif isinstance(frame, ResumeFrame):
            # A flow ends here with its carrier, so none is known that could be resumed.
            self._refuse(OpenStatus.UNKNOWN_FLOW)
        else:
            raise ProtocolError(f"{type(frame).__name__} without a flow")

    async def _open(self, frame: OpenFrame) -> None:
        """Answer one OPEN; the flow's key is known from here on, whatever comes of it."""
        agent, known = self.frames.peer.name, self._listener._known
        if self._session is not None and frame.session != self._session:
            self._deny(Reason.NOT_YOUR_SESSION)
        elif not known.begin(agent, frame.flow, time.monotonic()):
            self._deny(Reason.MALFORMED)
        else:
            flow = await self._start(frame)
            if flow is None:
                known.finish(agent, frame.flow, time.monotonic())
            else:
                flow.finished.add_done_callback(lambda _: known.finish(agent, frame.flow, time.monotonic()))
                flow.finished.add_done_callback(self._flow_finished)
        self._opening = self._opening_session = None

    async def _start(self, frame: OpenFrame) -> TcpFlow | None:
        # The memory is had before the backend is dialled: a flow that cannot be carried disturbs nobody.
        share = self._listener._budget.open(self.frames.peer.name)
        if share is None:
            self._deny(Reason.LIMIT_REACHED)
            return None
        try:
            backend = await self._listener._authorise(self.frames.peer, frame)
        except FlowRefused as error:
            share.close()
            self._refuse(error.status)
            return None
        except BaseException:
            share.close()
            self._listener._known.finish(self.frames.peer.name, frame.flow, time.monotonic())
            raise
        if self.frames.is_closed:
            share.close()
            abort(backend)
            return None
        self.frames.send(encode(OpenedFrame(OpenStatus.OK, share.window)))
        flow = self.frames.flow = TcpFlow(self.frames, frame, frame.window, share)
        flow.start(backend)
        return flow

    def _flow_finished(self, finished: asyncio.Future[bool]) -> None:
        if finished.result() and not self.frames.is_closed:
            self._idle_timer = self._loop.call_later(self._listener._idle_s, self._idled)

    def _deny(self, reason: Reason) -> None:
        refused(_WHERE, reason)
        self._refuse(OpenStatus.DENIED)

    def _refuse(self, status: OpenStatus) -> None:
        self._opening = None  # it is what runs this
        self.frames.send(encode(OpenedFrame(status, 0)))
        self.frames.finish(Reason.CLOSED_BY_PEER)

    def _ended(self, reason: Reason) -> None:
        self._idle_timer.cancel()
        if reason is Reason.MALFORMED:
            refused(_WHERE, reason)
        if self._opening is not None:
            self._opening.cancel()
        self._listener._carriers.discard(self)


async def _dial_in(address: SockAddr, token: bytes, timeout_s: float) -> socket.socket:
    """Return a TCP connection that a forwarder has spliced to the other side. Raises LinkError."""
    sock = await connect(address, timeout_s)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
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
