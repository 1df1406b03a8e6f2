"""ztna-sidecar agent: puts listeners, sessions, links, relays and leases together and runs them.

Decides nothing about sessions (sidecar.agent.sessions does) and moves no bytes (sidecar.link does).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from sidecar.agent.anyip import check_overrides, check_pool, check_ula, local_route, runtime_directory
from sidecar.agent.broker import Broker, Outside
from sidecar.agent.carriers import Carriers
from sidecar.agent.commands import (
    Ended,
    LeaseIs,
    Measured,
    Received,
    RelayDown,
    RelayEvent,
    RelayForgotten,
    RelayHeard,
    RelaySilent,
    RelayUp,
    Session,
)
from sidecar.agent.datagrams import Datagrams
from sidecar.agent.front import Front
from sidecar.agent.lanes import Lanes
from sidecar.agent.leases import LeaseFollower
from sidecar.agent.links import Links
from sidecar.agent.listeners import VirtualPort
from sidecar.agent.names import RelayedNames
from sidecar.agent.ranges import Ranges, Take
from sidecar.agent.relayed_leases import RelayedLeases
from sidecar.agent.relays import RelayState
from sidecar.agent.sessions import Sessions
from sidecar.agent.stream_links import StreamLinks
from sidecar.agent.streams import Streams
from sidecar.agent.stub import Stub
from sidecar.agent.told import UNKNOWN, HealthBook
from sidecar.agent.tracing import Tracer
from sidecar.agent.tun import Tun
from sidecar.link.control import RelayClient
from sidecar.link.measures import measure
from sidecar.link.network import Network
from sidecar.link.pulse import Life
from sidecar.link.quic_stream import QuicStream
from sidecar.link.relays import LEAVE_SECONDS, RelayClients
from ztna.config import AgentConfig, RelayTarget
from ztna.consul.client import ConsulClient
from ztna.credentials import Credentials
from ztna.errors import ConfigError, LinkError
from ztna.leases import Lease
from ztna.names import ServiceName
from ztna.renewal import Renewal
from ztna.runtime import CONSUL_TOKEN, Daemon
from ztna.telemetry import LEASES_KNOWN, dropped, logger
from ztna.wire.control import (
    AnyMessage,
    Conflict,
    DialToken,
    DnsResponse,
    Drain,
    Health,
    LeaseRef,
    StartPunching,
)

_SOURCES = {"consul": "Consul", "relay": "DNS through a relay"}

_log = logger(__name__)


async def body(daemon: Daemon) -> None:
    """Run the agent until the daemon stops. Raises ConfigError or another ZtnaError when it cannot."""
    config = daemon.config.agent
    assert config is not None, "daemon_command refuses a configuration without the section"
    daemon.readiness.awaiting("relay", "no relay is connected yet")
    daemon.readiness.awaiting("leases", f"not yet read from {_SOURCES[config.names]}")
    pools = (config.pool, *config.more_pools)
    for pool in pools:
        check_pool(config.mode, pool)
    if config.ula is not None:
        check_ula(config.mode, config.ula)
    check_overrides(config.overrides)
    if not config.relays and not config.resolvers:
        raise ConfigError("agent.relays: expected at least one relay, or agent.resolvers to find them")
    credentials = Credentials.load(config.tls)
    async with contextlib.AsyncExitStack() as stack:
        client = None
        if config.names == "consul":
            made = ConsulClient(daemon.config.consul, daemon.readiness.shower(CONSUL_TOKEN))
            client = await stack.enter_async_context(made)
        tun = await stack.enter_async_context(_device()) if config.mode == "tun" else None
        name = credentials.identity.name
        ranges = Ranges(
            client,
            name,
            (*pools, config.ula) if config.ula is not None else pools,
            daemon.readiness,
            take=_take(config, tun),
            overrides={each.service: each.ip for each in config.overrides},
            hosts_file=Path(config.hosts_file),
            domain=daemon.config.domain,
            own_device=tun.index if tun is not None else None,
        )
        await stack.enter_async_context(ranges)
        try:
            async with asyncio.TaskGroup() as tasks:
                await Agent(daemon, config, credentials, client, ranges, tun, tasks).run()
                raise _Stopped
        except* _Stopped:
            pass


class Agent:
    """A running agent."""

    def __init__(
        self,
        daemon: Daemon,
        config: AgentConfig,
        credentials: Credentials,
        client: ConsulClient | None,
        ranges: Ranges,
        tun: Tun | None,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._daemon = daemon
        self._health = HealthBook()
        self._ranges = ranges
        self._config = config
        self._credentials = credentials
        self._tasks = tasks
        self._relays = RelayClients(
            self._relay_client,
            tasks=tasks,
            left=self._relay_left,
            back=self._relay_back,
            gone=lambda label: self._relay_event(RelayForgotten(label)),
        )
        self._relays.add(config.relays)
        self._broker = Broker(
            Sessions(map(self._relays.label, self._relays), config.flows_total),
            Outside(
                send=self._send,
                read_lease=self._read_lease,
                ended=self._ended,
                leave=self._leave,
                run_out=self._run_out,
            ),
        )
        self._network = Network(self._network_changed)
        self._carriers = Carriers(
            self._proven,
            send=self._send,
            dial_at=self._relays.dial_at,
            over_link=self._stream_of_link,
            is_link_better=self._is_punched_for_tcp,
            tasks=tasks,
            direct=config.direct,
        )
        self._streams = Streams(self._broker, self._carriers, tasks=tasks)
        self._links = Links(
            self._proven,
            tasks=tasks,
            relays=self._broker.sessions.relays,
            send=self._send,
            addresses=lambda: self._network.addresses,
            direct=config.direct,
            private_candidates=config.private_candidates,
        )
        self._tracer = Tracer(
            self._broker,
            self._links,
            self._carriers,
            leases=lambda: self._follower.leases,
            credentials=lambda: self._credentials,
            is_udp_blocked=self._relays.is_udp_blocked,
        )
        streams = StreamLinks(self._carriers, tasks=tasks)
        self._lanes = Lanes(self._links, streams, is_udp_blocked=self._relays.is_udp_blocked)
        self._datagrams = Datagrams(self._broker, self._lanes, idle_s=config.udp_idle_s)
        self._lanes.flows = self._datagrams
        self._links.unfit = self._datagrams.session_unfit
        self._links.received = streams.received = self._datagrams.packet_received
        self._front = Front(
            config, self._streams.accepted, self._datagrams.received, daemon.readiness.show, tun=tun
        )
        self._names = RelayedNames(self._broker.sessions.relays, self._relays.send)
        self._follower = self._lease_follower(client)
        self._stub: Stub | None = None
        if config.dns_listen is not None:
            zone, follower = daemon.config.domain, self._follower
            resolved = follower.resolved if isinstance(follower, RelayedLeases) else None
            self._stub = Stub(config.dns_listen, zone, self._names.exchange, self._is_virtual, resolved)
        self._renewal = Renewal(
            config.tls,
            credentials,
            daemon.readiness,
            check=lambda _: None,
            accept=self._use_credentials,
        )
        ranges.tell = self._tell_relays
        ranges.leases = self._follower.addresses
        ranges.serving = lambda: self._follower.leases
        ranges.moved = self._move

    def _lease_follower(self, client: ConsulClient | None) -> LeaseFollower | RelayedLeases:
        grants, domain = self._credentials.identity.agent, self._daemon.config.domain
        if client is not None:
            return LeaseFollower(
                client, grants, self._is_ours, changed=self._leases_changed, read=self._lease_read
            )
        return RelayedLeases(
            self._names, domain, grants, self._is_ours, changed=self._leases_changed, read=self._lease_read
        )

    async def run(self) -> None:
        """Serve until the daemon stops, then let what runs finish for a while."""
        self._daemon.status_sources["agent"] = self.status
        self._daemon.measures.append(self._measure)
        self._daemon.probes |= {"trace": self._tracer.trace, "ping": self._tracer.ping}
        self._daemon.on_reload.append(self._renewal.reload)
        self._daemon.status_sources["certificate"] = self._renewal.status
        self._relays.start(self._config.resolvers, self._daemon.config.domain)
        for what in (
            self._renewal,
            self._follower,
            self._front,
            self._datagrams,
            self._links,
            self._lanes,
            self._network,
            self._ranges,
        ):
            self._tasks.create_task(what.run(), name=type(what).__name__)
        if self._stub is not None:
            self._tasks.create_task(self._stub.run(), name="Stub")
        await self._daemon.stopping.wait()
        await self._drain()

    def status(self) -> object:
        """Return what `/status` shows."""
        views = {view.service: view for view in self._broker.sessions.views()}
        listening = _by_service(self._front.bound)
        return {
            "mode": self._config.mode,
            **self._front.status(),
            "pool": str(self._config.pool),
            "names": self._config.names,
            "stub": self._stub.status() if self._stub is not None else None,
            "ranges": self._ranges.status(),
            "relays": [
                {
                    "relay": label,
                    "state": self._broker.sessions.relays.state(label),
                    "preferred": self._broker.sessions.relays.preferred == label,
                    "transport": client.transport,
                    "version": client.software or None,
                    "rtt_ms": _milliseconds(client.rtt_s),
                    "problem": client.problem,
                }
                for client in self._relays
                for label in (self._relays.label(client),)
            ],
            "services": [
                {
                    "service": service,
                    "ip": str(lease.ip),
                    "epoch": lease.epoch,
                    "ports": [{"protocol": port.protocol, "port": port.port} for port in lease.ports],
                    "listening": sorted(map(str, listening.get(service, ()))),
                    "state": views[service].state if service in views else "idle",
                    "reason": views[service].reason if service in views else None,
                    **self._health_of(service),
                    "connector": _connector(views[service].session) if service in views else None,
                }
                for service, lease in sorted(self._follower.leases.items())
            ],
            "held_ports": {str(at): why for at, why in sorted(self._front.held.items())},
            "sessions": [_session(session) for session in self._broker.sessions.sessions],
            "links": self._lanes.status(),
            "streams": self._streams.status(),
            "udp_flows": self._datagrams.flows,
        }

    def _measure(self) -> None:
        LEASES_KNOWN.set(len(self._follower.leases))
        measure(
            self._relays,
            self._lanes.status(),
            sessions=len(self._broker.sessions.sessions),
            tcp_flows=self._streams.flows,
            udp_flows=self._datagrams.flows,
        )

    def _health_of(self, service: ServiceName) -> dict[str, object]:
        told = self._health.of(service)
        if told is None:
            return {"health": UNKNOWN, "health_since_s": None}
        now = asyncio.get_running_loop().time()
        return {"health": told.state, "health_since_s": round(now - told.since, 1)}

    async def _drain(self) -> None:
        """Take nothing new, let TCP flows finish for `drain_s`, then end what is left."""
        self._front.apply({}, self._ranges.places)
        try:
            async with asyncio.timeout(self._config.drain_s):
                await self._streams.quiet.wait()
        except TimeoutError:
            _log.warning("flows_cut", flows=self._streams.flows)
        self._front.close()
        self._carriers.close()
        self._lanes.close()
        self._broker.close()

    # --- relays

    def _relay_client(self, target: RelayTarget) -> RelayClient:
        return RelayClient(
            target,
            self._credentials,
            on_message=self._message,
            on_connected=self._connected,
            on_lost=self._lost,
            on_pulse=self._pulse,
            is_busy=self._is_busy,
        )

    def _relay_left(self, client: RelayClient) -> None:
        """Leave a relay that DNS names no longer, as if it drained."""
        self._relay_event(Received(self._relays.label(client), Drain(LEAVE_SECONDS)))

    def _relay_back(self, client: RelayClient) -> None:
        if client.connected:
            self._relay_event(RelayUp(self._relays.label(client)))

    def _connected(self, client: RelayClient) -> None:
        _log.info("relay_connected", relay=self._relays.label(client), transport=client.transport)
        self._daemon.readiness.done("relay")
        self._relay_event(RelayUp(self._relays.label(client)))
        if isinstance(self._follower, RelayedLeases):
            self._follower.look_soon()
        for conflict in self._ranges.conflicts():
            client.send(conflict)

    def _lost(self, client: RelayClient, reason: str) -> None:
        log = _log.info if self._daemon.stopping.is_set() else _log.warning
        log("relay_lost", relay=self._relays.label(client), detail=reason)
        self._health.lost(self._relays.label(client))
        self._relay_event(RelayDown(self._relays.label(client), client.lost_by))
        if not self._relays.connected:
            self._daemon.readiness.awaiting("relay", "the connection to every relay is lost")

    def _proven(self, relay: str) -> Credentials:
        return self._relays.proven(relay) or self._credentials

    def _pulse(self, client: RelayClient) -> None:
        relay = self._relays.label(client)
        state = self._broker.sessions.relays.state(relay)
        if client.life is Life.SILENT and state is RelayState.UP:
            _log.warning("relay_silent", relay=relay)
            self._relay_event(RelaySilent(relay))
        elif client.life is Life.UP and state is RelayState.SILENT:
            _log.info("relay_heard", relay=relay)
            self._relay_event(RelayHeard(relay))
        self._network.observed(client.connection, client.observed)
        if client.rtt_s is not None:
            preferred = self._broker.sessions.relays.preferred
            self._broker.handle(Measured(relay, client.rtt_s))
            if self._broker.sessions.relays.preferred != preferred:
                self._links.relays_changed()

    def _is_busy(self, client: RelayClient) -> bool:
        return self._broker.sessions.is_used(self._relays.label(client))

    def _message(self, client: RelayClient, message: AnyMessage) -> None:
        relay = self._relays.label(client)
        match message:
            case DialToken():
                self._carriers.dial_token(relay, message)
            case DnsResponse():
                self._names.received(relay, message)
            case StartPunching():
                self._links.start_punching(relay, message)
            case Drain():
                _log.info(
                    "relay_drains", relay=relay, deadline_s=message.deadline_s, others=list(message.relays)
                )
                self._relay_event(Received(relay, message))
            case _:
                if isinstance(message, Health):
                    self._hear_health(relay, message)
                self._broker.handle(Received(relay, message))

    def _hear_health(self, relay: str, message: Health) -> None:
        if not self._health.heard(relay, message.service, message.state, asyncio.get_running_loop().time()):
            dropped("agent", "too_many_services")
        elif isinstance(self._follower, RelayedLeases):
            # What made its health another may have made its lease another.
            self._follower.read_again(message.service)

    def _send(self, relay: str, message: AnyMessage) -> None:
        # When it is not connected the loss of all its sessions is reported by on_lost.
        self._relays.send(relay, message)

    def _network_changed(self) -> None:
        for client in self._relays:
            client.network_changed()
        self._links.network_changed()
        self._carriers.network_changed(self._network.held)

    def _is_punched_for_tcp(self, session: Session) -> bool:
        return self._config.tcp_on_punched == "packet" and self._links.is_direct(session)

    async def _stream_of_link(self, session: Session) -> QuicStream:
        if self._relays.is_udp_blocked(session.relay):
            raise LinkError("UDP is blocked")
        return await self._links.stream(session)

    def _tell_relays(self, conflict: Conflict) -> None:
        for client in self._relays:
            client.send(conflict)

    # --- sessions and leases

    def _ended(self, ended: Ended) -> None:
        self._streams.session_ended(ended.session, ended.reason)
        if ended.relay_lost:
            self._datagrams.leave(ended.session)
        else:
            self._datagrams.session_ended(ended.session)
        self._lanes.session_ended(ended.session, ended.reason, relay_lost=ended.relay_lost)

    def _relay_event(self, event: RelayEvent | Received) -> None:
        self._broker.handle(event)
        self._links.relays_changed()

    def _leave(self, session: Session) -> None:
        self._streams.session_left(session)
        self._datagrams.leave(session)

    def _run_out(self, session: Session) -> None:
        self._streams.session_retired(session)
        self._datagrams.session_ended(session)

    def _read_lease(self, service: ServiceName) -> None:
        self._follower.read_again(service)

    def _lease_read(self, service: ServiceName, lease: Lease | None) -> None:
        # One that has gone since the watch said otherwise goes from the listeners when the watch says so.
        if lease is not None and service in self._follower.leases:
            self._broker.handle(LeaseIs(service, LeaseRef(lease.ip, lease.epoch)))

    def _leases_changed(self, leases: Mapping[ServiceName, Lease]) -> None:
        for view in self._broker.sessions.views():
            if view.service not in leases:
                self._broker.handle(LeaseIs(view.service, None))
        for service, lease in leases.items():
            self._broker.handle(LeaseIs(service, LeaseRef(lease.ip, lease.epoch)))
        self._move()
        self._daemon.readiness.done("leases")

    def _is_ours(self, service: ServiceName, lease: Lease) -> bool:
        overridden = any(each.service == service for each in self._config.overrides)
        return overridden or self._is_virtual(lease.ip)

    def _is_virtual(self, address: IPv4Address | IPv6Address) -> bool:
        networks = (self._config.pool, *self._config.more_pools, self._config.ula)
        return any(network is not None and address in network for network in networks)

    def _move(self) -> None:
        """Listen where services can be served now, and nowhere else; flows elsewhere end while they can be told."""
        if self._daemon.stopping.is_set():
            return
        places = self._ranges.places
        self._front.apply(self._follower.leases, places)
        self._streams.leave(lambda at: not places.has(ip_address(at.at)))

    def _use_credentials(self, credentials: Credentials) -> None:
        """Prove ourselves with these from now on."""
        self._credentials = credentials
        self._relays.use_credentials(credentials)
        self._follower.use_grants(credentials.identity.agent)


class _Stopped(Exception):
    """The agent has drained: what still runs is cancelled before what lies under it is given back."""


@contextlib.asynccontextmanager
async def _device() -> AsyncIterator[Tun]:
    tun = await asyncio.to_thread(Tun)
    try:
        yield tun
    finally:
        tun.close()


def _take(config: AgentConfig, tun: Tun | None) -> Take | None:
    """Return what has a network routed to the agent in its mode."""
    if config.mode == "listen":
        return None
    return lambda pool: local_route(pool, runtime_directory(), tun)


def _by_service(ports: Iterable[VirtualPort]) -> dict[ServiceName, list[VirtualPort]]:
    by_service: dict[ServiceName, list[VirtualPort]] = {}
    for at in ports:
        by_service.setdefault(at.service, []).append(at)
    return by_service


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _connector(session: Session | None) -> str | None:
    return session.opened.connector_id if session is not None else None


def _session(session: Session) -> dict[str, object]:
    return {
        "session": session.opened.session,
        "relay": session.relay,
        "service": session.service,
        "connector": session.opened.connector_id,
        "epoch": session.lease.epoch,
        "link_address": str(session.opened.link_address) if session.opened.link_address else None,
    }
