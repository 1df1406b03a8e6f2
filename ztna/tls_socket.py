"""A non-blocking socket that speaks TLS and can half-close, in the place of a plain one.

`ssl.SSLSocket` cannot: its close_notify comes with a read, which throws away what the other end has sent by then
(OpenSSL's `application data after close notify`). So the records go through memory here, and whatever was read is
decrypted before the close_notify. Who the other end has to be the context and the name say.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import cast

READ_BYTES = 64 * 1024
RECORD_BYTES = 16 * 1024
RECORDS_PER_SEND = 4


class TlsSocket(socket.socket):
    """What a flow needs of a socket: `recvmsg_into`, `send`, `sendmsg`, `shutdown`, `close`.

    `has_more` says that `recvmsg_into` has something which makes nothing readable. After a BlockingIOError `send` and
    `sendmsg` want the same bytes again, and perhaps more, as OpenSSL does.
    """

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        super().__init__(fileno=sock.detach())
        self.setblocking(False)
        self.has_more = True
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._plain = bytearray()
        self._halt: OSError | None = None
        """Why nothing follows what was read: no more is there yet, or for good. Told once all of that is given out."""
        self._unsent = b""
        self._promised = 0
        self._is_ended = False
        self._flushing: asyncio.AbstractEventLoop | None = None

    def recvmsg_into(  # type: ignore[override]
        self, buffers: Iterable[memoryview], *_rest: object
    ) -> tuple[int, list[tuple[int, int, bytes]], int, None]:
        """Fill one buffer after the other as far as it goes; only the first of what is returned says anything.

        0 is the other end's close_notify, or the end of its TCP. Raises BlockingIOError, or OSError for a connection
        that broke or is no TLS any more.
        """
        if isinstance(self._halt, BlockingIOError):
            self._halt = None
        filled = 0
        for buffer in buffers:
            size = self._fill(buffer)
            filled += size
            if size < len(buffer):
                break
        if self._halt is not None and not filled:
            raise self._halt
        return filled, [], 0, None

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:  # type: ignore[override]
        """Send some of it and say how much. Raises BlockingIOError, OSError."""
        if not self._promised:
            view = memoryview(data)
            for _ in range(RECORDS_PER_SEND):
                piece = view[self._promised : self._promised + RECORD_BYTES]
                if not piece:
                    break
                self._promised += self._tls.write(piece)
        self._flush()
        taken, self._promised = self._promised, 0
        return taken

    def sendmsg(self, buffers: Sequence[bytes | memoryview], *_rest: object) -> int:  # type: ignore[override]
        """Send some of the pieces, as `send`."""
        return self.send(b"".join(buffers))

    def shutdown(self, how: int) -> None:
        """Send close_notify, then FIN; reading goes on."""
        while not self._is_ended:
            try:
                piece = self._tls.read(RECORD_BYTES)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                piece = b""
            self._plain += piece
            self._is_ended = not piece
        with suppress(ssl.SSLError):  # it is written; of the other end's own there is nothing here yet
            self._tls.unwrap()
        self._finish()

    def close(self) -> None:
        """Close; what is not sent by then is lost, as with any non-blocking socket."""
        if self._flushing is not None:
            self._flushing.remove_writer(self.fileno())
            self._flushing = None
        super().close()

    def _fill(self, buffer: memoryview) -> int:
        """Fill the buffer as far as it goes; short of it comes the end, or there is a `_halt`."""
        filled = min(len(buffer), len(self._plain))
        buffer[:filled] = self._plain[:filled]
        del self._plain[:filled]
        while filled < len(buffer) and not self._is_ended and self._halt is None:
            try:
                filled += self._decrypt(buffer[filled:])
            except OSError as error:
                self._halt = error.with_traceback(None)
        self.has_more = not isinstance(self._halt, BlockingIOError)
        return filled

    def _decrypt(self, buffer: memoryview) -> int:
        """Fill the buffer from one record, or take from the kernel what follows. Raises BlockingIOError, OSError."""
        try:
            size = cast(int, self._tls.read(len(buffer), buffer))
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._is_ended = True
            return 0
        else:
            self._is_ended = size == 0
            return size
        self._receive()
        return 0

    def _finish(self) -> None:
        """Send the last record, however long the other end makes us wait for that."""
        if self._flushing is not None:
            self._flushing.remove_writer(self.fileno())
            self._flushing = None
        try:
            self._flush()
            super().shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._flushing = asyncio.get_running_loop()
            self._flushing.add_writer(self.fileno(), self._finish)
        except OSError:
            pass  # the connection has broken, which the next read tells

    def _receive(self) -> None:
        """Take what the kernel has. Raises BlockingIOError, OSError."""
        if self._outgoing.pending or self._unsent:
            with suppress(BlockingIOError):
                self._flush()  # an answer to a key update
        data = super().recv(READ_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        """Hand all that is encrypted to the kernel. Raises BlockingIOError while it takes no more, OSError."""
        self._unsent += self._outgoing.read()
        while self._unsent:
            self._unsent = self._unsent[super().send(self._unsent) :]


async def secure_client(sock: socket.socket, context: ssl.SSLContext, name: str) -> TlsSocket:
    """Do the client's handshake on a connected, non-blocking socket, which is taken over once it stands.

    `name` is the other end's, sent as SNI and required of its certificate. Raises OSError (ssl.SSLError among them);
    then the socket is still the caller's.
    """
    loop = asyncio.get_running_loop()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    except (ValueError, TypeError) as error:  # an empty label, a NUL
        raise OSError(errno.EINVAL, f"{name!r} cannot be sent as a server's name ({error})") from None
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await loop.sock_sendall(sock, outgoing.read())
            data = await loop.sock_recv(sock, READ_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "closed in the TLS handshake") from None
            incoming.write(data)
        except ssl.SSLError:
            if outgoing.pending:
                await loop.sock_sendall(sock, outgoing.read())  # the alert says why
            raise
        else:
            await loop.sock_sendall(sock, outgoing.read())
            return TlsSocket(sock, tls, incoming, outgoing)
