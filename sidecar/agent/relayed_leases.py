"""Which leases this agent serves where Consul is out of reach: those that DNS tells, asked through the relays.

The same to its owner as sidecar.agent.leases, which reads Consul. What a record says of a lease is decided in
sidecar.agent.told_leases.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Protocol

from sidecar.agent.rereading import Rereading
from sidecar.agent.told_leases import listed, service_of, told
from ztna.dns import Message, Type
from ztna.errors import ResolverUnavailable
from ztna.identity import Grants
from ztna.leases import Lease
from ztna.names import ServiceName, Zone
from ztna.telemetry import dropped, logger

READS_AT_ONCE_MAX = 16
SERVICES_MAX = 5_000
ROUND_SECONDS = 20.0
"""How often everything is asked for again; a service whose health changed, or whose epoch is old, at once."""
ROUND_JITTER = 0.2
RETRY_SECONDS = 1.0
RETRIES_MAX = 48
"""How many of those not answered are asked for again at once: of each two questions, of the 128 a second that a relay
answers."""
RESOLVED_SECONDS = 1.0
"""How long a program waits for the answer about a name while its lease is asked for: resolvers give up at 5 s."""
HOLD_SECONDS = 600.0
"""For so long a name that nobody answers for keeps its lease (design.md 2.8: names may be stale)."""

_WHERE = "agent_leases"
_log = logger(__name__)


class Asker(Protocol):
    """What is needed of sidecar.agent.names.RelayedNames."""

    async def ask(self, name: str, kind: Type) -> Message:
        """Return the response to a question. Raises ResolverUnavailable."""


class RelayedLeases:
    """Follows the leases by DNS and tells of every change; reads a single one anew when asked to."""

    def __init__(
        self,
        names: Asker,
        zone: Zone,
        grants: Grants,
        is_ours: Callable[[ServiceName, Lease], bool],
        *,
        changed: Callable[[Mapping[ServiceName, Lease]], None],
        read: Callable[[ServiceName, Lease | None], None],
    ) -> None:
        """As sidecar.agent.leases.LeaseFollower."""
        self._names = names
        self._zone = zone
        self._grants = grants
        self._is_ours = is_ours
        self._changed = changed
        self._read = read
        self._rereading = Rereading(self._reread)
        self._unanswered: dict[ServiceName, float] = {}  # and since when, the longest not asked for first
        self._newer: dict[ServiceName, Lease | None] = {}
        self._resolving: dict[ServiceName, asyncio.Event] = {}
        self._again = asyncio.Event()
        self._problem = ""
        self._has_published = False
        self.leases: Mapping[ServiceName, Lease] = {}

    def addresses(self) -> Mapping[str, IPv4Address]:
        """Return the leased address of every service that is known: the granted ones."""
        return {str(name): lease.ip for name, lease in self.leases.items()}

    def use_grants(self, grants: Grants) -> None:
        """Go by another certificate's grants from now on."""
        self._grants = grants
        self.look_soon()

    def look_soon(self) -> None:
        """Ask for everything again: a relay was connected, or there is another certificate."""
        self._again.set()

    def read_again(self, service: ServiceName) -> None:
        """Ask for one lease now, and tell `read`."""
        self._rereading.want(service)

    async def resolved(self, name: str, addresses: Collection[IPv4Address]) -> None:
        """Learn the lease of a service whose name a program found to lead elsewhere than is known here.

        So it is served by when the program calls: one that a list was too long for, or that has just moved.
        """
        service = service_of(name, self._zone)
        if service is None:
            return
        known = self.leases.get(service)
        if (known is None and len(self.leases) < SERVICES_MAX) or (
            known is not None and known.ip not in addresses
        ):
            with suppress(TimeoutError):
                async with asyncio.timeout(RESOLVED_SECONDS):
                    await self._reread_once(service)

    async def _reread_once(self, service: ServiceName) -> None:
        """Ask for a lease, or wait for who asks for it already: many names are below one service's."""
        asking = self._resolving.get(service)
        if asking is not None:
            await asking.wait()
            return
        asking = self._resolving[service] = asyncio.Event()
        try:
            await self._reread(service)
        finally:
            del self._resolving[service]
            asking.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rereading.run(), name="leases read again")
            while True:
                self._again.clear()
                is_listed = await self._round()
                ends = loop.time() + ROUND_SECONDS * _jitter()
                while not self._again.is_set() and (left := ends - loop.time()) > 0:
                    is_complete = is_listed and not self._unanswered
                    await self._rest(left if is_complete else min(left, RETRY_SECONDS * _jitter()))
                    if not is_listed:
                        break
                    if self._unanswered and not self._again.is_set():
                        await self._ask_for(list(self._unanswered)[:RETRIES_MAX], self.leases)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._again.wait()

    async def _round(self) -> bool:
        """Ask for every service; False when not even which there are can be had."""
        try:
            services = frozenset(await self._granted())
        except ResolverUnavailable as error:
            self._say(str(error))
            return False
        self._unanswered = {each: since for each, since in self._unanswered.items() if each in services}
        # A relay answers so many a second: whoever got nothing the last time comes first.
        await self._ask_for([*self._unanswered, *sorted(services - self._unanswered.keys())], {})
        return True

    async def _ask_for(self, services: Iterable[ServiceName], others: Mapping[ServiceName, Lease]) -> None:
        """Ask for the leases of some services and publish them beside the others'."""
        found: dict[ServiceName, Lease | None] = {}
        slots = asyncio.Semaphore(READS_AT_ONCE_MAX)
        self._newer = {}

        async def look(service: ServiceName) -> None:
            async with slots:
                found[service] = await self._look(service)

        async with asyncio.TaskGroup() as tasks:
            for service in services:
                tasks.create_task(look(service), name=f"lease of {service}")
        # What was read again meanwhile is not older than what this found.
        leases: dict[ServiceName, Lease | None] = {**others, **found, **self._newer}
        self._publish({service: lease for service, lease in leases.items() if lease is not None})

    async def _granted(self) -> Iterable[ServiceName]:
        """Return the services to ask for: those that the certificate names, or all that the relay lets us see."""
        if not self._grants.every:
            return sorted(self._grants.services)[:SERVICES_MAX]
        message = await self._names.ask(f"_services._dns-sd._udp.{self._zone}", Type.PTR)
        services = self._grants.services | set(listed(message, self._zone))
        if message.truncated:
            dropped(_WHERE, "list_truncated")
            services |= self.leases.keys()  # who is not on it has not gone for that
        return sorted(services)[:SERVICES_MAX]

    async def _look(self, service: ServiceName) -> Lease | None:
        """Return a service's lease as DNS tells it; what is not answered stays as it was, for a while."""
        try:
            lease = await self._ask(service)
        except ResolverUnavailable as error:
            self._say(str(error))
            now = asyncio.get_running_loop().time()
            since = self._unanswered[service] = self._unanswered.pop(service, now)
            return self.leases.get(service) if now - since < HOLD_SECONDS else None
        self._unanswered.pop(service, None)
        return lease

    async def _ask(self, service: ServiceName) -> Lease | None:
        name = f"{service}.{self._zone}"
        text, address = await asyncio.gather(self._names.ask(name, Type.TXT), self._names.ask(name, Type.A))
        lease = told(name, text, address)
        if lease is not None and not self._is_ours(service, lease):
            dropped(_WHERE, "unusable")
            _log.debug("lease_unusable", service=service, detail=f"{lease.ip} is outside agent.pool")
            return None
        return lease

    async def _reread(self, service: ServiceName) -> None:
        if not self._grants.allows(service):
            return
        try:
            lease = await self._ask(service)
        except ResolverUnavailable as error:
            _log.warning("lease_unreadable", service=service, detail=error)
            return
        self._unanswered.pop(service, None)
        self._newer[service] = lease
        if self.leases.get(service) != lease:
            kept = {name: each for name, each in self.leases.items() if name != service}
            self._publish(kept | ({service: lease} if lease is not None else {}))
        self._read(service, lease)

    def _publish(self, found: Mapping[ServiceName, Lease]) -> None:
        if not self._unanswered:
            self._say("")
        if not self._has_published or found != self.leases:
            self._has_published = True
            self.leases = found
            self._changed(found)

    def _say(self, problem: str) -> None:
        if problem and not self._problem:
            _log.warning("leases_not_told", detail=problem)
        self._problem = problem


def _jitter() -> float:
    return random.uniform(1 - ROUND_JITTER, 1 + ROUND_JITTER)
