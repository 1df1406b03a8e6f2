"""The kernel's side of batched UDP: structures, calls and sockaddr bytes, and how a socket is bound.

For ztna.udp and ztna.udp_bulk, which say what is done with them; sends and receives nothing itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Callable
from typing import Final

from ztna.errors import ZtnaError
from ztna.listening import bind_error

SockAddr = tuple[str, int]
"""A numeric host and a port."""

RawAddress = bytes
"""A kernel sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes), exactly as recvmmsg(2) gave it."""

BATCH_PACKETS = 64
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
NAME_BYTES: Final = 32
INET_BYTES: Final = 16
INET6_BYTES: Final = 28

_INET_HEADER: Final = struct.Struct("=H")
_PORT: Final = struct.Struct(">H")

# The socket module has none of these: socket(7), udp(7).
SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
"""The kernel is full for now: the packets are lost as on any network."""


class IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vectors_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class MMsgHdr(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("header", MsgHdr), ("length", ctypes.c_uint32))


# The structures are also read and written as 32-bit words and longs: far cheaper than ctypes attributes.
_WORD: Final = ctypes.sizeof(ctypes.c_uint32)
_LONG: Final = ctypes.sizeof(ctypes.c_size_t)
HEADER_BYTES: Final = ctypes.sizeof(MMsgHdr)
HEADER_WORDS: Final = HEADER_BYTES // _WORD
HEADER_LONGS: Final = HEADER_BYTES // _LONG
FLAGS_WORD: Final = MsgHdr.flags.offset // _WORD
LENGTH_WORD: Final = MMsgHdr.length.offset // _WORD
CONTROL_LENGTH_LONG: Final = MsgHdr.control_length.offset // _LONG
VECTOR_LONGS: Final = ctypes.sizeof(IoVec) // _LONG

_libc = ctypes.CDLL(None, use_errno=True)
recvmmsg = _libc.recvmmsg
recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
recvmmsg.restype = ctypes.c_int
sendmmsg = _libc.sendmmsg
sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
sendmmsg.restype = ctypes.c_int


def bind_udp(
    address: SockAddr, *, reuse_port: bool = False, prepare: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """Return a non-blocking bound UDP socket with buffers as large as the system allows.

    `prepare` sets options before it is bound. Raises ZtnaError naming the address when it cannot be bound.
    """
    host, port = address
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    )
    try:
        sock.setblocking(False)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if prepare is not None:
            prepare(sock)
        _grow_buffers(sock)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise bind_error(address, error) from error
    return sock


def encode_address(address: SockAddr) -> RawAddress:
    """Return the kernel's sockaddr bytes of a numeric host and port. Raises ZtnaError for a name."""
    host, port = address
    try:
        if ":" in host:
            packed = socket.inet_pton(socket.AF_INET6, host)
            return _INET_HEADER.pack(socket.AF_INET6) + _PORT.pack(port) + bytes(4) + packed + bytes(4)
        packed = socket.inet_pton(socket.AF_INET, host)
        return _INET_HEADER.pack(socket.AF_INET) + _PORT.pack(port) + packed + bytes(8)
    except (OSError, struct.error):
        raise ZtnaError(f"address {host}:{port}: expected a numeric IP address and a port") from None


def decode_address(raw: RawAddress) -> SockAddr:
    """Return host and port of the kernel's sockaddr bytes."""
    port = _PORT.unpack_from(raw, 2)[0]
    if len(raw) == INET_BYTES:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port


def _grow_buffers(sock: socket.socket) -> None:
    for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER_BYTES)
        except OSError:
            # Only root passes net.core.?mem_max; everybody else gets what that allows.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER_BYTES)
