"""Try a service out step by step, as a flow would go, for `ztna trace` and `ztna ping`.

Uses the agent's own sessions, links and carriers, so that what it finds is what programs meet. Carries nobody's data;
names are the caller's to resolve.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from sidecar.agent.broker import Broker
from sidecar.agent.carriers import Carriers
from sidecar.agent.commands import Session
from sidecar.agent.links import Link, Links
from sidecar.agent.streams import FLOW_KEY_BYTES
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.stream import Carrier, FlowRefused
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused
from ztna.leases import Lease, Port
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.traced import Pong, Step
from ztna.wire.control import Address
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame

LINK_SECONDS = 6.0
ROUND_TRIP_SECONDS = 5.0
POLL_SECONDS = 0.02
PORTS_TRIED_MAX = 16
NO_PORT = 0
_SOURCE = Address("127.0.0.1", 9)
"""Where the tried flow says it comes from: nobody answers there."""


class Tracer:
    """Tries services out; `leases` are those that the agent serves."""

    def __init__(
        self,
        broker: Broker,
        links: Links,
        carriers: Carriers,
        *,
        leases: Callable[[], Mapping[ServiceName, Lease]],
        credentials: Callable[[], Credentials],
        is_udp_blocked: Callable[[str], bool],
    ) -> None:
        self._broker = broker
        self._links = links
        self._carriers = carriers
        self._leases = leases
        self._credentials = credentials
        self._is_udp_blocked = is_udp_blocked

    async def trace(self, name: str) -> list[Step]:
        """Return the steps to a service's backend, up to the first that fails. Raises BadName."""
        service = ServiceName(name)
        steps: list[Step] = []
        identity, lease = self._credentials().identity, self._leases().get(service)
        granted = identity.may_use(service)
        told = f"{identity.name} {'may' if granted else 'may not'} use {service}"
        steps.append(Step("grant", granted, told, reason=None if granted else Reason.NO_GRANT))
        if not granted:
            return steps
        if lease is None:
            told = f"{service} has no virtual address that this agent serves"
            return [*steps, Step("lease", False, told, reason=Reason.NO_SUCH_SERVICE)]
        ports = ", ".join(f"{port.protocol}:{port.port}" for port in lease.ports)
        steps += [Step("lease", True, f"{lease.ip} epoch {lease.epoch}, {ports}"), self._relay()]
        if not steps[-1].ok:
            return steps
        started = time.monotonic()
        try:
            async with self._session(service) as session:
                opened = session.opened
                told = f"{opened.session} by relay {session.relay} to connector {opened.connector_id}"
                steps.append(Step("session", True, told, _ms(started)))
                steps += await self._beyond(session, lease)
        except Refused as error:
            steps.append(Step("session", False, f"refused: {error}", _ms(started), error.reason))
        return steps

    async def ping(self, name: str) -> Pong:
        """Return one round trip to whoever serves the service. Raises BadName, Refused, LinkError."""
        async with self._session(ServiceName(name)) as session:
            return await self._round_trip(session)

    def _relay(self) -> Step:
        relays = self._broker.sessions.relays
        preferred = relays.preferred
        if preferred is None:
            return Step("relay", False, "no relay is connected", reason=Reason.PEER_GONE)
        return Step("relay", True, f"{preferred} is {relays.state(preferred)}")

    async def _beyond(self, session: Session, lease: Lease) -> list[Step]:
        """Try both carriers, and each TCP port's backend."""
        steps = [await self._packet_carrier(session)]
        tcp = [port for port in lease.ports if port.protocol == "tcp"][:PORTS_TRIED_MAX]
        steps += [await self._backend(session, port) for port in tcp]
        steps += [
            Step(
                f"backend {port.protocol}:{port.port}",
                None,
                "not tried: only its program knows what it answers",
            )
            for port in lease.ports
            if port.protocol != "tcp"
        ]
        return steps

    async def _packet_carrier(self, session: Session) -> Step:
        started = time.monotonic()
        try:
            pong = await self._round_trip(session)
        except (LinkError, Refused) as error:
            return Step("packet carrier", False, str(error), _ms(started), Reason.PEER_GONE)
        by = f" by relay {pong.relay}" if "direct" not in pong.path else ""
        return Step("packet carrier", True, f"{pong.path}{by}, round trip {pong.ms:.1f} ms", _ms(started))

    async def _round_trip(self, session: Session) -> Pong:
        """Measure on the packet link, or over TLS where UDP is blocked. Raises LinkError, Refused."""
        connector = session.opened.connector_id
        if not self._is_udp_blocked(session.relay):
            try:
                link = await self._link(session)
            except LinkError:
                return await self._over_tls(session)
            assert link.packet_link is not None, "a link that is ready has one"
            return Pong(connector, link.relay, link.packet_link.path, await _ping(link))
        return await self._over_tls(session)

    async def _over_tls(self, session: Session) -> Pong:
        """Ask for a port that nobody publishes, which the connector denies without asking a backend."""
        carrier = self._carriers.take_idle(session) or await self._carriers.dial(session)
        path = f"over TLS, {_way(carrier)}"
        started = time.monotonic()
        try:
            flow = await self._open(carrier, session, NO_PORT)
        except FlowRefused:
            return Pong(session.opened.connector_id, session.relay, path, _ms(started))
        flow.reset(Reason.CLOSED_BY_PEER)
        raise LinkError("the connector opened a port that nobody publishes")

    async def _backend(self, session: Session, port: Port) -> Step:
        """Have the connector connect to the backend, and reset that at once."""
        name, started = f"backend {port.protocol}:{port.port}", time.monotonic()
        try:
            carrier = self._carriers.take_idle(session) or await self._carriers.dial(session)
        except (LinkError, Refused) as error:
            return Step(name, False, f"no stream carrier: {error}", _ms(started), Reason.PEER_GONE)
        try:
            flow = await self._open(carrier, session, port.port)
        except (FlowRefused, LinkError) as error:
            return Step(name, False, f"{_way(carrier)}: {error}", _ms(started), Reason.NO_HEALTHY_CONNECTOR)
        flow.reset(Reason.CLOSED_BY_PEER)
        return Step(name, True, f"connected, stream carrier {_way(carrier)}", _ms(started))

    async def _open(self, carrier: Carrier, session: Session, port: int) -> TcpFlow:
        """Open a flow that no program has. Raises FlowRefused, LinkError."""
        local, program = await _connected_pair()
        frame = OpenFrame(
            session=session.opened.session,
            flow=secrets.token_hex(FLOW_KEY_BYTES),
            service=session.service,
            lease=session.lease,
            source=_SOURCE,
            destination=Address(str(session.lease.ip), port),
            window=WINDOW_BYTES_MIN,
        )
        try:
            return await carrier.open(frame, local)
        except BaseException:
            abort(local)
            raise
        finally:
            program.close()

    @asynccontextmanager
    async def _session(self, service: ServiceName) -> AsyncIterator[Session]:
        number = self._broker.number()
        session = await self._broker.acquire(number, service)
        try:
            yield session
        finally:
            self._broker.release(number)

    async def _link(self, session: Session) -> Link:
        """Wait until the session's packet link is ready. Raises LinkError."""
        link = self._links.of(session)
        if link is None:
            raise LinkError(
                "no packet link: the relay has no forwarder, or the connector may not serve this session"
            )
        try:
            async with asyncio.timeout(LINK_SECONDS):
                while not (link.is_ready and link.packet_link is not None):
                    if link.is_over:
                        raise LinkError("the packet link could not be made")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise LinkError(f"no packet link within {LINK_SECONDS:g} s: UDP may be blocked") from None
        return link


def _way(carrier: Carrier) -> str:
    if not carrier.is_tcp:
        return "on the packet link"
    return "forwarded" if carrier.forwarded else "direct"


async def _ping(link: Link) -> float:
    """Return a link's round trip now, in milliseconds. Raises LinkError."""
    assert link.packet_link is not None, "a link that is ready has one"
    try:
        async with asyncio.timeout(ROUND_TRIP_SECONDS):
            return round(1000 * await link.packet_link.round_trip(), 3)
    except TimeoutError:
        raise LinkError(f"no answer within {ROUND_TRIP_SECONDS:g} s") from None


async def _connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection on loopback, for a flow that wants a program's socket."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        program = socket.socket()
        program.setblocking(False)
        try:
            await loop.sock_connect(program, server.getsockname())
            while True:
                local, source = await loop.sock_accept(server)
                if source == program.getsockname():
                    break
                abort(local)  # somebody on this host was faster, and has no business with a backend
        except BaseException:
            program.close()
            raise
    return local, program


def _ms(started: float) -> float:
    return round(1000 * (time.monotonic() - started), 1)
