"""A connector's end of stream carriers: accepting, dialling in at forwarders, what comes on them (protocol.md, Link).

Which flow an OPEN or RESUME gets is sidecar.link.served's, moving bytes sidecar.link.flow's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Collection

from sidecar.link.budget import Budget
from sidecar.link.carrier import ByteStream, FrameStream
from sidecar.link.quic_stream import QuicStream
from sidecar.link.served import Authority, ServedFlow, ServedFlows
from sidecar.link.stream import ALPN, FORWARDER_BOUND_SECONDS, dial_in_at
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.stall import LOOK_SECONDS
from ztna.telemetry import dropped, refused
from ztna.tls_tcp import SockAddr, notice_dead_peer, secure
from ztna.wire.stream import Frame, OpenFrame, PacketsFrame, ResetFrame, ResumeFrame, encode

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


class StreamListener:
    """A connector's end of all stream carriers: the link's TCP port, and dialling in at forwarders.

    `authority` says which flows an agent may have; its backend is dialled once for each (agent name, flow).
    `tasks` owns all that runs.
    """

    def __init__(
        self,
        credentials: Credentials,
        authority: Authority,
        *,
        tasks: asyncio.TaskGroup,
        budget: Budget,
        idle_s: float = CONNECTOR_IDLE_SECONDS,
        first_open_s: float = FIRST_OPEN_SECONDS,
    ) -> None:
        self.credentials = credentials  # may be replaced; carriers that stand keep theirs
        self.served = ServedFlows(authority, tasks=tasks, budget=budget)
        self.idle_s = idle_s
        self._tasks = tasks
        self._first_open_s = first_open_s
        self._listening: socket.socket | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._carriers: set[_Accepted] = set()
        self._looking: asyncio.TimerHandle | None = None
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

    def serve_stream(self, stream: QuicStream) -> None:
        """Serve the flows on a stream that an agent opened on its packet link."""
        if self._is_closed or len(self._carriers) >= CARRIERS_MAX:
            refused(_WHERE, Reason.DRAINING if self._is_closed else Reason.LIMIT_REACHED)
            stream.close()
        else:
            self._take(_Accepted(self, stream, None, self._first_open_s))

    def end_session(self, session: SessionId, agent: str, reason: Reason) -> None:
        """Reset the flows of an agent's session and close the carriers that only it may use."""
        self.served.end_session(session, agent, reason)
        for carrier in tuple(self._carriers):
            if carrier.frames.peer.name == agent and carrier.session == session:
                carrier.frames.finish(reason)

    def close_unowned(self, has_session: Callable[[str], bool], now: float) -> None:
        """Close carriers that idle while their agent (by name) has no live session: call it about once a second."""
        for carrier in tuple(self._carriers):
            carrier.close_if_unowned(has_session, now)

    def network_changed(self, held: Collection[str]) -> None:
        """Close the carriers on addresses that this host holds no more."""
        for carrier in tuple(self._carriers):
            carrier.frames.network_changed(held)

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
        self.served.close(reason)
        for carrier in tuple(self._carriers):
            carrier.frames.finish(reason)

    def carrier_ended(self, carrier: _Accepted) -> None:
        """Forget a carrier that is closed."""
        self._carriers.discard(carrier)

    def _take(self, carrier: _Accepted) -> None:
        self._carriers.add(carrier)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Find out, while there are carriers, which of them lead nowhere."""
        loop = asyncio.get_running_loop()
        for carrier in tuple(self._carriers):
            carrier.look(loop.time())
        self._looking = loop.call_later(LOOK_SECONDS, self._look) if self._carriers else None

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
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    dropped(_WHERE, "broken")  # as it waited (accept(2)); whoever is next is not
                    continue
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
            tls = await secure(
                sock,
                self.credentials,
                ALPN,
                server_side=True,
                timeout_s=self._first_open_s,
                dialled=session is not None,
            )
        except Refused as error:
            refused(_WHERE, error.reason)
            raise
        except OSError as error:
            sock.close()
            raise LinkError(f"the connection broke: {error.strerror or error}") from None
        if self._is_closed:
            tls.close()
            raise LinkError("the listener is closed")
        self._take(_Accepted(self, tls, session, deadline - time.monotonic()))


class _Accepted:
    """A connector's end of one carrier."""

    def __init__(
        self, listener: StreamListener, tls: ByteStream, session: SessionId | None, first_open_s: float
    ) -> None:
        self.session = session
        """The one session that it serves, when it came through a forwarder."""
        self.served: ServedFlow | None = None
        self.frames = FrameStream(tls, self._frame, self._ended)
        self._listener = listener
        self._unowned_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._idle_timer = self._loop.call_later(max(first_open_s, 0), self._idled)
        self.frames.start()

    def look(self, now: float) -> None:
        if self.served is not None or self.frames.flow is not None:
            self.frames.look(now)

    def close_if_unowned(self, has_session: Callable[[str], bool], now: float) -> None:
        if self.served is not None or has_session(self.frames.peer.name):
            self._unowned_since = None
        elif self._unowned_since is None:
            self._unowned_since = now
        elif now - self._unowned_since >= UNOWNED_SECONDS:
            self.frames.finish(Reason.NOT_YOUR_SESSION)

    def freed(self) -> None:
        """The flow has ended; the carrier may carry another if it is still open."""
        self.served = None
        if not self.frames.is_closed:
            self._idle_timer = self._loop.call_later(self._listener.idle_s, self._idled)

    def refuse(self, *answers: Frame) -> None:
        """Say that it carries nothing, and close."""
        self.served = None
        for frame in answers:
            self.frames.send(encode(frame))
        self.frames.finish(Reason.CLOSED_BY_PEER)

    def _idled(self) -> None:
        self.frames.finish(Reason.CLOSED_BY_PEER)

    def _frame(self, frame: Frame) -> None:
        if self.served is not None and self.served.is_over:
            self.served.settle()  # the flow ended and the next one's OPEN came in one read
        served = self.served
        if served is not None:
            if not isinstance(frame, ResetFrame):
                raise ProtocolError(f"{type(frame).__name__} before OPENED")
            served.given_up(frame.reason)
        elif isinstance(frame, OpenFrame):
            self._idle_timer.cancel()
            self._listener.served.open(self, frame)
        elif isinstance(frame, ResumeFrame):
            self._idle_timer.cancel()
            self._listener.served.resume(self, frame)
        elif isinstance(frame, PacketsFrame):
            self._idle_timer.cancel()
            self._listener.served.carry_packets(self, frame)
        else:
            raise ProtocolError(f"{type(frame).__name__} without a flow")

    def _ended(self, reason: Reason) -> None:
        self._idle_timer.cancel()
        if reason is Reason.MALFORMED:
            refused(_WHERE, reason)
        self._listener.carrier_ended(self)
        if self.served is not None:
            self.served.cut(reason)
