"""Batched datagrams in bulk: what goes the same way leaves as one segmented message (GSO), and arrives so (GRO).

For QUIC and the forwarder, whose packets come in runs of one size; ztna.udp.RawSocket is for short answers.
Addresses stay kernel bytes, and what the packets mean is not known here. Never waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final

from ztna import udp_kernel as kernel
from ztna.udp_kernel import BATCH_PACKETS, RawAddress, SockAddr, bind_udp, decode_address

PAYLOAD_BYTES_MAX = 65_507
SEGMENTS_MAX = 64
"""UDP_MAX_SEGMENTS of the kernels that have GSO."""
SEGMENTED_BYTES_MAX = 65_000
SEND_BUFFER_BYTES = 512 * 1024

# Not a power of two: packets at the same place of each slot would all fall into the same cache sets.
_SLOT_BYTES: Final = 64 * 1024 + 1344
_CONTROL_BYTES: Final = 32
_CONTROL_WORDS: Final = _CONTROL_BYTES // 4
_CONTROL_DATA_WORD: Final = 4
_SEGMENT_CONTROL: Final = struct.Struct("=QiiH6x")
_SEGMENT_CONTROL_LENGTH: Final = 18

# What a kernel or device says that cannot segment what it was given.
_UNSEGMENTABLE: Final = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP})


class _Batch:
    """BATCH_PACKETS message headers with their addresses, control data and payload, laid out once."""

    def __init__(self, name_length: int, payload_bytes: int, slot_bytes: int) -> None:
        # A mapping costs only the pages that were touched, and its slices are bytes.
        self.payload = mmap.mmap(-1, payload_bytes)
        self.payload_address = ctypes.addressof(ctypes.c_char.from_buffer(self.payload))
        self.names = ctypes.create_string_buffer(BATCH_PACKETS * kernel.NAME_BYTES)
        self.controls = ctypes.create_string_buffer(BATCH_PACKETS * _CONTROL_BYTES)
        self.vectors = (kernel.IoVec * BATCH_PACKETS)()
        self.headers = (kernel.MMsgHdr * BATCH_PACKETS)()
        for i in range(BATCH_PACKETS):
            self.vectors[i].base = self.payload_address + i * slot_bytes
            self.vectors[i].length = slot_bytes
            header = self.headers[i].header
            header.name = ctypes.addressof(self.names) + i * kernel.NAME_BYTES
            header.name_length = name_length
            header.vectors = ctypes.addressof(self.vectors[i])
            header.vectors_length = 1
            header.control = ctypes.addressof(self.controls) + i * _CONTROL_BYTES
        self.address = ctypes.addressof(self.headers)
        self.names_view = memoryview(self.names).cast("B")
        self.controls_view = memoryview(self.controls).cast("B")
        self.control_words = self.controls_view.cast("I")
        self.vector_longs = memoryview(self.vectors).cast("B").cast("L")
        self.header_words = memoryview(self.headers).cast("B").cast("I")
        self.header_longs = memoryview(self.headers).cast("B").cast("L")


class _Batches(threading.local):
    """The batches of a thread, shared by all its sockets: nothing stays in one between two calls."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], _Batch] = {}

    def receiving(self, name_length: int) -> _Batch:
        return self._get(name_length, BATCH_PACKETS * _SLOT_BYTES, _SLOT_BYTES)

    def sending(self, name_length: int) -> _Batch:
        return self._get(name_length, SEND_BUFFER_BYTES, 0)

    def _get(self, name_length: int, payload_bytes: int, slot_bytes: int) -> _Batch:
        key = (name_length, slot_bytes > 0)
        batch = self._made.get(key)
        if batch is None:
            batch = self._made[key] = _Batch(name_length, payload_bytes, slot_bytes)
        return batch


_batches = _Batches()


class BulkSocket:
    """A non-blocking UDP socket that moves whole batches; addresses stay kernel bytes.

    Packets of one size for one destination that follow each other leave as one segmented message. Packets
    that arrived so are taken in as one and cut again.
    Counters of packets: `received`, `sent`, `dropped`.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a bound UDP socket."""
        self.socket = sock
        self.received = self.sent = self.dropped = 0
        self._fd = sock.fileno()
        self._name_length = kernel.INET_BYTES if sock.family == socket.AF_INET else kernel.INET6_BYTES
        self._in = _batches.receiving(self._name_length)
        self._out = _batches.sending(self._name_length)
        self._segments_max = SEGMENTS_MAX
        # A kernel without it delivers one by one, which is read the same way.
        with contextlib.suppress(OSError):
            sock.setsockopt(kernel.SOL_UDP, kernel.UDP_GRO, 1)

    @classmethod
    def open(cls, address: SockAddr, *, reuse_port: bool = False) -> BulkSocket:
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

    def receive(self, messages: int = BATCH_PACKETS) -> list[tuple[bytes, RawAddress]]:
        """Return what one recvmmsg(2) has: so many packets at most, or dozens for each that was coalesced.

        Fewer than `messages` (at most BATCH_PACKETS) mean that there are no more for now. Never waits.
        """
        batch = self._in
        longs = batch.header_longs
        # The kernel writes into it how much control data there was: it has to be said again each time.
        for i in range(kernel.CONTROL_LENGTH_LONG, messages * kernel.HEADER_LONGS, kernel.HEADER_LONGS):
            longs[i] = _CONTROL_BYTES
        count = kernel.recvmmsg(self._fd, batch.address, messages, socket.MSG_DONTWAIT, None)
        if count <= 0:
            return []
        names: Any = batch.names
        payload, words, width = batch.payload, batch.header_words, self._name_length
        packets: list[tuple[bytes, RawAddress]] = []
        for i in range(count):
            slot, name = i * _SLOT_BYTES, i * kernel.NAME_BYTES
            end = slot + words[i * kernel.HEADER_WORDS + kernel.LENGTH_WORD]
            source: bytes = names[name : name + width]
            # UDP_GRO is the only control data that was asked for: an int, the size of the segments.
            if longs[i * kernel.HEADER_LONGS + kernel.CONTROL_LENGTH_LONG]:
                segment = batch.control_words[i * _CONTROL_WORDS + _CONTROL_DATA_WORD]
                packets += [
                    (payload[at : min(at + segment, end)], source) for at in range(slot, end, segment)
                ]
            else:
                packets.append((payload[slot:end], source))
        self.received += len(packets)
        return packets

    def send(self, packets: Sequence[tuple[bytes, RawAddress]]) -> None:
        """Send in order, BATCH_PACKETS messages a system call; what the kernel refuses is dropped and counted."""
        batch, width, segments_max = self._out, self._name_length, self._segments_max
        payload, names, vectors = batch.payload, batch.names_view, batch.vector_longs
        runs: list[tuple[int, int]] = []
        to: RawAddress | None = None
        at = start = segment = segments = 0
        for data, address in packets:
            length = len(data)
            if (
                0 < length <= segment
                and address == to
                and segments < segments_max
                and at - start + length <= SEGMENTED_BYTES_MAX
                and at + length <= SEND_BUFFER_BYTES
            ):
                payload[at : at + length] = data
                at += length
                segments += 1
                if length < segment:
                    # Only the last segment may be shorter.
                    runs.append((segments, segment))
                    vectors[len(runs) * kernel.VECTOR_LONGS - 1] = at - start
                    to, segment = None, 0
                continue
            if to is not None:
                runs.append((segments, segment))
                vectors[len(runs) * kernel.VECTOR_LONGS - 1] = at - start
            if length > PAYLOAD_BYTES_MAX or len(address) != width:
                self.dropped += 1
                to, segment = None, 0
                continue
            if len(runs) == BATCH_PACKETS or at + length > SEND_BUFFER_BYTES:
                self._flush(runs)
                runs, at = [], 0
            to, start, segment, segments = address, at, length, 1
            payload[at : at + length] = data
            name = len(runs) * kernel.NAME_BYTES
            names[name : name + width] = address
            vectors[len(runs) * kernel.VECTOR_LONGS] = batch.payload_address + at
            at += length
        if to is not None:
            runs.append((segments, segment))
            vectors[len(runs) * kernel.VECTOR_LONGS - 1] = at - start
        if runs:
            self._flush(runs)

    def close(self) -> None:
        """Close the socket; further calls do nothing."""
        self._fd = -1
        self.socket.close()

    def _flush(self, runs: list[tuple[int, int]]) -> None:
        """Send the messages laid out in the batch: each a run of (packets, bytes of all but the last)."""
        batch, count = self._out, len(runs)
        for i, (segments, segment) in enumerate(runs):
            control = 0
            if segments > 1:
                control = _SEGMENT_CONTROL.size
                head = (_SEGMENT_CONTROL_LENGTH, kernel.SOL_UDP, kernel.UDP_SEGMENT, segment)
                _SEGMENT_CONTROL.pack_into(batch.controls_view, i * _CONTROL_BYTES, *head)
            batch.header_longs[i * kernel.HEADER_LONGS + kernel.CONTROL_LENGTH_LONG] = control
        done = 0
        while done < count:
            address = batch.address + done * kernel.HEADER_BYTES
            taken = kernel.sendmmsg(self._fd, address, count - done, socket.MSG_DONTWAIT)
            if taken > 0:
                self.sent += sum(segments for segments, _ in runs[done : done + taken])
                done += taken
                continue
            error = ctypes.get_errno()
            if error in kernel.FULL or self._fd < 0:
                self.dropped += sum(segments for segments, _ in runs[done:])
                return
            segments, segment = runs[done]
            if segments > 1 and error in _UNSEGMENTABLE:
                self._send_apart(done, segment)
            else:
                # This one message cannot go (unreachable, a pending ICMP error): lose it, keep the rest.
                self.dropped += segments
            done += 1

    def _send_apart(self, index: int, segment: int) -> None:
        """Send a run's packets one by one; if that works, segmenting is given up on this socket."""
        batch = self._out
        start = batch.vector_longs[index * kernel.VECTOR_LONGS] - batch.payload_address
        end = start + batch.vector_longs[index * kernel.VECTOR_LONGS + 1]
        name = index * kernel.NAME_BYTES
        to = decode_address(bytes(batch.names_view[name : name + self._name_length]))
        for at in range(start, end, segment):
            try:
                self.socket.sendto(batch.payload[at : min(at + segment, end)], to)
            except OSError:
                self.dropped += 1
            else:
                self.sent += 1
                self._segments_max = 1
