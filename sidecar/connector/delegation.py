"""Have Consul's agent run the checks that ask for it, and follow its verdicts by a blocking query on its node.

What it can run sidecar.connector.runners decides. While what it finds is not to be had, because Consul is away or the
token may not read it, the sidecar runs these checks too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.connector.checks import Check
from sidecar.connector.fronting import Fronting, checks_of_service
from sidecar.connector.health import CheckKey
from sidecar.connector.routes import RouteTable
from sidecar.connector.runners import Capabilities, capabilities, definition, why_not
from ztna.catalog import ChecksSnapshot, ProbeDefinition
from ztna.consul.client import ConsulClient
from ztna.consul.watch import NodeChecksWatch
from ztna.errors import ConsulError
from ztna.names import ServiceName
from ztna.telemetry import logger

LOOK_SECONDS = 2.0
"""How soon a table is noticed that has such checks for the first time, and Consul asked again that did not answer."""
ABILITIES_SECONDS = 60.0
"""How often Consul's agent is asked for its version: it may have been upgraded."""

_Place = tuple[ServiceName, CheckKey]

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The checks of one table that ask for Consul: those it runs, with their ids, and why not the others."""

    table: RouteTable
    probes: dict[_Place, tuple[Check, str]]
    refused: dict[_Place, str]


class Delegation:
    """`check_id` gives the id of a service's TTL check; `changed` is called when Consul is to run other checks, `lost`
    when it lacks one of a service that it has.
    """

    def __init__(
        self,
        client: ConsulClient,
        fronting: Fronting,
        *,
        check_id: Callable[[ServiceName], str],
        deregister_after_s: float,
        changed: Callable[[], None],
        lost: Callable[[ServiceName], None],
    ) -> None:
        self._client = client
        self._fronting = fronting
        self._check_id = check_id
        self._deregister_after_s = deregister_after_s
        self._changed = changed
        self._lost = lost
        self._can: Capabilities | None = None
        self._problem = "Consul was not asked yet"
        self._watch: NodeChecksWatch | None = None
        self._sorted_now: _Sorted | None = None

    def runs(self, service: ServiceName, key: CheckKey) -> bool:
        """Whether Consul's verdict on a check is to be had now."""
        found = self._sorted().probes.get((service, key))
        return found is not None and self._missing(found[1]) is None

    def why_not(self, service: ServiceName, key: CheckKey) -> str | None:
        """Why the sidecar runs a check that asks for Consul; None for one that does not, or that Consul runs."""
        known = self._sorted()
        found = known.probes.get((service, key))
        return known.refused.get((service, key)) if found is None else self._missing(found[1])

    def probes(self, service: ServiceName) -> tuple[ProbeDefinition, ...]:
        """Return the checks of a service that Consul's agent is to run."""
        known, routes = self._sorted(), self._fronting.table.services.get(service)
        return tuple(
            self._definition(service, key, check)
            for key, check in (checks_of_service(routes).items() if routes is not None else ())
            if (service, key) in known.probes
        )

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            can = await self._ask() if _asking(self._fronting.table) else None
            if can is None:
                await asyncio.sleep(LOOK_SECONDS)
            else:
                await self._follow(can)

    async def _follow(self, can: Capabilities) -> None:
        """Follow the checks of the agent's node for as long as it stays what it is."""
        self._can, self._sorted_now = can, None
        watch = self._watch = NodeChecksWatch(self._client, can.node)
        watch.subscribe(self._seen)
        self._changed()
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(watch.run(), name="follow Consul's checks")
            while True:
                await asyncio.sleep(ABILITIES_SECONDS)
                if await self._ask() not in (can, None):
                    break
            following.cancel()

    async def _ask(self) -> Capabilities | None:
        try:
            return capabilities(await self._client.agent_self())
        except (ConsulError, ValueError) as error:
            if str(error) != self._problem:
                _log.warning("sidecar_runs_all_checks", error=error)
                self._problem, self._sorted_now = str(error), None
            return None

    def _seen(self, snapshot: ChecksSnapshot) -> None:
        lost: set[ServiceName] = set()
        for (service, key), (_, own_id) in self._sorted().probes.items():
            found = snapshot.checks.get(own_id)
            if found is not None:
                self._fronting.follow(service, key, found.status, found.output)
            elif self._check_id(service) in snapshot.checks:
                lost.add(service)
        for service in lost:
            self._lost(service)

    def _missing(self, own_id: str) -> str | None:
        """Why Consul's verdict on a check is not to be had."""
        watch = self._watch
        if watch is None or watch.latest is None or watch.problem is not None:
            return str(watch.problem) if watch is not None and watch.problem else "Consul was not asked yet"
        if own_id not in watch.latest.checks:
            return (
                "Consul does not show the check: it is not registered yet, or the token may not read its node"
            )
        return None

    def _sorted(self) -> _Sorted:
        table = self._fronting.table
        known = self._sorted_now
        if known is None or known.table is not table:
            known = self._sorted_now = self._sort(table)
        return known

    def _sort(self, table: RouteTable) -> _Sorted:
        made = _Sorted(table, {}, {})
        for (service, key), check in _asking(table).items():
            why = self._problem if self._can is None else self._why_not(table, service, key, check, self._can)
            if why is None:
                made.probes[service, key] = check, self._definition(service, key, check).check_id
            else:
                made.refused[service, key] = why
        return made

    @staticmethod
    def _why_not(
        table: RouteTable, service: ServiceName, key: CheckKey, check: Check, can: Capabilities
    ) -> str | None:
        route = table.pick(service, key.port.protocol, key.port.port)
        why = why_not(check, can, is_only_backend=route is not None and len(route.backends) == 1)
        if why is not None:
            _log.info("sidecar_runs_check", service=service, check=check.kind, why=why)
        return why

    def _definition(self, service: ServiceName, key: CheckKey, check: Check) -> ProbeDefinition:
        verdict = self._fronting.health(service).checks[key].verdict
        return definition(check, key, self._check_id(service), verdict, self._deregister_after_s)


def _asking(table: RouteTable) -> dict[_Place, Check]:
    """Return the checks that ask for Consul."""
    return {
        (routes.service, key): check
        for routes in table.services.values()
        for key, check in checks_of_service(routes).items()
        if check.config.runner == "consul"
    }
