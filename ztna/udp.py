"""Batched datagrams: recvmmsg(2) and sendmmsg(2) through ctypes, up to 64 packets a system call.

Two ways in: `RawSocket` speaks in kernel sockaddr bytes that are never parsed (dnsd's hot path; for bulk there
is ztna.udp_bulk); `UdpSocket` speaks in (host, port) and delivers from the running loop. Knows nothing of what
packets mean, and never waits: what the kernel does not take at once is dropped and counted.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ztna import udp_kernel as kernel
from ztna.udp_bulk import BulkSocket
from ztna.udp_kernel import BATCH_PACKETS as BATCH_PACKETS
from ztna.udp_kernel import RawAddress as RawAddress
from ztna.udp_kernel import SockAddr as SockAddr
from ztna.udp_kernel import bind_udp as bind_udp
from ztna.udp_kernel import decode_address as decode_address
from ztna.udp_kernel import encode_address as encode_address

SLOT_BYTES = 4096
BATCHES_PER_WAKEUP = 8
MESSAGES_AT_ONCE = 16
"""For who works hard on each packet: a message may be a coalesced one, dozens of packets."""
WAKEUP_SECONDS = 0.010
"""How long batches are delivered, at most, before the loop gets its turn."""
ADDRESS_CACHE_ENTRIES = 16_384


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
            self.names = ctypes.create_string_buffer(BATCH_PACKETS * kernel.NAME_BYTES)
        self.vectors = (kernel.IoVec * BATCH_PACKETS)()
        self.headers = (kernel.MMsgHdr * BATCH_PACKETS)()
        payload, names = ctypes.addressof(self.payload), ctypes.addressof(self.names)
        for i in range(BATCH_PACKETS):
            self.vectors[i].base = payload + i * SLOT_BYTES
            self.vectors[i].length = SLOT_BYTES
            header = self.headers[i].header
            header.name = names + i * kernel.NAME_BYTES
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
        self._name_length = kernel.INET_BYTES if sock.family == socket.AF_INET else kernel.INET6_BYTES
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
        count = kernel.recvmmsg(self._fd, batch.address, BATCH_PACKETS, socket.MSG_DONTWAIT, None)
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
            if words[word + kernel.FLAGS_WORD] & socket.MSG_TRUNC:
                self.truncated += 1
            else:
                length = words[word + kernel.LENGTH_WORD]
                packets.append((payload[slot : slot + length], names[name : name + width]))
            word += kernel.HEADER_WORDS
            slot += SLOT_BYTES
            name += kernel.NAME_BYTES
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
        count = int(kernel.recvmmsg(self._fd, batch.address, BATCH_PACKETS, socket.MSG_DONTWAIT, None))
        payload: Any = batch.payload
        names: Any = batch.names
        words, slots, lengths = batch.header_words, batch.payload_view, replies.vector_longs
        first, word, slot, name, vector = 0, kernel.LENGTH_WORD, 0, 0, 1
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
            word += kernel.HEADER_WORDS
            slot += SLOT_BYTES
            name += kernel.NAME_BYTES
            vector += kernel.VECTOR_LONGS
        self.received += max(0, count)
        self._flush(replies, first, count)
        return count

    def _reply_otherwise(
        self, place: int, data: bytes, otherwise: Callable[[bytes, RawAddress], bytes | None]
    ) -> int:
        """Put what `otherwise` says into the packet's slot; return its length, 0 when nothing goes out of it."""
        batch = self._in
        if batch.header_words[place * kernel.HEADER_WORDS + kernel.FLAGS_WORD] & socket.MSG_TRUNC:
            self.truncated += 1
            return 0
        names: Any = batch.names
        source: RawAddress = names[place * kernel.NAME_BYTES : place * kernel.NAME_BYTES + self._name_length]
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
            name += kernel.NAME_BYTES
            vector += kernel.VECTOR_LONGS
        self._flush(batch, 0, count)

    def _flush(self, batch: _Batch, first: int, end: int) -> None:
        """Send the packets from `first` up to `end` of a batch."""
        size = ctypes.sizeof(kernel.MMsgHdr)
        while first < end:
            taken = kernel.sendmmsg(self._fd, batch.address + first * size, end - first, socket.MSG_DONTWAIT)
            if taken > 0:
                self.sent += taken
                first += taken
                continue
            if ctypes.get_errno() in kernel.FULL or self._fd < 0:
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

    def __init__(self, raw: BulkSocket, receive: Callable[[list[tuple[bytes, SockAddr]]], None]) -> None:
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
        return cls(BulkSocket.open(address, reuse_port=reuse_port), receive)

    @property
    def address(self) -> SockAddr:
        """The bound address."""
        return self._raw.address

    @property
    def counters(self) -> dict[str, int]:
        """Packets received, sent, and dropped (the kernel was full or refused) so far."""
        raw = self._raw
        return {"received": raw.received, "sent": raw.sent, "dropped": raw.dropped}

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
        until = time.monotonic() + WAKEUP_SECONDS
        while True:
            batch = self._raw.receive(MESSAGES_AT_ONCE)
            if not batch:
                return
            delivered = []
            for data, raw in batch:
                address = host_of.get(raw)
                if address is None:
                    address = self._decode(raw)
                delivered.append((data, address))
            self._receive(delivered)
            if self._closed or len(batch) < MESSAGES_AT_ONCE or time.monotonic() >= until:
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
