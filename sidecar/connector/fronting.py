"""The services as this connector fronts them now: the route table, every backend's health, the choice among them.

Runs the checks. Which backend a flow gets is sidecar.connector.balance's to decide, what an outcome comes to
sidecar.connector.health's; who may have a flow was decided before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from sidecar.connector.balance import Balancer, Policy, Standing
from sidecar.connector.checks import Check
from sidecar.connector.health import CheckHealth, CheckKey, Outcome, ServiceHealth, Verdict, next_delay
from sidecar.connector.probes import Prober
from sidecar.connector.pushes import Pushes
from sidecar.connector.routes import Route, RouteTable, ServiceRoutes
from ztna.leases import Port
from ztna.names import ServiceName
from ztna.sections import Endpoint
from ztna.telemetry import logger

_log = logger(__name__)

_PortKey = tuple[ServiceName, Port]


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A backend that was chosen for one flow; `release` it when the flow has ended, once."""

    route: Route
    backend: Endpoint
    _balancer: Balancer
    _fronting: Fronting

    def succeeded(self) -> None:
        """It answered."""
        self._balancer.succeeded(self.backend)

    def failed(self) -> None:
        """It could not be reached."""
        self._fronting.failed(self.route, self._balancer, self.backend)

    def release(self) -> None:
        """The flow has ended."""
        self._balancer.ended(self.backend)


class Delegate(Protocol):
    """Knows which checks somebody else runs."""

    def runs(self, service: ServiceName, key: CheckKey) -> bool:
        """Whether its verdict on the check is to be had."""

    def why_not(self, service: ServiceName, key: CheckKey) -> str | None:
        """Why it does not run a check that it was asked to run."""


class Fronting:
    """`changed(service)` is called when what its checks say has changed, `lost(route, backend)` when a backend is out.

    A reader takes `table` for one decision; `replace` puts another in its place, and what stays in it keeps its health
    and its standing.
    """

    def __init__(
        self,
        table: RouteTable,
        prober: Prober,
        pushes: Pushes,
        *,
        changed: Callable[[ServiceName], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.table = table
        self.lost: Callable[[Route, Endpoint], None] = lambda route, backend: None
        self.delegate: Delegate | None = None
        self._prober = prober
        self._pushes = pushes
        self._changed = changed
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._health: dict[ServiceName, ServiceHealth] = {}
        self._balancers: dict[_PortKey, Balancer] = {}
        self._checking: dict[tuple[ServiceName, CheckKey], tuple[Check, asyncio.Task[None]]] = {}
        self._is_started = False
        self._take_up(table)

    def __contains__(self, service: object) -> bool:
        return service in self._health

    def start(self) -> None:
        """Begin to check."""
        self._is_started = True
        self._check_all()

    def replace(self, table: RouteTable) -> None:
        """Front what another table says from now on."""
        for service in self.table.services.keys() - table.services.keys():
            self._pushes.forget(service)
        self.table = table
        for service in self._take_up(table):
            self._changed(service)
        self._check_all()

    def health(self, service: ServiceName) -> ServiceHealth:
        """Return the health of a service of the table."""
        return self._health[service]

    def is_available(self, service: ServiceName) -> bool:
        """Say whether a service is there and not critical."""
        health = self._health.get(service)
        return health is not None and health.verdict != "critical"

    def address(self, backend: Endpoint) -> tuple[str, int] | None:
        """Return a backend's numeric address as its checks last found it."""
        host = self._prober.addresses.get(backend.host)
        return None if host is None else (host, backend.port)

    def choose(self, route: Route, agent: str, tried: Collection[Endpoint] = ()) -> Claim | None:
        """Choose a backend that was not tried yet for a flow of an agent (by name); None when all were, or left."""
        balancer = self._balancers.get((route.service, route.port))
        backend = None if balancer is None else balancer.pick(agent, self._loop.time(), tried)
        return None if balancer is None or backend is None else Claim(route, backend, balancer, self)

    def failed(self, route: Route, balancer: Balancer, backend: Endpoint) -> None:
        """Count a failure of a backend against it, and pass it over when it fails too often."""
        if balancer.failed(backend, self._loop.time()):
            _log.warning("backend_ejected", service=route.service, backend=str(backend))
            self._tell_lost(route, balancer, backend)

    def status(self, service: ServiceName) -> list[dict[str, object]]:
        """Return how each backend of a service is doing, for the admin page."""
        now, health = self._loop.time(), self._health[service]
        return [
            {
                "protocol": route.port.protocol,
                "port": route.port.port,
                "backend": str(standing.address),
                "verdict": standing.verdict,
                "ejected": standing.is_ejected(now),
                "flows": standing.flows,
                "weight": standing.weight,
                "checks": [
                    {
                        "kind": check.kind,
                        "target": str(check.target),
                        "verdict": health.checks[key].verdict,
                        "output": health.checks[key].output,
                        **self._runner(service, key),
                    }
                    for key, check in _checks_of(route, standing)
                ],
            }
            for route in self.table.services[service].routes
            for standing in self._balancers[service, route.port].standings()
        ]

    def follow(self, service: ServiceName, key: CheckKey, verdict: Verdict, output: str) -> None:
        """Take over the delegate's verdict on a check."""
        health = self._health[service]
        before = health.output
        self._heard(service, key, before, health.follow(key, verdict, output, self._loop.time()))

    def is_delegated(self, service: ServiceName, key: CheckKey) -> bool:
        """Say whether the delegate runs a check now."""
        return self.delegate is not None and self.delegate.runs(service, key)

    def _runner(self, service: ServiceName, key: CheckKey) -> dict[str, object]:
        why = self.delegate.why_not(service, key) if self.delegate is not None else None
        return {"runner": "consul" if self.is_delegated(service, key) else "sidecar", "not_consul": why}

    def _take_up(self, table: RouteTable) -> list[ServiceName]:
        """Make health and balancers what the table wants; return the services whose verdict changed by that."""
        now, changed = self._loop.time(), []
        known, self._health = self._health, {}
        for service, routes in table.services.items():
            before = known.get(service)
            checks = _check_healths(routes, before, now)
            health = self._health[service] = before or ServiceHealth(checks, now, routes.slow_start_s)
            if health.update(checks, now, routes.slow_start_s):
                changed.append(service)
        balancers, self._balancers = self._balancers, {}
        for routes in table.services.values():
            for route in routes.routes:
                key = (route.service, route.port)
                balancer = balancers.pop(key) if key in balancers else Balancer({}, route.policy)
                self._balancers[key] = balancer
                balancer.update(route.weights, route.policy, route.priorities)
                for backend in route.backends:
                    verdict = self._health[route.service].backend(route.port, backend.address)
                    balancer.judge(backend.address, verdict)
        for key, balancer in balancers.items():
            balancer.update({}, Policy())
            if not balancer.is_idle:
                self._balancers[key] = balancer  # its flows go on, and count when the route comes back
        return changed

    def _check_all(self) -> None:
        """Have a task for each check of the table, and no other."""
        if not self._is_started:
            return
        wanted = {
            (routes.service, key): check
            for routes in self.table.services.values()
            for key, check in checks_of_service(routes).items()
        }
        self._prober.keep_only(wanted.values())
        for place, (check, task) in list(self._checking.items()):
            if wanted.get(place) != check:
                task.cancel()
                del self._checking[place]
        for place in wanted.keys() - self._checking.keys():
            service, key = place
            task = self._tasks.create_task(self._check(service, key, wanted[place]), name=f"check {service}")
            self._checking[place] = wanted[place], task

    async def _check(self, service: ServiceName, key: CheckKey, check: Check) -> None:
        """Check one backend for ever; of kind ttl, listen to its program."""
        if check.kind == "ttl":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(service, key, check), name=f"listen to {service}")
                tasks.create_task(self._ask(service, key, check), name=f"look up {service}")
        else:
            await self._ask(service, key, check)

    async def _listen(self, service: ServiceName, key: CheckKey, check: Check) -> None:
        while True:
            self._checked(service, key, self._pushes.now(service, check.config.ttl_s))
            await self._pushes.changed(service, check.config.ttl_s)

    async def _ask(self, service: ServiceName, key: CheckKey, check: Check) -> None:
        """Ask a backend for ever how it is; while somebody else does, only where it is, for flows that do not dial."""
        config = check.config
        while True:
            if check.kind == "ttl" or self.is_delegated(service, key):
                if key.port.protocol != "tcp":
                    await self._prober.locate(check)
            else:
                outcome = await self._prober.probe(check)
                if not self.is_delegated(service, key):
                    self._checked(service, key, outcome)
            await asyncio.sleep(next_delay(config.interval_s, config.jitter, random.random()))

    def _checked(self, service: ServiceName, key: CheckKey, outcome: Outcome) -> None:
        health = self._health[service]
        before = health.output
        self._heard(service, key, before, health.handle(key, outcome, self._loop.time()))

    def _heard(self, service: ServiceName, key: CheckKey, before: str, is_changed: bool) -> None:
        health = self._health[service]
        self._judge(service, key, health.backend(key.port, key.backend))
        if is_changed:
            log = _log.info if health.verdict == "passing" else _log.warning
            log("health", service=service, verdict=health.verdict, output=health.output)
        if is_changed or before != health.output:
            self._changed(service)

    def _judge(self, service: ServiceName, key: CheckKey, verdict: Verdict) -> None:
        route = self.table.pick(service, key.port.protocol, key.port.port)
        assert route is not None, "checks of routes that are gone are cancelled"
        balancer = self._balancers[service, key.port]
        if balancer.judge(key.backend, verdict):
            log = _log.info if verdict == "passing" else _log.warning
            log("backend_health", service=service, backend=str(key.backend), verdict=verdict)
            if verdict == "critical":
                self._tell_lost(route, balancer, key.backend)

    def _tell_lost(self, route: Route, balancer: Balancer, backend: Endpoint) -> None:
        """Tell that flows had better leave a backend, if there is a better one."""
        if balancer.has_better(backend, self._loop.time()):
            self.lost(route, backend)


def checks_of_service(routes: ServiceRoutes) -> dict[CheckKey, Check]:
    """Return every check of a service's backends."""
    return {
        CheckKey(route.port, backend.address, number): check
        for route in routes.routes
        for backend in route.backends
        for number, check in enumerate(backend.checks)
    }


def _checks_of(route: Route, standing: Standing) -> list[tuple[CheckKey, Check]]:
    return [
        (CheckKey(route.port, standing.address, number), check)
        for backend in route.backends
        if backend.address == standing.address
        for number, check in enumerate(backend.checks)
    ]


def _check_healths(
    routes: ServiceRoutes, before: ServiceHealth | None, now: float
) -> dict[CheckKey, CheckHealth]:
    """Return a health for each check, the known one where nothing changed for it."""
    known = before.checks if before is not None else {}
    healths = {}
    for key, check in checks_of_service(routes).items():
        health = known.get(key)
        healths[key] = health if health and health.config == check.config else CheckHealth(check.config, now)
    return healths
