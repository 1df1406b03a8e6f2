"""What this connector fronts, from all the places that define services, as it changes while it runs.

Files, the local API and the local Consul agent each give definitions; DNS gives backends. Whenever one of them changes,
everything is settled anew (sidecar.connector.sources), and what can be fronted is handed on as one table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from sidecar.connector import api_state
from sidecar.connector.consul_services import local_definitions
from sidecar.connector.route_files import RouteFiles
from sidecar.connector.routes import RouteTable
from sidecar.connector.sources import NOTHING, Definition, Entry, Settled, chosen, lacks_grant, settle
from sidecar.connector.srv import SrvNames
from sidecar.connector.srv_records import NotYetKnown, names_of, resolved, sound
from ztna import sections
from ztna.config import ConnectorConfig, RouteConfig, shown_in_consul
from ztna.consul.client import ConsulClient
from ztna.credentials import Credentials
from ztna.errors import ConfigError, ConsulError, Refused, ZtnaError
from ztna.identity import Identity
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.resolver import Resolver
from ztna.runtime import Daemon
from ztna.sections import Endpoint
from ztna.system_dns import DNS_PORT, RESOLV_CONF, nameservers
from ztna.telemetry import SERVICES_DEFINED, logger, refused

API_SERVICES_MAX = 2_000
CONSUL_SERVICES_SECONDS = 2.0
"""How often the local Consul agent is asked for services that others registered; only it answers, no server."""
FIRST_WORD_SECONDS = 60.0
"""How long places may take to say for the first time what they define, before what nobody defines is thought gone."""
LACKING_SECONDS = 2.0
"""How often it is seen whether a file that a service's routes need is there by now."""
RESOLVER_SECONDS = 3.0
TOLD_MAX = 5
"""As many names are told in one warning of /readyz; /status and the API have them all."""

_WHERE = "connector"

_log = logger(__name__)


class NotFromHere(ZtnaError):
    """A service that the API cannot remove, or has no word on, as it does not come from it; says where it does."""


class Discovery:
    """`apply` takes a table into use; `about` says of a fronted service how it is, for operators.

    `check` raises ConfigError when this host lacks what a table's routes need, a file most often.

    Made with ConfigError for a configuration, state file or directory that cannot be used.
    """

    def __init__(
        self,
        daemon: Daemon,
        credentials: Credentials,
        consul: ConsulClient,
        *,
        check: Callable[[RouteTable], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        assert daemon.config.connector is not None
        config: ConnectorConfig = daemon.config.connector
        self.apply: Callable[[RouteTable], None] = lambda table: None
        self.about: Callable[[ServiceName], Mapping[str, object]] = lambda service: {}
        self._daemon = daemon
        self._config = config
        self._consul = consul
        self._tasks = tasks
        self._identity = credentials.identity
        self._check = check
        self._lacking: set[ServiceName] = set()
        """Services for which this host lacked something when all was settled."""
        self._files = RouteFiles(daemon, config, self._settle)
        check(self._files.own_table)
        self._state = None if config.api_state is None else Path(config.api_state)
        self._changing_api = asyncio.Lock()
        self._api = {} if self._state is None else api_state.read(self._state)
        self._local: tuple[Definition, ...] = ()
        self._local_problem: str | None = None
        self._is_local_heard = not config.consul_services
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self._has_heard_all = False
        self._srv = SrvNames(_resolver(config), config.srv_keep_s, tasks, self._settle)
        self._settled = NOTHING
        self._told: dict[ServiceName, str] = {}
        self._shown_in_consul: dict[ServiceName, str] = {}
        for each in self._files.definitions:
            if not self._identity.may_serve(each.service):
                raise ConfigError(f"connector.routes: {lacks_grant(each.service)}")

    @property
    def table(self) -> RouteTable:
        """What is fronted."""
        return self._settled.table

    @property
    def own_table(self) -> RouteTable:
        """What is fronted because the configuration itself says so: a certificate without it is a mistake.

        Certificates are checked in a thread, while this may be settled anew: so of one moment.
        """
        settled = self._settled
        return RouteTable.of(
            {
                service: routes
                for service, routes in settled.table.services.items()
                if settled.entries[service].definition.origin.kind == "config"
            }
        )

    @property
    def has_heard_all(self) -> bool:
        """Whether every place has said what it defines, or had FIRST_WORD_SECONDS for it.

        Before that it cannot be told what a crashed predecessor left behind from what will be defined in a moment.
        """
        if not self._has_heard_all:
            unheard = self._unheard()
            self._has_heard_all = not unheard or self._loop.time() - self._began_at >= FIRST_WORD_SECONDS
            if unheard and self._has_heard_all:
                _log.warning("never_heard", places=" ".join(unheard), seconds=FIRST_WORD_SECONDS)
        return self._has_heard_all

    async def begin(self) -> None:
        """Read what there is to read, for the first table; and keep it up to date from now on."""
        await self._files.look()
        if self._config.consul_services:
            self._tasks.create_task(self._keep_asking_consul(), name="services of the local Consul agent")
        self._settle()
        self._tasks.create_task(self._files.run(), name="files of routes")
        self._tasks.create_task(self._keep_looking_for_lacking(), name="files that routes need")

    def reload(self) -> None:
        """Read the files again: SIGHUP."""
        self._files.reload()
        self._settle()

    def use_identity(self, identity: Identity) -> None:
        """Settle anew with another certificate of ours: it may grant more."""
        if identity.connector != self._identity.connector:
            self._identity = identity
            self._settle()

    # The local API

    async def put(self, service: ServiceName, routes: tuple[RouteConfig, ...]) -> None:
        """Add or change a service, and return when that would outlive a crash.

        Raises ConfigError, Refused or StateError, and then nothing has changed.
        """
        table, definition = sound(routes), Definition(service, api_state.ORIGIN, routes)
        async with self._changing_api:
            if not self._identity.may_serve(service):
                raise Refused(Reason.NO_GRANT, lacks_grant(service))
            if service not in self._api and len(self._api) >= API_SERVICES_MAX:
                raise Refused(
                    Reason.LIMIT_REACHED, f"expected at most {API_SERVICES_MAX} services from the API"
                )
            self._check(table)
            await self._keep({**self._api, service: definition})
        _log.info("service_put", service=service, routes=len(routes))

    async def remove(self, service: ServiceName) -> None:
        """Remove a service that came by the API. Raises Refused, NotFromHere or StateError."""
        async with self._changing_api:
            if service not in self._api:
                where = self._entry(service).definition.origin
                raise NotFromHere(f"{service} comes from {where}: remove it there")
            await self._keep({name: each for name, each in self._api.items() if name != service})
        _log.info("service_removed", service=service)

    def require_ttl(self, service: ServiceName) -> None:
        """Raise Refused or NotFromHere when no check of the service waits for a program's word."""
        entry = self._entry(service)
        routes = self.table.services.get(service)
        backends = [] if routes is None else [each for route in routes.routes for each in route.backends]
        if not any(check.kind == "ttl" for backend in backends for check in backend.checks):
            raise NotFromHere(f"{service} (from {entry.definition.origin}) has no check of kind ttl")

    def shown(self) -> list[dict[str, object]]:
        """Return every service that is defined anywhere, for people and programs."""
        return [self._shown(service) for service in sorted(self._settled.entries)]

    def shown_one(self, service: ServiceName) -> dict[str, object]:
        """Return one service, with its routes. Raises Refused when nobody defines it."""
        entry = self._entry(service)
        return self._shown(service) | {
            "routes": [sections.plain(route, secrets=False) for route in entry.definition.routes]
        }

    def status(self) -> dict[str, object]:
        """Return what /status shows: the places, and what became of each name."""
        return {
            "unheard": [] if self._has_heard_all else self._unheard(),
            "files": self._files.status(),
            "srv": self._srv.status(),
            "consul_services": {"enabled": self._config.consul_services, "problem": self._local_problem},
            "services": {
                service: {
                    "from": str(entry.definition.origin),
                    "shadowed": list(map(str, entry.shadowed)),
                    "problem": entry.problem,
                }
                for service, entry in self._settled.entries.items()
            },
        }

    def _unheard(self) -> list[str]:
        """Return the places that did not say yet what they define, and the services of which it is not known."""
        places = [*self._files.unheard] if self._is_local_heard else [*self._files.unheard, "consul"]
        return places + [
            service
            for service, entry in self._settled.entries.items()
            if entry.used is None and (entry.is_awaited or service in self._lacking)
        ]

    def _shown(self, service: ServiceName) -> dict[str, object]:
        entry = self._settled.entries[service]
        return {
            "service": service,
            "from": str(entry.definition.origin),
            "shadowed": list(map(str, entry.shadowed)),
            "problem": entry.problem,
            "fronted": service in self.table.services,
            "ports": [f"{route.protocol}:{route.port or 0}" for route in entry.definition.routes],
        } | (dict(self.about(service)) if service in self.table.services else {})

    def _entry(self, service: ServiceName) -> Entry:
        entry = self._settled.entries.get(service)
        if entry is None:
            raise Refused(Reason.NO_SUCH_SERVICE, f"{service} is defined nowhere")
        return entry

    async def _keep(self, services: dict[ServiceName, Definition]) -> None:
        """Write, then take into use. A disk may take its time: not in the loop; one at a time, as they came."""
        assert self._state is not None  # or there would be no API
        await asyncio.to_thread(api_state.write, self._state, services)
        self._api = services
        self._settle()

    # Settling

    def _settle(self) -> None:
        """Make of all definitions one table, say what cannot be used, and hand it on when it is another one."""
        before = self.table
        entries = chosen((*self._files.definitions, *self._api.values(), *self._local))
        self._srv.follow(names_of(each.definition for each in entries.values()))
        self._lacking.clear()
        settled = settle(
            {service: self._resolved(entry) for service, entry in entries.items()},
            self._identity,
            self._settled,
            self._check_host,
        )
        self._settled = Settled(
            {
                service: replace(settled.entries[service], definition=entry.definition)
                for service, entry in entries.items()
            },
            settled.table,
        )
        self._tell()
        if settled.table.services != before.services:
            self.apply(settled.table)

    def _check_host(self, table: RouteTable) -> None:
        try:
            self._check(table)
        except ConfigError:
            self._lacking.update(table.services)
            raise

    async def _keep_looking_for_lacking(self) -> None:
        """Who writes routes may write the certificates that they need a moment later."""
        while True:
            await asyncio.sleep(LACKING_SECONDS)
            if self._lacking:
                self._settle()

    def _resolved(self, entry: Entry) -> Entry:
        try:
            return replace(entry, definition=resolved(entry.definition, self._srv.backends))
        except ConfigError as error:
            return replace(entry, problem=str(error), is_awaited=isinstance(error, NotYetKnown))

    def _tell(self) -> None:
        """Say once what cannot be fronted, and which names are defined more than once."""
        told = {
            service: "; ".join(filter(None, (entry.problem, _conflict(entry))))
            for service, entry in self._settled.entries.items()
            if entry.problem or entry.shadowed
        }
        for service, text in told.items():
            if self._told.get(service) != text:
                log = _log.error if self._settled.entries[service].problem else _log.warning
                log("service_definition", service=service, detail=text)
                if self._settled.entries[service].problem and not self._identity.may_serve(service):
                    refused(_WHERE, Reason.NO_GRANT)
        self._told = told
        self._tell_shown_in_consul()
        counts = {"fronted": len(self.table.services), "shadowed": 0, "refused": 0, "kept": 0}
        for entry in self._settled.entries.values():
            counts["shadowed"] += len(entry.shadowed)
            counts["refused"] += entry.problem is not None and not entry.is_kept
            counts["kept"] += entry.is_kept
        for state, count in counts.items():
            SERVICES_DEFINED.labels(state).set(count)
        in_short = _in_short(f"{service}: {text}" for service, text in told.items())
        self._daemon.readiness.show("services", in_short)

    def _tell_shown_in_consul(self) -> None:
        """Warn of secrets that go into Consul with the checks that it is to run, once each."""
        routes = (route for entry in self._settled.entries.values() for route in entry.definition.routes)
        before, self._shown_in_consul = self._shown_in_consul, shown_in_consul(routes)
        for service, text in self._shown_in_consul.items():
            if before.get(service) != text:
                _log.warning("secret_shown_in_consul", service=service, detail=text)
        self._daemon.readiness.show("secrets_in_consul", _in_short(self._shown_in_consul.values()))

    # The local Consul agent

    async def _keep_asking_consul(self) -> None:
        while True:
            before = self._local
            await self._ask_consul()
            if self._local != before:
                self._settle()
            await asyncio.sleep(CONSUL_SERVICES_SECONDS)

    async def _ask_consul(self) -> None:
        """Read what others registered; a Consul that is away leaves it as it was."""
        try:
            known, health = await asyncio.gather(
                self._consul.agent_services(), self._consul.agent_service_health()
            )
        except ConsulError as error:
            if self._local_problem is None:
                _log.warning("consul_services_not_read", error=error)
            self._local_problem = str(error)
            return
        self._local_problem, self._is_local_heard = None, True
        # An instance without an address is where its agent is.
        host = urlsplit(self._consul.address).hostname
        assert host is not None, "or there would be no client"
        self._local = local_definitions(known, health, host, self._identity.may_serve, self._config.id)


def _in_short(texts: Iterable[str]) -> str | None:
    """Return some of them as one line, None when there is none."""
    every = list(texts)
    more = len(every) - TOLD_MAX
    return "; ".join(every[:TOLD_MAX]) + (f"; and {more} more" if more > 0 else "") if every else None


def _conflict(entry: Entry) -> str:
    if not entry.shadowed:
        return ""
    others = ", ".join(map(str, entry.shadowed))
    return f"defined by {entry.definition.origin}, which counts, and by {others}"


def _resolver(config: ConnectorConfig) -> Resolver | None:
    """Return who is asked for SRV records: those of the configuration, else this host's own."""
    servers: tuple[Endpoint, ...] = config.srv_resolvers
    if not servers:
        try:
            text = (Path("/") / RESOLV_CONF).read_text()
        except OSError:
            text = ""
        servers = tuple(Endpoint(host, DNS_PORT) for host in nameservers(text))
    return Resolver(servers, RESOLVER_SECONDS) if servers else None
