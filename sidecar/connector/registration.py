"""Keep Consul's local agent true to what the registrar wants: register, report checks, remove, and again.

Two loops: one compares and registers, one reports TTL checks, changed verdicts first, so that a backend that died is
critical in Consul within a second however many services are being registered. Decides nothing about what ought to be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from sidecar.connector.registrar import (
    OUTPUT_CHARACTERS,
    Desired,
    Registrant,
    check_id,
    instance_id,
    own_ids,
    plan,
)
from ztna.catalog import CheckDefinition, ProbeDefinition, Registration
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError, ConsulUnavailable
from ztna.names import ServiceName
from ztna.telemetry import CONSUL_REFUSED, logger
from ztna.watching import wait

CALLS_AT_ONCE = 16
REFRESHES_PER_TTL = 3.0
RECONCILE_SECONDS = 5.0
RECONCILE_SECONDS_MIN = 0.25
BACKOFF_SECONDS = 1.0
LEAVE_SECONDS = 5.0
REMEDY = "give the connector's token that rule (docs/policies/connector.hcl): it is tried again by itself"
LEAVING = "its connector is stopping"
"""Why a service is in maintenance, for who looks at Consul."""

Item = TypeVar("Item")

_log = logger(__name__)


class Registrar:
    """Carries out plans. `services` gives the names of our services, `desired` one of them as it stands now.

    `are_all` says whether these are all services, or only those that are known so soon after the start.
    """

    def __init__(
        self,
        client: ConsulClient,
        registrant: Registrant,
        services: Callable[[], Collection[ServiceName]],
        desired: Callable[[ServiceName], Desired],
        are_all: Callable[[], bool] = lambda: True,
    ) -> None:
        self.problem: str | None = None
        self.waiting: tuple[ServiceName, ...] = ()
        self.complete = asyncio.Event()
        self._client = client
        self._registrant = registrant
        self._services = services
        self._desired = desired
        self._are_all = are_all
        self._loop = asyncio.get_running_loop()
        self._registered: set[ServiceName] = set()
        self._generations: dict[ServiceName, int] = {}
        """The token that each service was registered by: Consul syncs it to the catalog by that one alone, and that
        of a predecessor may end with it."""
        self._unchecked: set[ServiceName] = set()
        """Services whose check Consul does not have, though it may have the service."""
        self._probes: dict[ServiceName, frozenset[str]] = {}
        """The checks that Consul's agent was last asked to run."""
        self._noted_generation = -1
        self._note = ""
        self._refused: dict[ServiceName, str] = {}
        self._unreported: dict[ServiceName, str] = {}
        """Services whose check Consul does not let us report, and why."""
        self._kept: dict[str, str] = {}
        """Instances that Consul does not let us remove, and why."""
        self._urgent: dict[ServiceName, None] = {}
        self._routine: dict[ServiceName, None] = {}
        self._report = asyncio.Event()
        self._reconcile = asyncio.Event()

    def is_registered(self, service: ServiceName) -> bool:
        """Whether Consul's local agent had it when last seen."""
        return service in self._registered

    def refusal(self, service: ServiceName) -> str | None:
        """Why Consul does not take the service, in its words, if it does not."""
        return self._refused.get(service)

    @property
    def trouble(self) -> str | None:
        """What is wrong between Consul and us, and what to do, for people; None when nothing is."""
        if self.problem is not None:
            return self.problem
        for what, refused in self._refusals().items():
            for name, why in refused.items():
                more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
                return f"Consul does not let us {what} {name}: {why}{more}; {REMEDY}"
        return None

    def status(self) -> dict[str, object]:
        """Return what /status shows."""
        return {
            "problem": self.problem,
            "refused": {each: dict(why) for each, why in self._refusals().items()},
        }

    def _refusals(self) -> dict[str, Mapping[ServiceName, str] | Mapping[str, str]]:
        return {"register": self._refused, "report": self._unreported, "remove": self._kept}

    def _count_refusals(self) -> None:
        for what, refused in self._refusals().items():
            CONSUL_REFUSED.labels(what).set(len(refused))

    def verdict_changed(self, service: ServiceName) -> None:
        """Report the service's check at once, and see whether it should be registered now."""
        self._urgent[service] = None
        self._report.set()
        if service not in self._registered:
            self._reconcile.set()

    def check_lost(self, service: ServiceName) -> None:
        """Register a service again soon: Consul lacks a check of it."""
        self._unchecked.add(service)
        self._reconcile.set()

    def checks_changed(self) -> None:
        """Compare soon: Consul's agent is to run other checks."""
        self._reconcile.set()

    def lease_changed(self) -> None:
        """Compare soon: a virtual address has to be registered."""
        self._reconcile.set()

    def services_changed(self) -> None:
        """Compare soon: services came or went."""
        self._reconcile.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_comparing(), name="compare with Consul")
            tasks.create_task(self._keep_reporting(), name="report checks to Consul")

    async def leave(self) -> None:
        """Take what is ours out of use and then away, within LEAVE_SECONDS.

        Maintenance comes first for all: it is quick, and holds where Consul does not take a service away from its
        catalog at once. Consul that is away lets the checks run out.
        """
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                known = await self._client.agent_services()
                ids = own_ids(known, self._registrant.connector_id)
                await _each(self._maintain, ids)
                await _each(self._deregister, ids)
                if removed := [each for each in ids if each not in self._kept]:
                    _log.info("deregistered", services=len(removed))
        except (ConsulError, TimeoutError) as error:
            _log.warning("not_deregistered", error=str(error) or f"no answer in {LEAVE_SECONDS:g} s")

    async def _maintain(self, own_id: str) -> None:
        try:
            await self._client.maintain_service(own_id, LEAVING)
        except ConsulUnavailable:
            raise
        except ConsulError:
            pass  # whoever may not do that may not remove it, which is told

    async def _deregister(self, own_id: str) -> None:
        """Remove an instance. One that we may not (a predecessor's, by another token) must not keep the others in."""
        try:
            await self._client.deregister_service(own_id)
        except ConsulUnavailable:
            raise
        except ConsulError as error:
            if self._kept.get(own_id) != str(error):
                _log.error("deregistration_refused", id=own_id, error=error)
            self._kept[own_id] = str(error)
        else:
            self._kept.pop(own_id, None)

    async def _keep_comparing(self) -> None:
        while True:
            self._reconcile.clear()
            wait_s = RECONCILE_SECONDS
            try:
                await self._compare()
                self._succeeded()
            except ConsulError as error:
                self._failed(error)
                wait_s = BACKOFF_SECONDS
            await asyncio.sleep(RECONCILE_SECONDS_MIN)
            await wait(self._reconcile, wait_s * random.uniform(0.8, 1.0))

    async def _keep_reporting(self) -> None:
        refresh_at = 0.0
        while True:
            now = self._loop.time()
            if now >= refresh_at:
                self._routine = dict.fromkeys(self._registered)
                refresh_at = now + self._registrant.ttl_s / REFRESHES_PER_TTL * random.uniform(0.8, 1.0)
            batch = self._next_batch()
            if not batch:
                self._report.clear()
                await wait(self._report, refresh_at - now)
                continue
            try:
                await _each(self._report_check, batch)
                self._count_refusals()
                self._succeeded()
            except ConsulError as error:
                self._urgent.update(dict.fromkeys(batch))
                self._failed(error)
                await asyncio.sleep(BACKOFF_SECONDS)

    async def _compare(self) -> None:
        known = await self._client.agent_services()
        is_all = self._are_all()
        desired = {service: self._desired(service) for service in self._services()}
        generation = self._client.token_generation
        anew = {each for each in desired if self._generations.get(each) != generation}
        anew |= self._unchecked
        anew |= {each for each, want in desired.items() if _probe_ids(want.probes) != self._probes.get(each)}
        planned = plan(desired.values(), known, self._registrant, self._loop.time(), anew=anew, is_all=is_all)
        own = {service: instance_id(service, self._registrant.connector_id) for service in desired}
        self._registered = {service for service, own_id in own.items() if own_id in known}
        self.waiting = planned.waiting
        self._forget_all_but(desired)
        self._kept = {own_id: why for own_id, why in self._kept.items() if own_id in known}
        await _each(self._deregister, planned.deregister)
        if removed := [each for each in planned.deregister if each not in self._kept]:
            _log.info("zombies_removed", ids=" ".join(removed))
        await _each(self._register, planned.register)
        if planned.register:
            _log.info("registered", services=len(planned.register))
        self._count_refusals()
        if len(self._registered) == len(desired):
            self.complete.set()

    def _forget_all_but(self, desired: Container[ServiceName]) -> None:
        self._refused = {service: why for service, why in self._refused.items() if service in desired}
        self._unreported = {service: why for service, why in self._unreported.items() if service in desired}
        self._generations = {
            service: each for service, each in self._generations.items() if service in desired
        }
        self._probes = {service: each for service, each in self._probes.items() if service in desired}
        self._unchecked = {service for service in self._unchecked if service in desired}

    async def _register(self, registration: Registration) -> None:
        service = ServiceName(registration.service)
        generation = self._client.token_generation
        registration = self._noted(registration, generation)
        try:
            # What a predecessor left is replaced; afterwards only when it changes, as maintenance mode is a check too.
            probes = _probe_ids(registration.checks)
            is_other = probes != self._probes.get(service)
            await self._client.register_service(registration, replace_checks=is_other)
        except ConsulUnavailable:
            raise
        except ConsulError as error:
            # One service that Consul does not take (an ACL, most often) must not keep the others out.
            if self._refused.get(service) != str(error):
                _log.error("registration_refused", service=service, error=error)
            self._refused[service] = str(error)
            return
        self._refused.pop(service, None)
        self._registered.add(service)
        self._generations[service] = generation
        self._probes[service] = probes
        self._unchecked.discard(service)
        # Consul keeps the status of a check it knew; and the verdict may have changed meanwhile.
        self._urgent[service] = None
        self._report.set()

    def _noted(self, registration: Registration, generation: int) -> Registration:
        """Return it with checks that differ from those registered by an earlier token.

        What Consul's agent could not bring to the catalog by the old one (a status) it takes for brought, and as long
        as a check is registered as it was it stays so, until its own next full sync (seen on 1.19.2).
        """
        if generation != self._noted_generation:
            self._noted_generation = generation
            self._note = f"registered by the token of {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        checks = tuple(msgspec.structs.replace(each, notes=self._note) for each in registration.checks)
        return msgspec.structs.replace(registration, checks=checks)

    def _next_batch(self) -> list[ServiceName]:
        """Take the next services whose checks are to be reported, changed verdicts first."""
        batch: list[ServiceName] = []
        for waiting in (self._urgent, self._routine):
            while waiting and len(batch) < CALLS_AT_ONCE:
                service = next(iter(waiting))
                del waiting[service]
                if service in self._registered and service not in batch:
                    batch.append(service)
        return batch

    async def _report_check(self, service: ServiceName) -> None:
        if service not in self._services():
            return  # removed meanwhile
        desired = self._desired(service)
        own_check = check_id(service, self._registrant.connector_id)
        output = desired.output[:OUTPUT_CHARACTERS]
        try:
            is_known = await self._client.update_check(own_check, desired.ttl_verdict, output)
        except ConsulUnavailable:
            raise
        except ConsulError as error:
            # One service that we may not report must not keep the others from being reported.
            self._not_reported(service, error)
            return
        self._unreported.pop(service, None)
        if not is_known:
            # Reaped, or Consul has forgotten everything, or the check alone: find out what is there.
            self._registered.discard(service)
            self._unchecked.add(service)
            self._reconcile.set()
        elif self._generations.get(service) != self._client.token_generation:
            self._reconcile.set()

    def _not_reported(self, service: ServiceName, error: ConsulError) -> None:
        if not self._unreported:
            _log.error("report_refused", service=service, error=error)
        self._unreported[service] = str(error)
        if self._generations.get(service) != self._client.token_generation:
            self._reconcile.set()

    def _succeeded(self) -> None:
        if self.problem is not None:
            _log.info("consul_is_back")
        self.problem = None

    def _failed(self, error: ConsulError) -> None:
        if self.problem is None:
            _log.warning("consul_failed", error=error)
        self.problem = str(error)


async def _each(call: Callable[[Item], Awaitable[object]], items: Iterable[Item]) -> None:
    """Call for all items, CALLS_AT_ONCE at a time; an error is raised when its slice has ended."""
    pending = list(items)
    for start in range(0, len(pending), CALLS_AT_ONCE):
        calls = map(call, pending[start : start + CALLS_AT_ONCE])
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


def _probe_ids(checks: Iterable[CheckDefinition | ProbeDefinition]) -> frozenset[str]:
    return frozenset(each.check_id for each in checks if isinstance(each, ProbeDefinition))
