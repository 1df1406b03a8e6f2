"""The one QUIC driver: servers and clients on a packet path, both ends authenticated, everything bounded.

The owner of a path hands in batches of received packets; each batch ends in one transmission. A `Handler` is
made only after the peer's identity stands. Does not know what datagrams and streams mean. Source: protocol.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from ssl import CERT_NONE
from typing import Protocol

from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.packet import (
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from ztna.credentials import Credentials
from ztna.errors import LinkError
from ztna.identity import Identity
from ztna.quic_connection import (
    CLOSE_OK,
    CLOSE_PROTOCOL_ERROR,
    HANDSHAKE_SECONDS,
    STATELESS_RESET,
    STREAM_UNSENT_BYTES_MAX,
    TIMER_SLACK_SECONDS,
    Clock,
    Connection,
    Handler,
    Packets,
    Settings,
)
from ztna.quic_engine import (
    CID_BYTES,
    CONGESTION_CONTROL,
    DATAGRAM_FRAME_BYTES_MAX,
    DATAGRAM_QUEUE_MAX,
    RESET_TOKEN_BYTES,
    Engine,
    new_cid,
    reset_token,
)
from ztna.quiet import Quiet
from ztna.reasons import Reason
from ztna.sources import HalfOpen, source_of
from ztna.telemetry import DROPS, logger, refused
from ztna.udp import SockAddr

__all__ = [
    "CLOSE_OK",
    "CLOSE_PROTOCOL_ERROR",
    "DATAGRAM_QUEUE_MAX",
    "HANDSHAKE_SECONDS",
    "RENEWED",
    "SHUTTING_DOWN",
    "STATELESS_RESET",
    "STREAM_UNSENT_BYTES_MAX",
    "Client",
    "Connection",
    "Handler",
    "PacketPath",
    "Packets",
    "Server",
    "Settings",
]

CLOSED_KEPT_SECONDS = 3.0
CLOSE_SLICE_CONNECTIONS = 50
FLUSH_SLICE_SECONDS = 0.010
"""How long connections are settled before the loop gets its turn: thousands may end at once."""
RESETS_PER_SECOND = 200
RESET_KEY_BYTES = 32

SHUTTING_DOWN = "server shutting down"
RENEWED = "certificate renewed"
"""Said by a client that is here on a newer connection: what hung on this one goes on as if it had gone."""

_RESET_PACKET_BYTES_MIN = 5 + RESET_TOKEN_BYTES
_RESET_PACKET_BYTES_MAX = 42
_VERSIONS = [QuicProtocolVersion.VERSION_1]

_log = logger(__name__)


class PacketPath(Protocol):
    """What carries the packets: a UdpSocket, or a link's path switch."""

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Send without waiting; what cannot be sent is lost."""


class _Endpoint(ABC):
    """What servers and clients share: connections that have something to do, and one send for all of them."""

    def __init__(
        self,
        path: PacketPath,
        credentials: Credentials,
        settings: Settings,
        factory: Callable[[Connection], Handler],
        clock: Clock,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.clock = clock
        self._quiet = Quiet()
        self.credentials = credentials
        self._path = path
        self._factory = factory
        self._dirty: dict[Connection, None] = {}
        self._flush_handle: asyncio.Handle | None = None
        self._flushing = False
        self._reset_key = settings.reset_key or os.urandom(RESET_KEY_BYTES)

    def touch(self, connection: Connection) -> None:
        """Have the connection settled before the loop waits again."""
        self._dirty[connection] = None
        if self._flush_handle is None and not self._flushing:
            self._flush_handle = self.loop.call_soon(self._flush)

    @abstractmethod
    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Return the peer's identity or raise Refused."""

    def established(self, connection: Connection) -> Handler:
        """Make the handler of a connection whose identity stands."""
        host, port = connection.peer_address
        name = connection.identity.name
        if self._quiet.allows(("connection_opened", name), self.clock()):
            _log.info(
                "connection_opened",
                where=self.settings.where,
                peer=name,
                address=f"{host}:{port}",
                alpn=connection.alpn,
            )
        connection.followed = self.credentials.verdicts.follow(connection.identity, connection.refuse)
        return self._factory(connection)

    def ended(self, connection: Connection, *, was_open: bool, code: int, reason: str) -> None:
        """Log the end of a connection."""
        if connection.followed is not None:
            connection.followed.forget()
        host, port = connection.peer_address
        event, name = (
            ("connection_ended", connection.identity.name) if was_open else ("connection_refused", "")
        )
        # What the peer gives as its reason is its own invention: each would be a line.
        own = str(connection.refusal.reason) if connection.refusal is not None else ""
        if not (was_open or reason or own) and code == CLOSE_OK:
            return  # nobody refused: a client gave up
        if self._quiet.allows((event, name or host, own), self.clock()):
            _log.info(
                event,
                where=self.settings.where,
                peer=name,
                address=f"{host}:{port}",
                code=code,
                reason=reason,
                detail=connection.refusal.detail if connection.refusal else "",
            )
        self.tell_left_out()

    def tell_left_out(self) -> None:
        """Log how many lines were left out of the log so that no peer fills it; every end of a connection does, too."""
        for about, count in self._quiet.over(self.clock()):
            _log.info("lines_left_out", where=self.settings.where, about=" ".join(about), count=count)

    @abstractmethod
    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Hear that the peer was told another CID."""

    @abstractmethod
    def cid_retired(self, cid: bytes) -> None:
        """Hear that the peer will not use a CID again."""

    def _flush(self) -> None:
        if self._flushing:
            # A handler came back in here: the round that goes on takes everything along.
            return
        self._flushing = True
        packets: Packets = []
        try:
            until = time.monotonic() + FLUSH_SLICE_SECONDS
            while self._dirty:
                connection = next(iter(self._dirty))
                del self._dirty[connection]
                packets += connection.settle()
                if time.monotonic() >= until:
                    break
        finally:
            self._flushing = False
            if self._flush_handle is not None:
                self._flush_handle.cancel()
            self._flush_handle = self.loop.call_soon(self._flush) if self._dirty else None
            if packets:
                self._path.send(packets)

    def _configuration(self, *, is_client: bool, server_name: str | None = None) -> QuicConfiguration:
        chain = self.credentials.chain
        settings = self.settings
        return QuicConfiguration(
            alpn_protocols=list(settings.alpn),
            connection_id_length=CID_BYTES,
            congestion_control_algorithm=CONGESTION_CONTROL,
            idle_timeout=settings.idle_timeout_s,
            is_client=is_client,
            max_data=settings.connection_window,
            max_stream_data=settings.stream_window,
            max_datagram_size=settings.udp_payload,
            max_datagram_frame_size=DATAGRAM_FRAME_BYTES_MAX,
            certificate=chain[0],
            certificate_chain=chain[1:],
            private_key=self.credentials.key,
            server_name=server_name,
            supported_versions=list(_VERSIONS),
            # Left to aioquic this trusts public roots and ignores clients: Trust judges both ends instead.
            verify_mode=CERT_NONE,
        )


class Server(_Endpoint):
    """Accepts connections on a path. No tickets, no 0-RTT: every client shows its certificate every time."""

    def __init__(
        self,
        path: PacketPath,
        credentials: Credentials,
        settings: Settings,
        *,
        admit: Callable[[Identity, str], None],
        factory: Callable[[Connection], Handler],
        clock: Clock = time.monotonic,
    ) -> None:
        """`admit(identity, alpn)` raises Refused for a peer that verified but may not come in here."""
        super().__init__(path, credentials, settings, factory, clock)
        self._admit = admit
        self._routes: dict[bytes, Connection] = {}
        self._cids: dict[Connection, set[bytes]] = {}
        self._open: dict[Connection, None] = {}
        self._half_open = HalfOpen(settings.half_open_max, settings.half_open_per_source)
        self._buried: deque[tuple[float, Connection]] = deque()
        self._burial_timer: asyncio.Handle | None = None
        self._retry = QuicRetryTokenHandler()
        self._accepting = True
        self._resets_left = RESETS_PER_SECOND
        self._resets_second = 0
        self._config = self._configuration(is_client=False)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """The connections whose identity stands."""
        return tuple(self._open)

    @property
    def half_open(self) -> int:
        """How many handshakes are going on."""
        return len(self._half_open)

    def use_credentials(self, credentials: Credentials) -> None:
        """Show and believe these from the next connection on; existing ones stay."""
        self.credentials = credentials
        self._config = self._configuration(is_client=False)

    def packets_received(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Take a batch of packets and answer with one transmission."""
        now = self.clock()
        for data, address in packets:
            connection = self._route(data, address)
            if connection is not None:
                connection.receive(data, address, now)
                self._dirty[connection] = None
        self._flush()

    def knows(self, data: bytes) -> bool:
        """Say whether a packet with a short header is for one of our connections."""
        return len(data) > CID_BYTES and not data[0] & 0x80 and data[1 : 1 + CID_BYTES] in self._routes

    async def close_all(self, code: int = CLOSE_OK, reason: str = SHUTTING_DOWN) -> None:
        """Accept nobody any more and close every connection, a slice at a time so that the loop stays alive."""
        self._accepting = False
        connections = list(self._cids)
        for start in range(0, len(connections), CLOSE_SLICE_CONNECTIONS):
            for connection in connections[start : start + CLOSE_SLICE_CONNECTIONS]:
                connection.close(code, reason)
            self._flush()
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close every connection at once and forget them; the path stays the owner's."""
        self._accepting = False
        for connection in list(self._cids):
            connection.close(CLOSE_OK, SHUTTING_DOWN)
        while self._dirty:
            self._flush()
        if self._burial_timer is not None:
            self._burial_timer.cancel()
            self._burial_timer = None
        self._buried.clear()
        self._routes.clear()
        self._cids.clear()

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Verify a client's chain and ask the owner whether it may come in."""
        identity = self.credentials.verdicts.verify(chain, "client")
        self._admit(identity, alpn)
        return identity

    def established(self, connection: Connection) -> Handler:
        """Count the connection as open and make its handler."""
        self._half_open.end(connection)
        self._open[connection] = None
        return super().established(connection)

    def ended(self, connection: Connection, *, was_open: bool, code: int, reason: str) -> None:
        """Keep its CIDs for a moment, for packets that are still under way, then forget them."""
        self._open.pop(connection, None)
        self._half_open.end(connection)
        super().ended(connection, was_open=was_open, code=code, reason=reason)
        self._buried.append((self.clock() + CLOSED_KEPT_SECONDS, connection))
        if self._burial_timer is None:
            self._burial_timer = self.loop.call_later(CLOSED_KEPT_SECONDS, self._bury)

    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Route another CID to the connection."""
        self._routes[cid] = connection
        self._cids[connection].add(cid)

    def cid_retired(self, cid: bytes) -> None:
        """Stop routing a CID."""
        connection = self._routes.pop(cid, None)
        if connection is not None:
            self._cids[connection].discard(cid)

    def _bury(self) -> None:
        self._burial_timer = None
        now = self.clock()
        while self._buried and self._buried[0][0] <= now + TIMER_SLACK_SECONDS:
            _, connection = self._buried.popleft()
            for cid in self._cids.pop(connection, ()):
                self._routes.pop(cid, None)
        if self._buried:
            self._burial_timer = self.loop.call_later(max(0.0, self._buried[0][0] - now), self._bury)

    def _route(self, data: bytes, address: SockAddr) -> Connection | None:
        if len(data) < 1 + CID_BYTES:
            return self._dropped("too_short")
        if data[0] & 0x80:
            connection = self._routes.get(data[6 : 6 + data[5]])
            return connection or self._accept(data, address)
        cid = data[1 : 1 + CID_BYTES]
        connection = self._routes.get(cid)
        if connection is None:
            self._send_reset(cid, len(data), address)
        return connection

    def _accept(self, data: bytes, address: SockAddr) -> Connection | None:
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
            return self._dropped("unknown_cid")
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CID_BYTES)
        except ValueError:
            return self._dropped("malformed")
        if header.version is None or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return self._dropped("malformed")
        if header.version not in _VERSIONS:
            offer = encode_quic_version_negotiation(
                header.destination_cid, header.source_cid, list(_VERSIONS)
            )
            self._path.send([(offer, address)])
            return None
        if header.packet_type is not QuicPacketType.INITIAL:
            return self._dropped("unknown_cid")
        source = source_of(address[0])
        if not self._accepting or self._half_open.full(source):
            refused(self.settings.where, Reason.LIMIT_REACHED if self._accepting else Reason.DRAINING)
            return None
        original, retried = header.destination_cid, None
        if header.token or self.settings.retry or self._half_open.wants_proof(source):
            if not header.token:
                self._send_retry(header.version, header.destination_cid, header.source_cid, address)
                return None
            try:
                original = self._retry.validate_token(
                    address=address,
                    destination_cid=header.destination_cid,
                    token=header.token,
                    now=self.clock(),
                )
            except ValueError:
                return self._dropped("bad_retry_token")
            retried = header.destination_cid
        return self._create(header.destination_cid, original, retried, address)

    def _create(self, cid: bytes, original: bytes, retried: bytes | None, address: SockAddr) -> Connection:
        connection: Connection

        def judge(chain: Sequence[bytes], alpn: str) -> None:
            connection.judge(chain, alpn)

        engine = Engine(self._config, judge, self._reset_key, original_cid=original, retry_cid=retried)
        connection = Connection(self, engine, address)
        self._half_open.begin(connection, source_of(address[0]))
        self._cids[connection] = {cid, *engine.local_cids}
        for each in self._cids[connection]:
            self._routes[each] = connection
        return connection

    def _send_retry(self, version: int, original: bytes, peer_cid: bytes, address: SockAddr) -> None:
        cid = new_cid()
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=original,
            retry_source_connection_id=cid,
            now=self.clock(),
        )
        self._path.send([(encode_quic_retry(version, cid, peer_cid, original, token), address)])

    def _send_reset(self, cid: bytes, received_bytes: int, address: SockAddr) -> None:
        second = int(self.clock())
        if second != self._resets_second:
            self._resets_second, self._resets_left = second, RESETS_PER_SECOND
        # RFC 9000 10.3.3: smaller than what it answers, so that two endpoints cannot keep each other busy.
        size = min(received_bytes - 1, _RESET_PACKET_BYTES_MAX)
        if size < _RESET_PACKET_BYTES_MIN or self._resets_left == 0:
            self._dropped("unknown_cid")
            return
        self._resets_left -= 1
        noise = os.urandom(size - RESET_TOKEN_BYTES)
        packet = bytes((noise[0] & 0x3F | 0x40,)) + noise[1:] + reset_token(self._reset_key, cid)
        DROPS.labels(self.settings.where, "unknown_cid").inc()
        self._path.send([(packet, address)])

    def _dropped(self, why: str) -> Connection | None:
        DROPS.labels(self.settings.where, why).inc()
        return None


class Client(_Endpoint):
    """One connection to a server on a path."""

    def __init__(
        self,
        path: PacketPath,
        address: SockAddr,
        server_name: str,
        credentials: Credentials,
        settings: Settings,
        *,
        check: Callable[[Identity], None],
        factory: Callable[[Connection], Handler],
        clock: Clock = time.monotonic,
    ) -> None:
        """`check(identity)` raises Refused for a server that verified but is not the one that was meant."""
        super().__init__(path, credentials, settings, factory, clock)
        self._address = address
        self._server_name = server_name
        self._check = check
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection | None:
        """The connection, once `connect` was called."""
        return self._connection

    async def connect(self, timeout_s: float) -> Connection:
        """Connect and return when both ends have accepted each other.

        Raises Refused (IdentityError for a bad certificate) when the server is not to be trusted, and LinkError
        when it refused us, does not answer within `timeout_s`, or the connection broke.
        """
        if self._connection is not None:
            raise LinkError(f"{self._server_name}: a client connects once")
        connection = self._connection = self._start()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait(
                    (connection.confirmed, connection.closed), return_when=asyncio.FIRST_COMPLETED
                )
        except TimeoutError:
            connection.close()
            raise LinkError(f"{self._target} does not answer ({timeout_s:g} s)") from None
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.refusal is not None:
            raise connection.refusal
        if connection.closed.done():
            code, reason = connection.closed.result()
            raise LinkError(f"{self._target} closed the connection: {reason or f'code 0x{code:x}'}")
        return connection

    def packets_received(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Take a batch of packets and answer with one transmission."""
        if self._connection is None:
            return
        now = self.clock()
        for data, address in packets:
            if data:
                self._connection.receive(data, address, now)
        self._dirty[self._connection] = None
        self._flush()

    def close(self, code: int = CLOSE_OK, reason: str = "") -> None:
        """Close the connection, if any, at once; the path stays the owner's."""
        if self._connection is not None:
            self._connection.close(code, reason)
            self._flush()

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Verify the server's chain and ask the owner whether it is the one that was meant."""
        identity = self.credentials.verdicts.verify(chain, "server")
        self._check(identity)
        return identity

    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Route nothing: the only connection gets every packet of the path."""

    def cid_retired(self, cid: bytes) -> None:
        """Route nothing."""

    @property
    def _target(self) -> str:
        return f"{self._server_name} at {self._address[0]}:{self._address[1]}"

    def _start(self) -> Connection:
        connection: Connection

        def judge(chain: Sequence[bytes], alpn: str) -> None:
            connection.judge(chain, alpn)

        config = self._configuration(is_client=True, server_name=self._server_name)
        engine = Engine(config, judge, self._reset_key)
        connection = Connection(self, engine, self._address)
        engine.connect(self._address, self.clock())
        self.touch(connection)
        return connection
