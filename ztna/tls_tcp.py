"""TLS 1.3 over TCP on non-blocking sockets, both ends authenticated before anything is read.

Bytes only: frames and flows are sidecar.link's. Plain `ssl` sockets on the loop's selector, because asyncio's own TLS
transports copy more and cannot half-close.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError
from ztna.identity import Identity
from ztna.narrow import SEGMENT_BYTES, NarrowHosts
from ztna.reasons import Reason
from ztna.telemetry import HANDSHAKES
from ztna.verdicts import Followed, Verdicts

SockAddr = tuple[str, int]

HANDSHAKE_SECONDS = 5.0
DEAD_PEER_SECONDS = 10
KEEPALIVE_IDLE_SECONDS = 4
KEEPALIVE_INTERVAL_SECONDS = 2
KEEPALIVE_PROBES = 3
RECORD_BYTES = 16 * 1024
CONTEXTS_MAX = 16
HUNG_SECONDS = 1.0
"""A handshake that the other end breaks off after so long is taken for one that hung: what it sent was not heard."""

_HANDSHAKES = HANDSHAKES.labels("tls")
_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module has it from Python 3.12 on
_INT = struct.Struct("i")
_TCP_INFO = struct.Struct("3xB20xI28xI8xI")
"""tcpi_probes, tcpi_unacked, tcpi_last_ack_recv (ms) and tcpi_rtt (us) of linux/tcp.h."""
_DER = 2  # _ssl.ENCODING_DER
_VERIFY_EXPIRED = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_VERIFY_WRONG_PURPOSE = 26  # X509_V_ERR_INVALID_PURPOSE: the extended key usage
_narrow = NarrowHosts()
"""One for the whole process: a path is as narrow for whoever uses it."""


async def connect(address: SockAddr, timeout_s: float) -> socket.socket:
    """Return a connected, non-blocking TCP socket with carrier options. Raises LinkError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor left, or no such family here
        raise LinkError(f"{address[0]}:{address[1]}: {error.strerror or error}") from None
    try:
        sock.setblocking(False)
        if _narrow.is_suspect(address[0], time.monotonic()):
            # Said in the SYN, it binds the other end too (RFC 9293, 3.7.1).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, address)
        except TimeoutError:
            # A busy loop sees its timer before the socket, which may have been connected in time.
            if not _is_connected(sock):
                raise LinkError(f"{address[0]}:{address[1]} did not answer within {timeout_s:g} s") from None
        notice_dead_peer(sock)
    except OSError as error:
        sock.close()
        raise LinkError(f"{address[0]}:{address[1]}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def notice_dead_peer(sock: socket.socket) -> None:
    """Set a socket between agent and connector up: no delay, and a dead peer is noticed within 10 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)


async def secure(
    sock: socket.socket,
    credentials: Credentials,
    alpn: str,
    *,
    server_side: bool,
    timeout_s: float = HANDSHAKE_SECONDS,
    dialled: bool | None = None,
) -> TlsStream:
    """Take a connected, non-blocking socket over, do the handshake on it and say who the peer is.

    `dialled` says that this end made the TCP connection, as TLS clients do: when it hangs, the path may be narrow.

    Closes the socket, having read nothing past the handshake, unless the ALPN is exactly `alpn` and the peer's whole
    presented chain proves an identity for its role. Raises IdentityError, or LinkError for anything else.
    """
    context, began = _context(credentials, alpn, server_side), time.monotonic()
    try:
        tls = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    except OSError as error:  # reset since it was connected: `ssl` asks for the peer's name
        sock.close()
        raise LinkError(f"the connection broke before TLS: {error.strerror or error}") from None
    dialled = not server_side if dialled is None else dialled
    try:
        await _handshake_watched(tls, timeout_s, dialled)
        if tls.selected_alpn_protocol() != alpn:
            raise LinkError(f"the peer speaks {tls.selected_alpn_protocol() or 'no ALPN'}, not {alpn}")
        identity = credentials.verdicts.verify(_presented_chain(tls), "client" if server_side else "server")
        _HANDSHAKES.observe(time.monotonic() - began)
        return TlsStream(tls, identity, credentials.verdicts, dialled=dialled)
    except TimeoutError:
        tls.close()
        raise LinkError(f"no TLS handshake within {timeout_s:g} s") from None
    except ssl.SSLError as error:
        tls.close()
        raise _refusal(error) from None
    except OSError as error:
        tls.close()
        raise LinkError(f"the connection broke in the TLS handshake: {error.strerror or error}") from None
    except BaseException:
        tls.close()
        raise


class Delivery(NamedTuple):
    """How the other end's host takes what is sent to it."""

    unacknowledged: int
    """Segments on their way; and probes of the kernel, which it sends when it cannot send, or has been silent."""
    ack_age_s: float
    """For how long nothing came."""
    rtt_s: float


def delivery(sock: socket.socket) -> Delivery:
    """Return what the kernel knows of the way to a TCP socket's peer. Raises OSError once closed."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    probes, unacknowledged, ack_age_ms, rtt_us = _TCP_INFO.unpack(info)
    return Delivery(probes + unacknowledged, ack_age_ms / 1e3, rtt_us / 1e6)


class TlsStream:
    """An authenticated connection; its owner is called when it can be read or written and must not block."""

    def __init__(self, tls: ssl.SSLSocket, identity: Identity, verdicts: Verdicts, *, dialled: bool) -> None:
        self.identity = identity
        self._suspicion = _Suspicion(tls) if dialled else None
        self._verdicts = verdicts
        self._followed: Followed | None = None
        self.peer_address: SockAddr = tls.getpeername()[:2]
        self.own_address: SockAddr = tls.getsockname()[:2]
        self.is_ended = False
        self._tls = tls
        self._fd = tls.fileno()
        self._loop = asyncio.get_running_loop()
        # SSLSocket's own methods only check for states that cannot be here; at 16 KiB a call that shows.
        ssl_object: Any = tls._sslobj  # type: ignore[attr-defined]
        self._read = ssl_object.read
        self._write = ssl_object.write
        self._pending = ssl_object.pending
        self._set_option = tls.setsockopt
        self._on_readable: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None
        self._awaits_writable = False
        self._has_writer = False
        self._read_awaits_writable = False
        self._write_awaits_readable = False
        self._is_closed = False

    def start(
        self,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
        on_refused: Callable[[IdentityError], None],
    ) -> None:
        """Begin to call: `on_readable` whenever there is something, `on_writable` once after a short `write`.

        `on_refused` is called when the peer's certificate does not stand any more: close then.
        """
        self._on_readable = on_readable
        self._on_writable = on_writable
        self._followed = self._verdicts.follow(self.identity, on_refused)
        self._loop.add_reader(self._fd, self._readable)
        # The peer's first bytes may have come in the same segment as the end of its handshake.
        self._loop.call_soon(self._read_pending)

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer with what is there and return how much that was; `is_ended` tells the end.

        Raises OSError (ssl.SSLError among them) when the connection is broken.
        """
        try:
            size = self._fill(buffer)
        except OSError as error:
            if self._suspicion is not None:
                self._suspicion.ended(is_dead=not isinstance(error, ssl.SSLError))
            raise
        if self._suspicion is not None:
            self._suspicion.was_heard |= size > 0
            if self.is_ended:
                self._suspicion.ended()
        return size

    def _fill(self, buffer: memoryview) -> int:
        read = self._read
        size = len(buffer)
        got = 0
        try:
            while got < size:
                count = read(size - got, buffer[got:])
                if not count:
                    self.is_ended = True
                    return got
                got += count
        except ssl.SSLWantReadError:
            return got
        except ssl.SSLWantWriteError:  # the answer to a key update does not fit
            self._read_awaits_writable = True
            self._await_writable()
            return got
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self.is_ended = True
            return got
        if self._pending():
            # The buffer ended inside a record, whose rest the selector knows nothing of.
            self._loop.call_soon(self._read_pending)
        return got

    def write(self, data: bytes | memoryview) -> int:
        """Write what fits and return how much that was; short means: `on_writable` is called, then go on from there.

        The bytes not taken must be given again unchanged. Raises OSError when the connection is broken.
        """
        is_corked = len(data) > RECORD_BYTES
        try:
            # OpenSSL writes record by record: corked, the kernel sends them together instead of each for itself.
            if is_corked:
                self._set_option(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            written: int = self._write(data)
        except ssl.SSLWantWriteError:
            self._await_writable()
            return 0
        except ssl.SSLWantReadError:
            self._write_awaits_readable = True
            return 0
        finally:
            if is_corked:
                self._set_option(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        if written < len(data):
            self._await_writable()
        return written

    @property
    def unacknowledged_bytes(self) -> int:
        """How many written bytes the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7)); 0 once closed."""
        if self._is_closed:
            return 0
        (size,) = _INT.unpack(fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(_INT.size)))
        return int(size)

    def delivery(self) -> Delivery:
        """Return what the kernel knows of the way to the peer. Raises OSError once closed."""
        return delivery(self._tls)

    def give_up(self) -> None:
        """Take the way to the peer for dead: `close` follows."""
        if self._suspicion is not None:
            self._suspicion.ended(is_dead=True)

    def limit_unsent(self, size: int) -> None:
        """Have the kernel take nothing more while so many bytes wait to be sent (TCP_NOTSENT_LOWAT, tcp(7))."""
        with contextlib.suppress(OSError):  # closed by now: the next write tells
            self._set_option(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, size)

    def close(self) -> None:
        """Close at once, without a word; again is harmless."""
        if not self._is_closed:
            self._is_closed = True
            self._stop_watching()
            self._tls.close()

    def finish(self, patience_s: float, parted: Callable[[bool], None] = lambda clean: None) -> None:
        """Send the end, wait at most `patience_s` for the peer's, reading what comes without a look, and close.

        Closing with unread bytes would send a RST, which may overtake what the peer has yet to read. `parted` is
        called with whether the peer's end came, so that it has had all there was.
        """
        if self._is_closed:
            parted(False)
            return
        self._stop_watching()
        try:
            socket.socket.shutdown(self._tls, socket.SHUT_WR)
        except OSError:
            self._part(parted, False)
            return
        timer = self._loop.call_later(patience_s, self._part, parted, False)
        self._loop.add_reader(self._fd, self._discard, timer, parted)

    def _discard(self, timer: asyncio.TimerHandle, parted: Callable[[bool], None]) -> None:
        try:
            if socket.socket.recv(self._tls, 4 * RECORD_BYTES):
                return
            clean = True
        except BlockingIOError:
            return
        except OSError:  # reset, or nobody is there any more (tcp(7): ETIMEDOUT, EHOSTUNREACH)
            clean = False
        timer.cancel()
        self._part(parted, clean)

    def _part(self, parted: Callable[[bool], None], clean: bool) -> None:
        self.close()
        parted(clean)

    def _stop_watching(self) -> None:
        if self._followed is not None:
            self._followed.forget()
        self._on_readable = self._on_writable = None
        self._has_writer = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)

    def _await_writable(self) -> None:
        self._awaits_writable = True
        if not self._has_writer:
            self._has_writer = True
            self._loop.add_writer(self._fd, self._writable)

    def _readable(self) -> None:
        if self._write_awaits_readable:
            self._write_awaits_readable = False
            self._call(self._on_writable)
        self._call(self._on_readable)

    def _read_pending(self) -> None:
        self._call(self._on_readable)

    def _writable(self) -> None:
        self._awaits_writable = False
        if self._read_awaits_writable:
            self._read_awaits_writable = False
            self._call(self._on_readable)
        self._call(self._on_writable)
        # A connection that carries all it can is full again by now; coming and going costs an epoll_ctl(2) each.
        if not self._awaits_writable and not self._is_closed and self._has_writer:
            self._has_writer = False
            self._loop.remove_writer(self._fd)

    @staticmethod
    def _call(callback: Callable[[], None] | None) -> None:
        if callback is not None:
            callback()


@lru_cache(maxsize=CONTEXTS_MAX)
def _context(credentials: Credentials, alpn: str, server_side: bool) -> ssl.SSLContext:
    return credentials.server_context(alpn) if server_side else credentials.client_context(alpn)


class _Suspicion:
    """What the end of a dialled connection says of the way to its host."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        """Take a connected socket. Raises OSError."""
        self.was_heard = False
        self._host: str = tls.getpeername()[0]
        self._began = time.monotonic()

    def ended(self, *, is_dead: bool = False) -> None:
        """Suspect the host when the connection died, or was closed after a while and nothing had come."""
        now = time.monotonic()
        if is_dead or (not self.was_heard and now - self._began > HUNG_SECONDS):
            _narrow.suspect(self._host, now)


async def _handshake_watched(tls: ssl.SSLSocket, timeout_s: float, dialled: bool) -> None:
    suspicion = _Suspicion(tls)
    try:
        async with asyncio.timeout(timeout_s):
            await _handshake(tls)
    except BaseException:  # given up by the caller, too, who may have less patience
        if dialled:
            suspicion.ended()
        raise


async def _handshake(tls: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    fd = tls.fileno()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        try:
            tls.do_handshake()
            return
        except ssl.SSLWantReadError:
            loop.add_reader(fd, _set, ready)
        except ssl.SSLWantWriteError:
            loop.add_writer(fd, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
            loop.remove_writer(fd)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _presented_chain(tls: ssl.SSLSocket) -> list[bytes]:
    # Public only from Python 3.13 on; the leaf comes first on both sides.
    ssl_object: Any = tls._sslobj  # type: ignore[attr-defined]
    return [bytes(each.public_bytes(_DER)) for each in ssl_object.get_unverified_chain() or ()]


def _refusal(error: ssl.SSLError) -> IdentityError | LinkError:
    """Say in our words what OpenSSL refused in the handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _VERIFY_EXPIRED:
            return IdentityError(Reason.EXPIRED, error.verify_message)
        if error.verify_code == _VERIFY_WRONG_PURPOSE:
            return IdentityError(Reason.NO_GRANT, error.verify_message)
        return IdentityError(Reason.UNTRUSTED, error.verify_message)
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return IdentityError(Reason.NO_CERTIFICATE, "client cert required")
    return LinkError(f"TLS handshake failed: {error.reason or error}")
