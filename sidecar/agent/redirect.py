"""One listener for all virtual addresses: nftables brings it what programs send to published ports.

TCP comes redirected, and the kernel tells its original destination; UDP (mode anyip) comes as it is, to a transparent
socket. Nothing is bound to a published port, so no program's bind of 0.0.0.0 meets us. The table is
sidecar.agent.ruleset's; it goes when the process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection, Iterable, Mapping

from sidecar.agent.listeners import (
    BACKLOG_CONNECTIONS,
    DATAGRAM_BYTES_MAX,
    DATAGRAMS_PER_WAKEUP,
    RECEIVE_BUFFER_BYTES,
    Accept,
    Acceptor,
    PacketPort,
    Receive,
    VirtualPort,
    Write,
)
from sidecar.agent.ruleset import Doors, Ruleset, Spot
from sidecar.link.flow import abort
from ztna.conflicts import AnyNetwork
from ztna.errors import ZtnaError
from ztna.nft import Nft, NftError
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS, dropped, logger
from ztna.udp import SockAddr, bind_udp, decode_address

REFUSED_WHERE = "agent_user"
COUNT_SECONDS = 5.0

_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_SOL_IPV6 = 41
# linux/in.h, in6.h, netfilter_ipv4.h; not in the socket module.
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IP_RECVORIGDSTADDR, _IPV6_RECVORIGDSTADDR = 20, 74
_SO_ORIGINAL_DST = 80
_SOCKADDR_BYTES = {socket.AF_INET: 16, socket.AF_INET6: 28}
_ANCILLARY_BYTES = 64
_WHERE = "agent_redirect"
_log = logger(__name__)


class Redirect:
    """The listener, its table, and what is published; made to agree with the leases by `apply`."""

    def __init__(
        self,
        name: str,
        accept: Accept,
        receive: Receive,
        *,
        write: Write | None,
        has_ipv6: bool,
        uids: Collection[int] | None,
    ) -> None:
        """Open the sockets and make the table. With `write` UDP is redirected too, and answered by it.

        Raises ZtnaError saying what is missing; then nothing is left behind.
        """
        self._accept = accept
        self._receive = receive
        self._write = write
        self._spots: dict[Spot, VirtualPort] = {}
        self._udp: dict[Spot, PacketPort] = {}
        self._pools: frozenset[AnyNetwork] = frozenset()
        self._loop = asyncio.get_running_loop()
        families = (socket.AF_INET, socket.AF_INET6) if has_ipv6 else (socket.AF_INET,)
        with contextlib.ExitStack() as opened:
            self._nft = Nft()
            opened.callback(self._nft.close)
            tcp = {family: _tcp_door(family) for family in families}
            udp = {family: _udp_door(family) for family in families} if write is not None else {}
            for sock in (*tcp.values(), *udp.values()):
                opened.callback(sock.close)
            self._rules = Ruleset(name, _doors(tcp, udp), uids)
            self._make_table(name)
            opened.pop_all()
        self._acceptors = [Acceptor(sock, self._accepted) for sock in tcp.values()]
        self._udp_doors = list(udp.values())
        for sock in self._udp_doors:
            self._loop.add_reader(sock, self._readable, sock)

    @property
    def bound(self) -> frozenset[VirtualPort]:
        """What is published."""
        return frozenset(self._spots.values())

    def apply(self, wanted: Iterable[VirtualPort], pools: frozenset[AnyNetwork]) -> None:
        """Publish what is wanted and nothing else. Raises NftError when the table is not ours any more."""
        protocols = ("tcp",) if self._write is None else ("tcp", "udp")
        spots = {Spot(at.protocol, at.at, at.port): at for at in wanted if at.protocol in protocols}
        before = self._spots
        if pools != self._pools:
            self._nft.run(self._rules.pools(pools - self._pools, self._pools - pools))
            self._pools = pools
        for commands in self._rules.change(spots.keys() - before.keys(), before.keys() - spots.keys()):
            self._nft.run(commands)
        self._spots = spots  # not before the kernel has it so
        self._change_udp(
            {spot for spot in before.keys() | spots.keys() if before.get(spot) != spots.get(spot)}
        )

    async def run(self) -> None:
        """Count what the kernel refused, until cancelled."""
        while True:
            await asyncio.sleep(COUNT_SECONDS)
            self.count()

    def count(self) -> None:
        """Take over what the kernel refused to users that may not."""
        try:
            count = self._rules.refused(self._nft.run(self._rules.read_refused()))
        except NftError as error:
            _log.warning("rules_lost", detail=error)
            return
        if count:
            REFUSALS.labels(REFUSED_WHERE, Reason.NO_GRANT.value).inc(count)
            _log.info("users_refused", packets=count, reason=Reason.NO_GRANT)

    def close(self) -> None:
        """Take nothing more; give the sockets and the table back. Connections that were handed on break."""
        for acceptor in self._acceptors:
            acceptor.close()
        for sock in self._udp_doors:
            self._loop.remove_reader(sock)
            sock.close()
        for port in self._udp.values():
            port.close()
        self._nft.close()

    def _make_table(self, name: str) -> None:
        try:
            self._nft.run(self._rules.create())
        except NftError:
            if self._has_table(name):
                raise ZtnaError(
                    f"agent.pool: the nftables table inet {name} is there already: another agent on this host has this "
                    "pool; give each its own pool, or end that agent"
                ) from None
            raise

    def _has_table(self, name: str) -> bool:
        try:
            self._nft.run(f"list table inet {name}")
        except NftError:
            return False
        return True

    def _change_udp(self, changed: Iterable[Spot]) -> None:
        for spot in changed:
            if spot.protocol != "udp":
                continue
            if (port := self._udp.pop(spot, None)) is not None:
                port.close()
            if (at := self._spots.get(spot)) is not None and self._write is not None:
                self._udp[spot] = PacketPort(at, self._write)

    def _accepted(self, local: socket.socket, source: SockAddr) -> None:
        called = _original_destination(local)
        at = self._spots.get(Spot("tcp", *called)) if called is not None else None
        if at is None:
            # Somebody called the listener itself, or the port was taken back meanwhile.
            dropped(_WHERE, "not_published")
            abort(local)
            return
        self._accept(at, local, source)

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(DATAGRAMS_PER_WAKEUP):
            try:
                data, ancillary, _flags, source = sock.recvmsg(DATAGRAM_BYTES_MAX, _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue
            called = next((decode_address(raw) for _level, _kind, raw in ancillary), None)
            port = self._udp.get(Spot("udp", *called)) if called is not None else None
            if port is None:
                dropped(_WHERE, "not_published")
                continue
            self._receive(port, data, source[:2])
            if sock.fileno() < 0:
                return


def _doors(
    tcp: Mapping[socket.AddressFamily, socket.socket], udp: Mapping[socket.AddressFamily, socket.socket]
) -> Doors:
    tcp_ports, udp_ports = (
        {family: sock.getsockname()[1] for family, sock in doors.items()} for doors in (tcp, udp)
    )
    return Doors(
        tcp4=tcp_ports[socket.AF_INET],
        tcp6=tcp_ports.get(socket.AF_INET6),
        udp4=udp_ports.get(socket.AF_INET),
        udp6=udp_ports.get(socket.AF_INET6),
    )


def _tcp_door(family: socket.AddressFamily) -> socket.socket:
    try:
        sock = socket.create_server((_LOOPBACK[family], 0), family=family, backlog=BACKLOG_CONNECTIONS)
    except OSError as error:
        raise ZtnaError(f"agent: no listener on {_LOOPBACK[family]}: {error.strerror}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setblocking(False)
    return sock


def _udp_door(family: socket.AddressFamily) -> socket.socket:
    return bind_udp((_LOOPBACK[family], 0), prepare=_see_through)


def _see_through(sock: socket.socket) -> None:
    """Let it take datagrams for any address and tell which (ip(7)); needs CAP_NET_ADMIN or CAP_NET_RAW."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(_SOL_IPV6, _IPV6_TRANSPARENT, 1)
        sock.setsockopt(_SOL_IPV6, _IPV6_RECVORIGDSTADDR, 1)


def _original_destination(local: socket.socket) -> SockAddr | None:
    level = socket.IPPROTO_IP if local.family == socket.AF_INET else _SOL_IPV6
    try:
        return decode_address(local.getsockopt(level, _SO_ORIGINAL_DST, _SOCKADDR_BYTES[local.family]))
    except OSError:
        return None  # it was not redirected
