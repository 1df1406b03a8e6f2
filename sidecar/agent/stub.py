"""A stub resolver for this host's programs: names of the mesh, asked through the relays (`agent.dns_listen`).

UDP and TCP, the zone and the reverse names of the pools only; everything else is refused, so that it can stand beside
the host's own resolver. Keeps answers as long as their TTL. Source: design.md 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from ipaddress import IPv4Address

from sidecar.agent.stubbing import IsOurs, Query, addresses_in, aged, fitting, refusal, tailored, ttl_of
from ztna.config import Endpoint
from ztna.dns import Code
from ztna.errors import ProtocolError, ResolverUnavailable
from ztna.listening import bind_error
from ztna.names import Zone
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr, UdpSocket

KEPT_MAX = 4_096
QUESTIONS_WAITING_MAX = 256
CONNECTIONS_MAX = 64
IDLE_SECONDS = 10.0
QUERY_BYTES_MAX = 1_024
_LENGTH = struct.Struct("!H")
_WHERE = "agent_stub"

_log = logger(__name__)

Exchange = Callable[[bytes], Awaitable[bytes]]
Resolved = Callable[[str, Collection[IPv4Address]], Awaitable[None]]
"""Is awaited before a program hears where a name leads, so that somebody is there when it calls."""


class Stub:
    """Answers on one address. `run` owns the questions that are under way."""

    def __init__(
        self, at: Endpoint, zone: Zone, exchange: Exchange, is_ours: IsOurs, resolved: Resolved | None = None
    ) -> None:
        """Bind, UDP and TCP. `exchange` returns the response to a query; only addresses that are ours are passed on.

        Raises ZtnaError for a port that is taken.
        """
        self._zone = zone
        self._exchange = exchange
        self._is_ours = is_ours
        self._resolved = resolved
        self._kept: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._waiting = 0
        self._connections = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._listener = socket.socket(socket.AF_INET6 if ":" in at.host else socket.AF_INET)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((at.host, at.port))
            self._udp = UdpSocket.open((at.host, self._listener.getsockname()[1]), self._packets)
        except OSError as error:
            self._listener.close()
            raise bind_error(at, error) from None
        except BaseException:
            self._listener.close()
            raise

    @property
    def address(self) -> SockAddr:
        """Where it answers, UDP and TCP."""
        return self._udp.address

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            server = await asyncio.start_server(self._connected, sock=self._listener)
            async with server, asyncio.TaskGroup() as self._tasks:
                await asyncio.Event().wait()
        finally:
            self._udp.close()

    def status(self) -> dict[str, object]:
        """Return what `/status` shows."""
        return {"address": "{}:{}".format(*self.address), "kept": len(self._kept), "waiting": self._waiting}

    def _packets(self, packets: list[tuple[bytes, SockAddr]]) -> None:
        for data, source in packets:
            if self._tasks is None or self._waiting >= QUESTIONS_WAITING_MAX:
                dropped(_WHERE, "too_many")
                continue
            self._waiting += 1
            self._tasks.create_task(self._over_udp(data, source), name="dns question")

    async def _over_udp(self, data: bytes, source: SockAddr) -> None:
        try:
            query = Query.of(data)
            response = await self._answer(query)
            self._udp.send([(tailored(response, query, query.udp_payload), source)])
        except ProtocolError:
            dropped(_WHERE, "malformed")
        finally:
            self._waiting -= 1

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= CONNECTIONS_MAX:
            dropped(_WHERE, "connections_full")
            writer.close()
            return
        self._connections += 1
        try:
            with contextlib.suppress(EOFError, OSError, TimeoutError, ProtocolError):
                while True:
                    await self._over_tcp(reader, writer)
        finally:
            self._connections -= 1
            writer.close()

    async def _over_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(IDLE_SECONDS):
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > QUERY_BYTES_MAX:
                dropped(_WHERE, "malformed")
                raise EOFError
            query = Query.of(await reader.readexactly(length))
        response = tailored(await self._answer(query), query, None)
        writer.write(_LENGTH.pack(len(response)) + response)
        async with asyncio.timeout(IDLE_SECONDS):
            await writer.drain()

    async def _answer(self, query: Query) -> bytes:
        """Return the response, of whatever id; REFUSED for names of others, SERVFAIL when no relay tells."""
        if not query.is_of(self._zone):
            return refusal(query, Code.REFUSED)
        now = time.monotonic()
        kept = self._kept.get(query.key)
        if kept is not None and now < kept[1]:
            return aged(kept[0], int(kept[1] - now) + 1)
        try:
            response = fitting(await self._exchange(query.data), query, self._zone, self._is_ours)
        except ProtocolError as error:
            dropped(_WHERE, "malformed_answer")
            _log.debug("not_answered", name=query.name, detail=error)
            return refusal(query, Code.SERVFAIL)
        except ResolverUnavailable as error:
            _log.debug("not_answered", name=query.name, detail=error)
            return refusal(query, Code.SERVFAIL)
        if self._resolved is not None and (addresses := addresses_in(response)):
            await self._resolved(query.name, addresses)
        self._keep(query.key, response, now)
        return response

    def _keep(self, key: bytes, response: bytes, now: float) -> None:
        ttl = ttl_of(response)
        if ttl:
            self._kept[key] = (response, now + ttl)
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT_MAX:
                self._kept.popitem(last=False)
