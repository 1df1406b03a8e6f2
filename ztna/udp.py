"""Batched datagrams: recvmmsg(2) and sendmmsg(2) through ctypes, up to 64 packets a system call.

Two ways in: `RawSocket` speaks in kernel sockaddr bytes that are never parsed (the forwarder's and dnsd's hot
path); `UdpSocket` speaks in (host, port) and delivers from the running loop. Knows nothing of what packets
mean, and never waits: what the kernel does not take at once is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ztna.errors import ZtnaError

SockAddr = tuple[str, int]
"""A numeric host and a port."""

RawAddress = bytes
"""A kernel sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes), exactly as recvmmsg(2) gave it."""

BATCH_PACKETS = 64
SLOT_BYTES = 4096
BATCHES_PER_WAKEUP = 8
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
ADDRESS_CACHE_ENTRIES = 16_384

_NAME_BYTES: Final = 32
_INET_HEADER: Final = struct.Struct("=H")
_PORT: Final = struct.Struct(">H")
_INET_BYTES: Final = 16
_INET6_BYTES: Final = 28

# The kernel is full for now, or an address cannot be reached: the packet is lost as on any network.
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vectors_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _MMsgHdr(ctypes.Structure):
    _fields_ = (("header", _MsgHdr), ("length", ctypes.c_uint32))


# The header array is also read and written as 32-bit words: far cheaper than ctypes attributes.
_HEADER_WORDS: Final = ctypes.sizeof(_MMsgHdr) // 4
_NAME_LENGTH_WORD: Final = _MsgHdr.name_length.offset // 4
_FLAGS_WORD: Final = _MsgHdr.flags.offset // 4
_LENGTH_WORD: Final = _MMsgHdr.length.offset // 4
_VECTOR_LONGS: Final = ctypes.sizeof(_IoVec) // ctypes.sizeof(ctypes.c_size_t)

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_recvmmsg.restype = ctypes.c_int
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_sendmmsg.restype = ctypes.c_int


class _Batch:
    """BATCH_PACKETS message headers, each with a slot of payload and of address, laid out once.

    With `slots_of` it has headers of its own over the slots of another batch.
    """

    payload: ctypes.Array[ctypes.c_char]
    names: ctypes.Array[ctypes.c_char]

    def __init__(self, name_length: int, slots_of: _Batch | None = None) -> None:
        if slots_of is not None:
            self.payload, self.names = slots_of.payload, slots_of.names
        else:
            self.payload = ctypes.create_string_buffer(BATCH_PACKETS * SLOT_BYTES)
            self.names = ctypes.create_string_buffer(BATCH_PACKETS * _NAME_BYTES)
        self.vectors = (_IoVec * BATCH_PACKETS)()
        self.headers = (_MMsgHdr * BATCH_PACKETS)()
        payload, names = ctypes.addressof(self.payload), ctypes.addressof(self.names)
        for i in range(BATCH_PACKETS):
            self.vectors[i].base = payload + i * SLOT_BYTES
            self.vectors[i].length = SLOT_BYTES
            header = self.headers[i].header
            header.name = names + i * _NAME_BYTES
            header.name_length = name_length
            header.vectors = ctypes.addressof(self.vectors[i])
            header.vectors_length = 1
        self.address = ctypes.addressof(self.headers)
        self.payload_view = memoryview(self.payload).cast("B")
        self.names_view = memoryview(self.names).cast("B")
        self.vector_longs = memoryview(self.vectors).cast("B").cast("L")
        self.header_words = memoryview(self.headers).cast("B").cast("I")


class RawSocket:
    """A non-blocking UDP socket that moves whole batches; addresses stay kernel bytes.

    Counters of packets: `received`, `sent`, `dropped`, `truncated` (longer than SLOT_BYTES, not delivered).
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a bound UDP socket."""
        self.socket = sock
        self.received = self.sent = self.dropped = self.truncated = 0
        self._fd = sock.fileno()
        self._name_length = _INET_BYTES if sock.family == socket.AF_INET else _INET6_BYTES
        self._in = _Batch(self._name_length)
        self._out = _Batch(self._name_length)
        self._replies = _Batch(self._name_length, slots_of=self._in)

    @classmethod
    def open(cls, address: SockAddr, *, reuse_port: bool = False) -> RawSocket:
        """Bind a socket with large buffers; a port that is taken raises ZtnaError naming it."""
        return cls(bind_udp(address, reuse_port=reuse_port))

    @property
    def address(self) -> SockAddr:
        """The bound address."""
        host, port = self.socket.getsockname()[:2]
        return host, port

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self.socket.fileno()

    def receive(self) -> list[tuple[bytes, RawAddress]]:
        """Return what one recvmmsg(2) has, at most BATCH_PACKETS packets; never waits."""
        batch = self._in
        count = _recvmmsg(self._fd, batch.address, BATCH_PACKETS, socket.MSG_DONTWAIT, None)
        if count <= 0:
            # Nothing there, or an ICMP error of an earlier send: either way there is nothing to deliver.
            return []
        # A slice of a c_char array is bytes, in one copy; its stub says list[bytes].
        payload: Any = batch.payload
        names: Any = batch.names
        words, width = batch.header_words, self._name_length
        packets: list[tuple[bytes, RawAddress]] = []
        word, slot, name = 0, 0, 0
        for _ in range(count):
            if words[word + _FLAGS_WORD] & socket.MSG_TRUNC:
                self.truncated += 1
            else:
                length = words[word + _LENGTH_WORD]
                packets.append((payload[slot : slot + length], names[name : name + width]))
            word += _HEADER_WORDS
            slot += SLOT_BYTES
            name += _NAME_BYTES
        self.received += len(packets)
        return packets

    def send(self, packets: Sequence[tuple[bytes, RawAddress]]) -> None:
        """Send in order, BATCH_PACKETS a system call; what the kernel refuses is dropped and counted."""
        for start in range(0, len(packets), BATCH_PACKETS):
            self._send_batch(packets[start : start + BATCH_PACKETS])

    def reply(
        self,
        ready: Mapping[bytes, bytes],
        known: Mapping[bytes, bool],
        otherwise: Callable[[bytes, RawAddress], bytes | None],
    ) -> int:
        """Answer what one recvmmsg(2) has, each packet from the slot it came in; never waits.

        The answer to a packet from an IPv4 host that is true in `known` (by its 4 bytes) is the packet's first
        two bytes, a DNS message's id, and what `ready` has for the rest. For every other packet `otherwise` is
        asked with the packet and its source: the whole answer, or None for silence. Returns how many came.
        """
        batch, replies = self._in, self._replies
        count = int(_recvmmsg(self._fd, batch.address, BATCH_PACKETS, socket.MSG_DONTWAIT, None))
        payload: Any = batch.payload
        names: Any = batch.names
        words, slots, lengths = batch.header_words, batch.payload_view, replies.vector_longs
        first, word, slot, name, vector = 0, _LENGTH_WORD, 0, 0, 1
        for place in range(count):
            end = slot + words[word]
            answer = ready.get(payload[slot + 2 : end]) if known.get(names[name + 4 : name + 8]) else None
            if answer is not None:
                length = len(answer) + 2
                slots[slot + 2 : slot + length] = answer
            else:
                length = self._reply_otherwise(place, payload[slot:end], otherwise)
                if not length:
                    self._flush(replies, first, place)
                    first = place + 1
            lengths[vector] = length
            word += _HEADER_WORDS
            slot += SLOT_BYTES
            name += _NAME_BYTES
            vector += _VECTOR_LONGS
        self.received += max(0, count)
        self._flush(replies, first, count)
        return count

    def _reply_otherwise(
        self, place: int, data: bytes, otherwise: Callable[[bytes, RawAddress], bytes | None]
    ) -> int:
        """Put what `otherwise` says into the packet's slot; return its length, 0 when nothing goes out of it."""
        batch = self._in
        if batch.header_words[place * _HEADER_WORDS + _FLAGS_WORD] & socket.MSG_TRUNC:
            self.truncated += 1
            return 0
        names: Any = batch.names
        source: RawAddress = names[place * _NAME_BYTES : place * _NAME_BYTES + self._name_length]
        answer = otherwise(data, source)
        if answer is None:
            return 0
        if len(answer) > SLOT_BYTES:
            self._send_odd(answer, source)
            return 0
        start = place * SLOT_BYTES
        batch.payload_view[start : start + len(answer)] = answer
        return len(answer)

    def close(self) -> None:
        """Close the socket; further calls do nothing."""
        self._fd = -1
        self.socket.close()

    def _send_batch(self, packets: Sequence[tuple[bytes, RawAddress]]) -> None:
        batch = self._out
        payload, names, lengths, width = (
            batch.payload_view,
            batch.names_view,
            batch.vector_longs,
            self._name_length,
        )
        count, slot, name, vector = 0, 0, 0, 1
        for data, address in packets:
            length = len(data)
            if length > SLOT_BYTES or len(address) != width:
                self._send_odd(data, address)
                continue
            payload[slot : slot + length] = data
            names[name : name + width] = address
            lengths[vector] = length
            count += 1
            slot += SLOT_BYTES
            name += _NAME_BYTES
            vector += _VECTOR_LONGS
        self._flush(batch, 0, count)

    def _flush(self, batch: _Batch, first: int, end: int) -> None:
        """Send the packets from `first` up to `end` of a batch."""
        size = ctypes.sizeof(_MMsgHdr)
        while first < end:
            taken = _sendmmsg(self._fd, batch.address + first * size, end - first, socket.MSG_DONTWAIT)
            if taken > 0:
                self.sent += taken
                first += taken
                continue
            if ctypes.get_errno() in _FULL or self._fd < 0:
                self.dropped += end - first
                return
            # This one packet cannot go (unreachable, too big, a pending ICMP error): lose it, keep the rest.
            self.dropped += 1
            first += 1

    def _send_odd(self, data: bytes, address: RawAddress) -> None:
        """Send a packet that fits no slot (rare: a UDP payload above SLOT_BYTES) on its own."""
        if len(address) != self._name_length:
            self.dropped += 1
            return
        try:
            self.socket.sendto(data, decode_address(address))
        except OSError:
            self.dropped += 1
        else:
            self.sent += 1


class UdpSocket:
    """A UDP socket on the running loop that delivers and sends in batches.

    `receive` gets each batch as it came: a list of (packet, source). It must not raise.
    """

    def __init__(self, raw: RawSocket, receive: Callable[[list[tuple[bytes, SockAddr]]], None]) -> None:
        """Start to deliver from `raw` on the running loop."""
        self._raw = raw
        self._receive = receive
        self._to_host: dict[RawAddress, SockAddr] = {}
        self._to_raw: dict[SockAddr, RawAddress] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(raw.fileno(), self._readable)
        self._closed = False

    @classmethod
    def open(
        cls,
        address: SockAddr,
        receive: Callable[[list[tuple[bytes, SockAddr]]], None],
        *,
        reuse_port: bool = False,
    ) -> UdpSocket:
        """Bind and start; port 0 takes a free one. A port that is taken raises ZtnaError naming it."""
        return cls(RawSocket.open(address, reuse_port=reuse_port), receive)

    @property
    def address(self) -> SockAddr:
        """The bound address."""
        return self._raw.address

    @property
    def counters(self) -> dict[str, int]:
        """Packets received, sent, dropped (the kernel was full or refused) and truncated so far."""
        raw = self._raw
        return {
            "received": raw.received,
            "sent": raw.sent,
            "dropped": raw.dropped,
            "truncated": raw.truncated,
        }

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Send to numeric addresses; never waits. An address of the other family is dropped and counted."""
        if self._closed:
            return
        raw_of = self._to_raw
        batch = []
        for data, address in packets:
            raw = raw_of.get(address)
            if raw is None:
                raw = self._encode(address)
            batch.append((data, raw))
        self._raw.send(batch)

    def close(self) -> None:
        """Stop delivering and close; harmless twice."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._raw.fileno())
            self._raw.close()

    def _readable(self) -> None:
        host_of = self._to_host
        for _ in range(BATCHES_PER_WAKEUP):
            batch = self._raw.receive()
            if not batch:
                return
            delivered = []
            for data, raw in batch:
                address = host_of.get(raw)
                if address is None:
                    address = self._decode(raw)
                delivered.append((data, address))
            self._receive(delivered)
            if self._closed or len(batch) < BATCH_PACKETS:
                return

    def _encode(self, address: SockAddr) -> RawAddress:
        if len(self._to_raw) >= ADDRESS_CACHE_ENTRIES:
            self._to_raw.clear()
        raw = self._to_raw[address] = encode_address(address)
        return raw

    def _decode(self, raw: RawAddress) -> SockAddr:
        if len(self._to_host) >= ADDRESS_CACHE_ENTRIES:
            self._to_host.clear()
        address = self._to_host[raw] = decode_address(raw)
        return address


def bind_udp(address: SockAddr, *, reuse_port: bool = False) -> socket.socket:
    """Return a non-blocking bound UDP socket with buffers as large as the system allows.

    Raises ZtnaError naming the address when it cannot be bound.
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
        _grow_buffers(sock)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ZtnaError(f"UDP {host}:{port}: {os.strerror(error.errno or 0)}") from error
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
    if len(raw) == _INET_BYTES:
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
