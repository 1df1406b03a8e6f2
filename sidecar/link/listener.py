"""A connector's end of stream carriers: accepting, dialling in at forwarders, answering OPEN (protocol.md, Link).

Which session and service a flow may have is `authorise`'s; moving bytes is sidecar.link.flow's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

from sidecar.link.budget import Budget
from sidecar.link.carrier import FrameStream
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.resume import KnownFlows
from sidecar.link.stream import ALPN, FORWARDER_BOUND_SECONDS, FlowRefused, dial_in_at
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused
from ztna.identity import Identity
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.telemetry import refused
from ztna.tls_tcp import SockAddr, TlsStream, notice_dead_peer, secure
from ztna.wire.stream import Frame, OpenedFrame, OpenFrame, OpenStatus, ResetFrame, ResumeFrame, encode

FIRST_OPEN_SECONDS = 5.0
CONNECTOR_IDLE_SECONDS = 90.0
UNOWNED_SECONDS = 3.0
"""How long an idle carrier outlives its agent's last session; protocol.md allows 5 s."""
HANDSHAKES_MAX = 256
CARRIERS_MAX = 8192
ACCEPTS_PER_TURN = 32
ACCEPT_PAUSE_SECONDS = 0.1
BACKLOG = 1024

_WHERE = "stream_carrier"

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
        sock = await dial_in_at(address, token, FORWARDER_BOUND_SECONDS)
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
