"""The connector daemon: wires configuration, Consul, relays, checks and serving together, and drains at the end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version

from sidecar.connector import check_files, local_api
from sidecar.connector.backend_tls import BackendTls
from sidecar.connector.backends import ping_problem, resolve
from sidecar.connector.delegation import Delegation
from sidecar.connector.departures import Departures
from sidecar.connector.discovery import Discovery
from sidecar.connector.flow_log import FlowLog
from sidecar.connector.fronting import Fronting
from sidecar.connector.leasebook import LeaseBook
from sidecar.connector.probes import Prober
from sidecar.connector.pushes import Pushes
from sidecar.connector.registrar import Desired, Registrant, check_id
from sidecar.connector.registration import Registrar
from sidecar.connector.routes import RouteTable, ServiceRoutes
from sidecar.connector.serving import Serving
from sidecar.link.control import RelayClient
from sidecar.link.measures import measure
from sidecar.link.network import Network
from sidecar.link.relays import RelayClients
from ztna.config import ConnectorConfig, Endpoint, RelayTarget
from ztna.consul.client import ConsulClient
from ztna.credentials import Credentials
from ztna.errors import ConfigError, Refused
from ztna.leases import Lease
from ztna.listening import bind_error
from ztna.names import ServiceName, SessionId
from ztna.renewal import Renewal
from ztna.runtime import CONSUL_TOKEN, Daemon, sleep_or_stop
from ztna.telemetry import SERVICE_HEALTH, VERDICT_AGE, dropped, logger, refused
from ztna.wire import control
from ztna.wire.control import Address, AnyMessage, Offering, Register, Software

SERVICES_PER_REGISTER = 200
"""How many services one `register` names: some 120 bytes each with a few ports, far below a frame's 64 KiB."""
TICK_SECONDS = 1.0

HEALTH = {"critical": 0, "warning": 1, "passing": 2}
"""What the metrics call each verdict."""
_WHERE = "connector"
_WILDCARDS = frozenset({"0.0.0.0", "::"})

_log = logger(__name__)


async def body(daemon: Daemon) -> None:
    """Run the connector until the daemon stops; then drain."""
    config = daemon.config.connector
    if config is None:
        raise ConfigError("connector: the configuration has no such section")
    credentials = Credentials.load(config.tls)
    RouteTable.of({}).require_granted(credentials.identity, config.id)
    _require_services(config)
    if not config.relays and not config.resolvers:
        raise ConfigError(
            "connector.relays: expected at least one relay, or connector.resolvers to find them"
        )
    daemon.readiness.awaiting("relay", "not yet connected")
    daemon.readiness.awaiting("consul", "services are not yet registered")
    async with AsyncExitStack() as stack:
        consul = await stack.enter_async_context(
            ConsulClient(daemon.config.consul, daemon.readiness.shower(CONSUL_TOKEN))
        )
        prober = Prober()
        stack.push_async_callback(prober.close)
        flow_log = FlowLog(config.flow_log)
        stack.callback(flow_log.close)
        try:
            # All that uses them has ended before the Consul client and the prober are closed.
            async with asyncio.TaskGroup() as tasks:
                await _Connector(daemon, config, credentials, consul, prober, flow_log, tasks).run()
                raise _Stopped
        except* _Stopped:
            pass


def _require_services(config: ConnectorConfig) -> None:
    """Raise ConfigError when services can come from nowhere, or the API has no place to keep them."""
    if not (config.routes or config.routes_dir or config.api or config.consul_services):
        raise ConfigError(
            "connector.routes: expected at least one route, or connector.routes_dir, api or consul_services"
        )
    if (config.api is None) != (config.api_state is None):
        raise ConfigError("connector.api: expected connector.api_state beside it, and not one alone")


class _Stopped(Exception):
    """The connector has drained: what still runs is cancelled."""


class _Connector:
    def __init__(
        self,
        daemon: Daemon,
        config: ConnectorConfig,
        credentials: Credentials,
        consul: ConsulClient,
        prober: Prober,
        flow_log: FlowLog,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._daemon = daemon
        self._tasks = tasks
        self._config = config
        self._flow_log = flow_log
        self._consul = consul
        self._loop = asyncio.get_running_loop()
        self._backend_tls = BackendTls()
        self._discovery = Discovery(daemon, credentials, consul, check=self._require_files, tasks=tasks)
        self._pushes = Pushes()
        self._fronting = Fronting(
            self._discovery.table, prober, self._pushes, changed=self._health_changed, tasks=tasks
        )
        self._leases = LeaseBook(consul, self._fronting, self._lease_changed)
        self._network = Network(self._network_changed)
        self._serving = Serving(
            self._fronting,
            credentials,
            leases=self._leases,
            backend_tls=self._backend_tls,
            flows_per_agent=config.flows_per_agent,
            flows_total=config.flows_total,
            flow_log=flow_log,
            addresses=lambda: self._network.addresses,
            private_candidates=config.private_candidates,
            tasks=tasks,
        )
        self._departures = Departures(config.drain_s, self._serving.withdraw)
        self._credentials = credentials
        self._relays = RelayClients(self._relay_client, tasks=tasks, gone=self._relay_gone)
        self._relays.add(config.relays)
        self._refusals: dict[str, dict[str, str]] = {}
        self._renewal = Renewal(
            config.tls,
            credentials,
            daemon.readiness,
            check=self._check_credentials,
            accept=self._use_credentials,
        )
        self._link_address: Address | None = None
        self._software = Software(version("ztna-mesh"))
        self._registrar: Registrar | None = None
        self._delegation: Delegation | None = None

    async def run(self) -> None:
        """Start everything, wait for the stop, drain."""
        self._link_address = await self._listen()
        self._discovery.about = self._service_status
        self._discovery.apply = self._front
        await self._discovery.begin()
        if self._fronting.table.pings and (problem := ping_problem()) is not None:
            self._daemon.readiness.warn("icmp", f"routes of protocol icmp: {problem}; the others are served")
        registrar = self._registrar = Registrar(
            self._consul,
            Registrant(
                self._config.id,
                self._link_address,
                self._config.ttl_s,
                self._config.deregister_critical_after_s,
            ),
            lambda: self._fronting.table.services.keys(),
            self._desired,
            lambda: self._discovery.has_heard_all,
        )
        delegation = self._fronting.delegate = self._delegation = Delegation(
            self._consul,
            self._fronting,
            check_id=lambda service: check_id(service, self._config.id),
            deregister_after_s=self._config.deregister_critical_after_s,
            changed=registrar.checks_changed,
            lost=registrar.check_lost,
        )
        self._daemon.on_reload += [self._renewal.reload, self._discovery.reload, self._flow_log.reopen]
        self._daemon.measures.append(self._measure)
        self._daemon.status_sources["certificate"] = self._renewal.status
        self._daemon.status_sources["connector"] = self._status
        self._daemon.status_sources["discovery"] = self._discovery.status
        tasks = self._tasks
        registering = tasks.create_task(registrar.run(), name="registration")
        tasks.create_task(self._registered(registrar), name="first registration")
        tasks.create_task(self._leases.run(), name="leases")
        tasks.create_task(delegation.run(), name="checks that Consul runs")
        tasks.create_task(self._tick(), name="expiry")
        tasks.create_task(self._renewal.run(), name="certificates")
        tasks.create_task(self._network.run(), name="network")
        self._fronting.start()
        self._relays.start(self._config.resolvers, self._daemon.config.domain)
        async with AsyncExitStack() as stack:
            if self._config.api is not None:
                api = local_api.serving(self._discovery, self._pushes, self._config.api)
                await stack.enter_async_context(api)
            await self._daemon.stopping.wait()
        registering.cancel()
        await asyncio.wait((registering,))  # or a registration on its way would come after we have left
        await self._drain(registrar)

    async def _listen(self) -> Address:
        """Accept stream carriers; return the address that agents may try and the catalog names."""
        config = self._config
        try:
            bound = self._serving.streams.listen((config.link.host, config.link.port))
        except OSError as error:
            raise bind_error(config.link, error) from None
        if config.link_advertise is not None:
            return config.link_advertise
        outside = config.relays[0].address if config.relays else config.resolvers[0]
        host = bound[0] if bound[0] not in _WILDCARDS else await _local_address(outside)
        return Address(host, bound[1])

    async def _drain(self, registrar: Registrar) -> None:
        """Take nothing new, leave relays and Consul, let TCP flows finish for a while, end everything.

        Relays hear it first, so that none sends a session here; what crosses that on its way is refused as draining,
        and the relay tries another connector. Their connections stay for the sessions that run.
        """
        self._serving.begin_drain(self._config.drain_s)
        for client in self._relays:
            self._register(client, (), tuple(self._fronting.table.services))
        leaving = self._tasks.create_task(registrar.leave(), name="leave Consul")
        if not await self._serving.drained():
            _log.warning("drain_cut_short", seconds=self._config.drain_s)
        await leaving
        self._serving.close()

    # Services

    def _require_files(self, table: RouteTable) -> None:
        """Raise ConfigError, naming the service and the file, when this host lacks one that a table's routes name."""
        self._backend_tls.check(table)
        check_files.require(table)

    def _front(self, table: RouteTable) -> None:
        """Front what another table says; who is not concerned does not notice."""
        if self._serving.is_draining:
            return
        before = self._fronting.table
        self._fronting.replace(table)
        self._backend_tls.keep_only(table)
        self._departures.changed(before, table)
        self._leases.services_changed()
        if self._registrar is not None:
            self._registrar.services_changed()
        new = [
            each
            for service, each in table.services.items()
            if service not in before.services or before.services[service].ports != each.ports
        ]
        gone = sorted(before.services.keys() - table.services.keys())
        for client in self._relays:
            if client.connected:
                self._register(client, new, gone)

    def _register(
        self, client: RelayClient, services: Sequence[ServiceRoutes], gone: Sequence[ServiceName] = ()
    ) -> None:
        """Tell a relay what is fronted from now on, and what no more."""
        refusals = self._refusals.get(self._relays.label(client), {})
        for service in gone:
            refusals.pop(service, None)
        for start in range(0, max(len(services), len(gone)), SERVICES_PER_REGISTER):
            part = slice(start, start + SERVICES_PER_REGISTER)
            offerings = tuple(Offering(each.service, each.ports) for each in services[part])
            client.send(
                Register(self._config.id, offerings, self._link_address, tuple(gone[part]), self._software)
            )

    def _health_changed(self, service: ServiceName) -> None:
        if self._registrar is not None:
            self._registrar.verdict_changed(service)

    def _desired(self, service: ServiceName) -> Desired:
        routes, health = self._fronting.table.services[service], self._fronting.health(service)
        verdict, output = health.part(lambda key: not self._fronting.is_delegated(service, key))
        return Desired(
            routes=routes,
            weight=health.weight(routes.weight, self._loop.time()),
            verdict=health.verdict,
            since=health.since,
            output=output,
            lease=self._leases.lease(service),
            reported=verdict,
            probes=self._delegation.probes(service) if self._delegation is not None else (),
        )

    def _lease_changed(self, service: ServiceName, lease: Lease | None) -> None:
        self._serving.lease_changed(service, lease)
        if self._registrar is not None:
            self._registrar.lease_changed()

    async def _registered(self, registrar: Registrar) -> None:
        await registrar.complete.wait()
        self._daemon.readiness.done("consul")

    async def _tick(self) -> None:
        while not await sleep_or_stop(self._daemon, TICK_SECONDS):
            self._serving.tick()
            self._daemon.readiness.show("flow_log", self._flow_log.problem or None)
            self._show_registration()

    def _show_registration(self) -> None:
        registrar, readiness = self._registrar, self._daemon.readiness
        if registrar is None:
            return
        if registrar.complete.is_set():
            # It serves as before: whoever takes it out of use for that would lose more than is lost.
            readiness.show("consul", registrar.trouble)
        else:
            readiness.awaiting("consul", registrar.trouble or "services are not yet registered")

    # Relays

    def _relay_client(self, target: RelayTarget) -> RelayClient:
        return RelayClient(
            target,
            self._credentials,
            on_message=self._message,
            on_connected=self._relay_connected,
            on_lost=self._relay_lost,
            on_packet=self._packet,
            on_pulse=lambda client: self._network.observed(client.connection, client.observed),
            is_busy=lambda client: self._serving.sessions.has_any(client.connection),
        )

    def _relay_gone(self, label: str) -> None:
        self._refusals.pop(label, None)

    def _relay_connected(self, client: RelayClient) -> None:
        _log.info("relay_connected", relay=client.target.name, transport=client.transport)
        self._refusals[self._relays.label(client)] = {}
        self._serving.relay_connected(client)
        self._show_newest()
        if self._serving.is_draining:
            return
        self._register(client, tuple(self._fronting.table.services.values()))
        self._daemon.readiness.done("relay")

    def _relay_lost(self, client: RelayClient, reason: str) -> None:
        log = _log.info if self._daemon.stopping.is_set() else _log.warning
        log("relay_lost", relay=client.target.name, reason=reason)
        self._serving.relay_lost(client, client.lost_by)

    def _network_changed(self) -> None:
        for relay in self._relays:
            relay.network_changed()
        self._serving.network_changed(self._network.held)

    def _packet(self, client: RelayClient, session: SessionId, packet: bytes) -> None:
        try:
            self._serving.datagrams.from_relay(client, session, packet)
        except Refused as error:
            # Counted only: a relay may send thousands a second.
            refused(_WHERE, error.reason)

    def _message(self, client: RelayClient, message: AnyMessage) -> None:
        try:
            self._act(client, message)
        except Refused as error:
            refused(_WHERE, error.reason)
            _log.warning(
                "relay_message_refused",
                relay=client.target.name,
                message=type(message).__name__,
                reason=error.reason,
                detail=error.detail,
            )

    def _act(self, client: RelayClient, message: AnyMessage) -> None:
        serving = self._serving
        match message:
            case control.Offered():
                serving.offered(client, message)
            case control.Closed():
                serving.closed(client, message)
            case control.Carry():
                serving.carry(client, message)
            case control.CandidateOffer():
                serving.candidate_offer(client, message)
            case control.StartPunching():
                serving.start_punching(client, message)
            case control.Refused():
                self._refusals[self._relays.label(client)][message.name] = message.reason
                _log.error(
                    "service_refused", relay=client.target.name, service=message.name, reason=message.reason
                )
            case control.Drain():
                _log.info("relay_draining", relay=client.target.name, seconds=message.deadline_s)
            case control.Registered() | control.PunchingResult():
                pass
            case _:
                dropped(_WHERE, "unexpected_message")

    # Operators

    def _check_credentials(self, credentials: Credentials) -> None:
        self._discovery.own_table.require_granted(credentials.identity, self._config.id)

    def _use_credentials(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._relays.use_credentials(credentials)
        self._discovery.use_identity(credentials.identity)
        self._show_newest()

    def _show_newest(self) -> None:
        """Show agents the newest certificate once no relay names another one to them any more."""
        if all(relay.proven is self._credentials for relay in self._relays if relay.connected):
            self._serving.use_credentials(self._credentials)

    def _status(self) -> dict[str, object]:
        return {
            "id": self._config.id,
            "link_address": self._link_address,
            "services": {service: self._service_status(service) for service in self._fronting.table.services},
            "flow_log": self._flow_log.status(),
            "consul": self._registrar.status() if self._registrar is not None else {"problem": None},
            "relays": [
                {
                    "name": relay.target.name,
                    "address": str(relay.target.address),
                    "connected": relay.connected,
                    "transport": relay.transport,
                    "version": relay.software or None,
                    "problem": relay.problem,
                    "refused": self._refusals.get(self._relays.label(relay), {}),
                }
                for relay in self._relays
            ],
        } | self._serving.status()

    def _measure(self) -> None:
        SERVICE_HEALTH.clear()
        VERDICT_AGE.clear()
        for service in self._fronting.table.services:
            health = self._fronting.health(service)
            SERVICE_HEALTH.labels(service).set(HEALTH[health.verdict])
            VERDICT_AGE.labels(service).set(self._loop.time() - health.since)
        serving = self._serving
        measure(
            self._relays,
            serving.links.status(),
            sessions=len(serving.sessions),
            tcp_flows=sum(1 for _ in serving.streams.served.flows()),
            udp_flows=len(serving.datagrams.flows),
        )

    def _service_status(self, service: ServiceName) -> dict[str, object]:
        health, registrar = self._fronting.health(service), self._registrar
        return {
            "verdict": health.verdict,
            "output": health.output,
            "since_s": round(self._loop.time() - health.since, 1),
            "registered": registrar is not None and registrar.is_registered(service),
            "refused": registrar.refusal(service) if registrar is not None else None,
            "waiting_for_backend": registrar is not None and service in registrar.waiting,
            "lease": self._leases.lease(service),
            "backends": self._fronting.status(service),
        }


async def _local_address(outside: Endpoint) -> str:
    """Return our address on the way to others. Raises ConfigError when there is no way to find one."""
    try:
        address = await resolve(outside)
        with socket.socket(
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM
        ) as sock:
            sock.connect(address)
            host: str = sock.getsockname()[0]
            return host
    except OSError as error:
        raise ConfigError(
            f"connector.link_advertise: expected the address that agents may try, as none can be told from the "
            f"way to {outside} ({error.strerror or error})"
        ) from None
