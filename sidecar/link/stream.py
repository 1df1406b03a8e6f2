"""An agent's end of stream carriers: dialling, opening flows (protocol.md, Link: stream carrier).

Which carrier to use or keep is sidecar.agent's; the other end is sidecar.link.listener's; moving bytes is
sidecar.link.flow's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import msgspec

from sidecar.link.budget import Budget, Share
from sidecar.link.carrier import FrameStream
from sidecar.link.flow import TcpFlow
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused, ZtnaError
from ztna.identity import Identity
from ztna.reasons import Reason
from ztna.telemetry import refused
from ztna.tls_tcp import SockAddr, TlsStream, connect, secure
from ztna.wire.forwarder import BOUND_V4_BYTES, bound_bytes, decode, dial_in
from ztna.wire.stream import Frame, OpenedFrame, OpenFrame, OpenStatus, ResetFrame, encode

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
        sock = await dial_in_at(address, token, timeout_s)
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


async def dial_in_at(address: SockAddr, token: bytes, timeout_s: float) -> socket.socket:
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
