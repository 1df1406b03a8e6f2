"""Backends: their addresses, dialling them over TCP, and a UDP or ping socket of its own for every flow.

Does not decide who may reach a backend; sidecar.connector.probes checks them. Backends have names or numbers; a name
is asked anew before each check and each dial.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from sidecar.connector.flow_log import Counts, Ended, FlowEnd, FlowLog
from sidecar.connector.flows import FlowKey, FlowTable, SessionKey
from sidecar.connector.routes import Route
from sidecar.link.stream import FlowRefused
from ztna.config import Endpoint
from ztna.errors import PacketError, Refused
from ztna.packet import (
    ICMP_ECHO_REPLY,
    ICMP_ECHO_REQUEST,
    ICMPV6_ECHO_REPLY,
    ICMPV6_ECHO_REQUEST,
    PROTOCOL_UDP,
    Unreachable,
    build_echo_reply,
    build_udp,
    icmp_error,
)
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.tls_socket import secure_client
from ztna.udp import SockAddr
from ztna.wire.stream import OpenStatus

DATAGRAM_BYTES_MAX = 65_535
FLOWS_PER_TURN = 256
DATAGRAMS_PER_TURN = 64

_WHERE = "backend"
_IP_RECVERR = 11  # linux/in.h; not in the socket module
_IPV6_RECVERR = 25
_IP_MTU = 14
_ERROR_QUEUE_BYTES = 512
_ECHO = struct.Struct(">BBHHH")
"""Type, code, checksum, identifier, sequence (RFC 792); on a ping socket checksum and identifier are the kernel's."""
_EXTENDED_ERROR = struct.Struct("=IBBBBII")  # struct sock_extended_err, linux/errqueue.h
_FULL = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_KINDS = {
    errno.ECONNREFUSED: Unreachable.PORT,
    errno.EHOSTUNREACH: Unreachable.HOST,
    errno.ENETUNREACH: Unreachable.NET,
    errno.EACCES: Unreachable.PROHIBITED,
    errno.EPERM: Unreachable.PROHIBITED,
    errno.EMSGSIZE: Unreachable.TOO_BIG,
}

_log = logger(__name__)


async def resolve(endpoint: Endpoint) -> SockAddr:
    """Return the backend's numeric address, IPv4 preferred. Raises OSError when it has none."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except ValueError as error:  # UnicodeError among them: an empty label, one of 64 characters, a NUL
        raise OSError(errno.EINVAL, f"{endpoint.host!r} is no host's name ({error})") from None
    if not found:
        raise OSError(errno.EHOSTUNREACH, f"{endpoint.host} has no address")
    host, port = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][:2]
    return str(host), int(port)


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a connection to a backend begins with: bytes that go first, and then TLS, to a backend of that name."""

    header: bytes = b""
    context: ssl.SSLContext | None = None
    name: str = ""


PLAIN = Introduction()


async def dial_tcp(endpoint: Endpoint, timeout_s: float, introduction: Introduction = PLAIN) -> socket.socket:
    """Return a non-blocking socket that is connected to the backend.

    Raises FlowRefused: refused, unreachable (TLS that does not come about, too), timed out, or denied when we are out
    of descriptors.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _introduced(await connect_tcp(await resolve(endpoint)), introduction)
    except TimeoutError:
        raise FlowRefused(OpenStatus.TIMED_OUT, f"{endpoint} within {timeout_s:g} s") from None
    except OSError as error:
        raise FlowRefused(_dial_status(error), f"{endpoint}: {error.strerror or error}") from None


async def _introduced(sock: socket.socket, introduction: Introduction) -> socket.socket:
    try:
        if introduction.header:
            await asyncio.get_running_loop().sock_sendall(sock, introduction.header)
        if introduction.context is not None:
            return await secure_client(sock, introduction.context, introduction.name)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_tcp(address: SockAddr) -> socket.socket:
    """Return a non-blocking socket that is connected. Raises OSError."""
    sock = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def connected_udp(address: SockAddr) -> socket.socket:
    """Return a non-blocking socket whose only peer is `address`, with the ICMP errors kept. Raises OSError."""
    return _connected(socket.socket(_family(address), socket.SOCK_DGRAM), address)


def _connected(sock: socket.socket, address: SockAddr) -> socket.socket:
    try:
        sock.setblocking(False)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def connected_ping(address: SockAddr) -> socket.socket:
    """Return a non-blocking unprivileged ping socket to a host, with the ICMP errors kept (icmp(7)). Raises OSError.

    PermissionError is net.ipv4.ping_group_range's doing: it must hold a group of ours.
    """
    family = _family(address)
    kind = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    return _connected(socket.socket(family, socket.SOCK_DGRAM, kind), (address[0], 0))


def ping_problem() -> str | None:
    """Say why we may not ping, None when we may."""
    try:
        connected_ping(("127.0.0.1", 0)).close()
    except PermissionError:
        return f"not allowed to ping: set net.ipv4.ping_group_range to include {os.getegid()}"
    except OSError as error:
        return f"cannot ping: {error.strerror}"
    return None


class Claimed(Protocol):
    """What a flow needs of the backend that was chosen for it; `release` when it ends."""

    @property
    def route(self) -> Route:
        """The route whose backend it is."""

    @property
    def backend(self) -> Endpoint:
        """Which one."""

    def succeeded(self) -> None:
        """It answered."""

    def failed(self) -> None:
        """It could not be reached."""

    def release(self) -> None:
        """The flow has ended."""


@dataclass(slots=True)
class _UdpFlow:
    key: FlowKey
    socket: socket.socket
    agent: str
    claim: Claimed
    reply: Callable[[bytes], object]
    last: bytes
    began: float
    counts: Counts = field(default_factory=Counts)

    @property
    def is_ended(self) -> bool:
        """Whether its socket is closed."""
        return self.socket.fileno() < 0

    def encoded(self, payload: bytes) -> bytes:
        """Return a datagram as its socket takes it."""
        return payload

    def answer(self, data: bytes) -> bytes | None:
        """Return the packet for the agent that tells what came. Raises PacketError when it would not fit one."""
        key = self.key
        return build_udp(key.destination, key.destination_port, key.source, key.source_port, data)


class _EchoFlow(_UdpFlow):
    """Pings under one identifier, which stands where a UDP flow has its source port.

    Datagrams begin with the echo's sequence number, two bytes.
    """

    def encoded(self, payload: bytes) -> bytes:
        kind = ICMP_ECHO_REQUEST if self.socket.family == socket.AF_INET else ICMPV6_ECHO_REQUEST
        return _ECHO.pack(kind, 0, 0, 0, int.from_bytes(payload[:2], "big")) + payload[2:]

    def answer(self, data: bytes) -> bytes | None:
        if len(data) < _ECHO.size or data[0] not in (ICMP_ECHO_REPLY, ICMPV6_ECHO_REPLY):
            return None
        key, sequence = self.key, _ECHO.unpack_from(data)[4]
        return build_echo_reply(key.destination, key.source, key.source_port, sequence, data[_ECHO.size :])


class UdpFlows:
    """Every UDP and ping flow that runs, on a connected socket of its own, so only its backend can answer it.

    One epoll set of our own watches them all: the loop's poller (libuv) gives up a descriptor that has an error
    waiting, and a connected UDP socket has one for every ICMP error.
    """

    def __init__(self, *, per_agent: int, total: int, log: FlowLog) -> None:
        self._flow_log = log
        self._table: FlowTable[_UdpFlow] = FlowTable(per_agent=per_agent, total=total)
        self._flows: dict[int, _UdpFlow] = {}
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def __len__(self) -> int:
        return len(self._table)

    def send(self, key: FlowKey, payload: bytes, packet: bytes) -> bool:
        """Pass a datagram on when its flow runs; `packet` is the agent's, which an ICMP error will quote.

        False when there is no such flow: `open` it and send again. What the kernel has no room for is lost.
        """
        flow = self._table.use(key, self._loop.time())
        if flow is None:
            return False
        flow.last = packet
        self._pass_on(flow, payload)
        return True

    def open(
        self,
        key: FlowKey,
        agent: str,
        claim: Claimed,
        address: SockAddr,
        *,
        packet: bytes,
        reply: Callable[[bytes], object],
    ) -> None:
        """Begin a flow to the claimed backend, at its numeric address; `reply` gets whole IP packets for the agent.

        The claim is the flow's from here on, whatever comes of it. Raises Refused(limit_reached).
        """
        is_udp = key.protocol == PROTOCOL_UDP
        try:
            for ended in self._table.make_room(agent):
                refused(_WHERE, Reason.LIMIT_REACHED)
                self._close(ended, "evicted", Reason.LIMIT_REACHED)
            sock = connected_udp(address) if is_udp else connected_ping(address)
        except Refused:
            claim.release()
            raise
        except OSError as error:
            claim.release()
            if error.errno in _NO_DESCRIPTORS:
                raise Refused(Reason.LIMIT_REACHED, f"no socket for a flow: {error.strerror}") from None
            # No route to the backend: the same answer as if a router on the way had said so.
            _answer(reply, packet, _KINDS.get(error.errno or 0, Unreachable.HOST))
            return
        flow = (_UdpFlow if is_udp else _EchoFlow)(key, sock, agent, claim, reply, packet, self._loop.time())
        self._table.add(key, agent, flow, idle_s=claim.route.udp_idle_s, now=flow.began)
        self._flows[sock.fileno()] = flow
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def move_session(self, old: SessionKey, new: SessionKey, reply: Callable[[bytes], object]) -> bool:
        """Let the flows of a session go on in another one of the same agent; say whether there were any."""
        moved, ended = self._table.move_session(old, new)
        for key, flow in moved.items():
            flow.key, flow.reply = key, reply
        for flow in ended:
            self._close(flow, "session_ended")
        return bool(moved)

    def end_session(self, session: SessionKey) -> None:
        """End the flows of a session."""
        for flow in self._table.end_session(session):
            self._close(flow, "session_ended")

    def leave(self, route: Route, backend: Endpoint) -> None:
        """End the flows at a backend of a route, as there is a better one: the next datagram of each goes there."""
        for flow in list(self._flows.values()):
            if flow.claim.backend == backend and flow.claim.route.is_same(route):
                self._table.discard(flow.key)
                self._close(flow, "backend_left")

    def expire(self) -> None:
        """End the flows that were idle for their time."""
        for flow in self._table.expire(self._loop.time()):
            self._close(flow, "idle")

    def close(self) -> None:
        """End everything."""
        for flow in self._table.end_all():
            self._close(flow, "closing")
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _close(self, flow: _UdpFlow, ended: Ended, reason: Reason | None = None) -> None:
        self._epoll.unregister(flow.socket.fileno())
        del self._flows[flow.socket.fileno()]
        flow.socket.close()
        flow.claim.release()
        key = flow.key
        is_udp = key.protocol == PROTOCOL_UDP
        self._flow_log.write(
            FlowEnd(
                protocol="udp" if is_udp else "icmp",
                agent=flow.agent,
                service=flow.claim.route.service,
                session=key.session[1],
                flow=None,
                source=str(Endpoint(key.source, key.source_port)) if is_udp else key.source,
                destination=str(Endpoint(key.destination, key.destination_port))
                if is_udp
                else key.destination,
                backend=str(flow.claim.backend),
                seconds=self._loop.time() - flow.began,
                counts=flow.counts,
                ended=ended,
                reason=reason,
            )
        )

    def _pass_on(self, flow: _UdpFlow, payload: bytes) -> None:
        for _attempt in range(2):
            try:
                flow.socket.send(flow.encoded(payload))
            except OSError as error:
                if error.errno in _FULL:
                    break
                # Usually an ICMP error about an earlier datagram, told now instead of sending this one.
                told = self._tell_errors(flow)
                if error.errno == errno.EMSGSIZE:
                    if not told:
                        _answer(flow.reply, flow.last, Unreachable.TOO_BIG, _mtu(flow.socket))
                    break
                if flow.is_ended:
                    break  # it has left its backend for that: the next datagram goes to a better one
            else:
                flow.counts.to_backend += len(payload)
                flow.counts.datagrams_to_backend += 1
                return
        dropped(_WHERE, "udp_not_sent")

    def _ready(self) -> None:
        for descriptor, events in self._epoll.poll(0, FLOWS_PER_TURN):
            flow = self._flows.get(descriptor)
            if flow is None:
                continue  # ended by what an earlier flow of this turn brought
            if events & select.EPOLLERR:
                self._tell_errors(flow)
            if events & select.EPOLLIN and not flow.is_ended:
                self._receive(flow)

    def _receive(self, flow: _UdpFlow) -> None:
        for number in range(DATAGRAMS_PER_TURN):
            try:
                data = flow.socket.recv(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                continue  # the error queue has told it, or will
            if number == 0:
                flow.claim.succeeded()
            try:
                packet = flow.answer(data)
            except PacketError:
                dropped(_WHERE, "udp_reply_too_large")
                continue
            if packet is not None:
                flow.counts.to_agent += len(data)
                flow.counts.datagrams_to_agent += 1
                flow.reply(packet)

    def _tell_errors(self, flow: _UdpFlow) -> bool:
        """Answer the agent with what the socket's error queue has; say whether there was anything."""
        told = has_failed = False
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                _data, ancillary, _flags, _address = flow.socket.recvmsg(
                    1, _ERROR_QUEUE_BYTES, socket.MSG_ERRQUEUE
                )
            except OSError:
                break
            for _level, kind, data in ancillary:
                if kind in (_IP_RECVERR, _IPV6_RECVERR) and len(data) >= _EXTENDED_ERROR.size:
                    number, _origin, _type, _code, _pad, info, _data2 = _EXTENDED_ERROR.unpack_from(data)
                    _answer(flow.reply, flow.last, _KINDS.get(number, Unreachable.HOST), info)
                    told = True
                    has_failed |= number != errno.EMSGSIZE
        # The queue is told; what the kernel also keeps as the socket's error must not be reported twice.
        flow.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if has_failed:
            flow.claim.failed()  # which may end it
        return told


def _answer(reply: Callable[[bytes], object], packet: bytes, kind: Unreachable, mtu: int = 0) -> None:
    reply(icmp_error(packet, kind, mtu if kind is Unreachable.TOO_BIG else 0))


def _mtu(sock: socket.socket) -> int:
    if sock.family != socket.AF_INET:
        return 0
    with suppress(OSError):
        return sock.getsockopt(socket.IPPROTO_IP, _IP_MTU)
    return 0


def _family(address: SockAddr) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _dial_status(error: OSError) -> OpenStatus:
    if isinstance(error, ConnectionRefusedError):
        return OpenStatus.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return OpenStatus.TIMED_OUT
    return OpenStatus.DENIED if error.errno in _NO_DESCRIPTORS else OpenStatus.UNREACHABLE
