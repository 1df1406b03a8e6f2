"""The TLS door of a relay's TCP port: control connections of peers whose UDP is blocked.

Does handshakes, a bounded number at once, and lets in whom ztna.quic's server would let in, by the same checks. How a
connection comes to be one of TLS is relay.splicer's, what is said on it relay.peers'. Source: docs/blocked.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

from relay.dialled import Dialled, Strangers
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused
from ztna.identity import Identity
from ztna.quiet import Quiet
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.tls_control import ALPN, MessageHandler, TlsConnection
from ztna.tls_tcp import secure

HANDSHAKE_SECONDS = 5.0
SEND_BUFFER_BYTES = 256 * 1024
"""What the kernel takes for a peer that does not read; more waits, and is bounded, in its TlsConnection."""
CLOSE_SLICE_CONNECTIONS = 50

WHERE = "relay_tls"

_log = logger(__name__)


class TlsDoor:
    """Takes connections whose first byte says TLS. `run` owns the handshakes."""

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        *,
        half_open_max: int,
        half_open_per_source: int,
        admit: Callable[[Identity, str], None],
        factory: Callable[[TlsConnection], MessageHandler],
    ) -> None:
        """`admit` raises Refused for a peer that may not come in; `factory` makes a connection's handler."""
        self._credentials = credentials
        self._half_open_max = half_open_max
        self._half_open_per_source = half_open_per_source
        self._admit = admit
        self._factory = factory
        self._tasks: asyncio.TaskGroup | None = None
        self._handshakes: dict[Dialled, asyncio.Task[None]] = {}
        self._strangers = Strangers()
        self._open: dict[TlsConnection, None] = {}
        self._quiet = Quiet()

    @property
    def half_open(self) -> int:
        """How many handshakes are going on."""
        return len(self._handshakes)

    @property
    def connections(self) -> tuple[TlsConnection, ...]:
        """The connections whose identity stands."""
        return tuple(self._open)

    async def run(self) -> None:
        """Let peers in until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.Event().wait()

    def take(self, sock: socket.socket, source: str) -> None:
        """Take over a non-blocking connection, unread; the longest handshake goes for it if need be."""
        if self._tasks is None:
            sock.close()
            return
        crowding = self._strangers.oldest_of_full(source, self._half_open_per_source)
        if crowding is None and len(self._handshakes) >= self._half_open_max:
            crowding = self._strangers.oldest()
        if crowding is not None:
            refused(WHERE, Reason.LIMIT_REACHED)
            self._give_up(crowding)
        stranger = Dialled(sock, source, 0.0)
        self._strangers.add(stranger)
        self._handshakes[stranger] = self._tasks.create_task(self._shake(stranger), name="tls handshake")

    async def close_all(self, code: int, reason: str) -> None:
        """Close every connection, a slice at a time so that the loop stays alive."""
        connections = list(self._open)
        for start in range(0, len(connections), CLOSE_SLICE_CONNECTIONS):
            for connection in connections[start : start + CLOSE_SLICE_CONNECTIONS]:
                connection.close(code, reason)
            await asyncio.sleep(0)

    def close(self, code: int, reason: str) -> None:
        """Close everything at once; harmless twice."""
        for stranger in tuple(self._handshakes):
            self._give_up(stranger)
        for connection in tuple(self._open):
            connection.close(code, reason)

    async def _shake(self, stranger: Dialled) -> None:
        try:
            # Out of memory for buffers or the like: this one goes.
            with contextlib.suppress(OSError):
                stranger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            credentials = self._credentials()
            tls = await secure(
                stranger.sock, credentials, ALPN, server_side=True, timeout_s=HANDSHAKE_SECONDS
            )
        except LinkError:
            dropped(WHERE, "handshake_failed")
            return
        except Refused as error:
            refused(WHERE, error.reason)
            self._tell("connection_refused", stranger.source, reason=error.reason)
            return
        finally:
            if stranger in self._handshakes:
                self._forget(stranger)
        self._let_in(TlsConnection(tls, WHERE))

    def _let_in(self, connection: TlsConnection) -> None:
        try:
            self._admit(connection.identity, connection.alpn)
        except Refused as error:
            connection.refuse(error)
            self._tell("connection_refused", connection.identity.name, reason=error.reason)
            return
        self._open[connection] = None
        address = "{}:{}".format(*connection.peer_address)
        self._tell("connection_opened", connection.identity.name, address=address, alpn=connection.alpn)
        connection.closed.add_done_callback(lambda closed: self._ended(connection, *closed.result()))
        connection.start(self._factory(connection))

    def _ended(self, connection: TlsConnection, code: int, reason: str) -> None:
        self._open.pop(connection, None)
        own = connection.refusal.reason if connection.refusal is not None else ""
        self._tell("connection_ended", connection.identity.name, code=code, reason=own or reason)

    def _forget(self, stranger: Dialled) -> asyncio.Task[None]:
        self._strangers.discard(stranger)
        return self._handshakes.pop(stranger)

    def _give_up(self, stranger: Dialled) -> None:
        self._forget(stranger).cancel()
        stranger.sock.close()  # the handshake may not have begun; else the socket is the handshake's to close

    def _tell(self, event: str, peer: str, **fields: object) -> None:
        if self._quiet.allows((event, peer), time.monotonic()):
            _log.info(event, where=WHERE, peer=peer, **fields)
        for about, count in self._quiet.over(time.monotonic()):
            _log.info("lines_left_out", where=WHERE, about=" ".join(about), count=count)
