"""The pools as far as this host lets the agent have them, and who hears when it does not.

A pool that overlaps what the host already routes is not taken, and one that is held is given up when such a route
comes: traffic of the host's own would end here. It is taken as soon as nothing overlaps it any more. What the hosts
file and the agent's own overrides say is compared with the leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

from pyroute2 import IPRoute

from sidecar.agent.anyip import ROUTE_MARK
from sidecar.agent.places import Places
from ztna.conflicts import (
    AnyNetwork,
    Collision,
    HostsLine,
    Occupied,
    collisions,
    conflict_key,
    detail,
    hosts_lines,
    misled,
    overridden,
    report,
)
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError, ZtnaError
from ztna.jsontypes import to_json
from ztna.leases import Lease
from ztna.names import ServiceName, Zone
from ztna.runtime import Readiness
from ztna.telemetry import logger
from ztna.wire.control import Conflict

LOOK_SECONDS = 5.0
SESSION_SECONDS = 15.0
STEP_DOWN_SECONDS = 2.0
HOSTS_BYTES_MAX = 4 * 1024 * 1024

Take = Callable[[AnyNetwork], contextlib.AbstractAsyncContextManager[None]]

_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})
_log = logger(__name__)


class Ranges:
    """Looks at the host every LOOK_SECONDS. `tell` hears of each collision that is new, and of each that is over."""

    def __init__(
        self,
        client: ConsulClient | None,
        agent: str,
        pools: Sequence[AnyNetwork],
        readiness: Readiness,
        *,
        take: Take | None,
        overrides: Mapping[str, IPv4Address],
        hosts_file: Path,
        domain: Zone,
        own_device: int | None = None,
    ) -> None:
        """`client` is None for an agent without Consul: it tells its relays alone.

        `take` has a network routed to the agent while inside; None when there is no need.

        `own_device` is the interface index of the agent's device: what is routed there is no conflict.
        """
        self._client = client
        self._agent = agent
        self._pools = tuple(pools)
        self._readiness = readiness
        self._take_in = take
        self._own_device = own_device
        self._overrides = overrides
        self._hosts_file = hosts_file
        self._domain = domain
        self._held: dict[AnyNetwork, contextlib.AsyncExitStack] = {}
        self._trouble = ""
        self._session: str | None = None
        self._consul_error = ""
        self.tell: Callable[[Conflict], None] = lambda conflict: None
        self.leases: Callable[[], Mapping[str, IPv4Address]] = dict
        self.serving: Callable[[], Mapping[ServiceName, Lease]] = dict
        self.moved: Callable[[], None] = lambda: None
        """Is called when `places` says something else; before a network is given up, so that it can be left."""
        self.found: tuple[Collision, ...] = ()

    async def __aenter__(self) -> Ranges:
        """Take the pools that nothing overlaps. Raises ZtnaError when one cannot be had for another reason."""
        routed = collisions(self._pools, await asyncio.to_thread(occupied, self._own_device))
        for pool in self._free(routed):
            await self._take(pool)
        self._see(routed)
        return self

    async def __aexit__(self, *exception: object) -> None:
        for held in self._held.values():
            await held.aclose()

    @property
    def places(self) -> Places:
        """Where services can be served now."""
        had = self._pools if self._take_in is None else tuple(self._held)
        return Places(frozenset(had), overridden(self._overrides, self.leases())[0])

    async def run(self) -> None:
        """Keep looking, and keep the report in Consul for as long as something collides, until cancelled."""
        try:
            while True:
                await self._keep_report()
                await asyncio.sleep(LOOK_SECONDS)
                await self._look()
        finally:
            if self._session is not None and self._client is not None:
                with contextlib.suppress(ConsulError, TimeoutError):
                    async with asyncio.timeout(STEP_DOWN_SECONDS):
                        await self._client.session_destroy(self._session)

    def conflicts(self) -> list[Conflict]:
        """Return what a relay is to know."""
        leases = self.leases()
        return [
            Conflict(str(each.pool), each.occupied.what, detail(each, leases))
            for each in {each.pool: each for each in reversed(self.found)}.values()
        ]

    def status(self) -> object:
        """Return what `/status` shows."""
        return {
            "refused": [str(pool) for pool in self._untaken],
            "conflicts": [{"cidr": str(each.pool), "with": each.occupied.what} for each in self.found],
        }

    @property
    def _untaken(self) -> list[AnyNetwork]:
        return [pool for pool in self._pools if pool not in self._held] if self._take_in else []

    def _free(self, routed: Sequence[Collision]) -> list[AnyNetwork]:
        return [pool for pool in self._untaken if not any(each.pool == pool for each in routed)]

    async def _look(self) -> None:
        routed = collisions(self._pools, await asyncio.to_thread(occupied, self._own_device))
        lines = await asyncio.to_thread(self._hosts)
        for pool in [each.pool for each in routed if each.pool in self._held]:
            await self._give_up(pool)
        self._trouble = ""
        for pool in self._free(routed):
            try:
                await self._take(pool)
            except ZtnaError as error:
                # A route that came since the look, for one; it is tried again.
                self._trouble = str(error)
            else:
                self.moved()
        self._see((*routed, *self._misleading(lines)))

    def _misleading(self, lines: Sequence[HostsLine]) -> tuple[Collision, ...]:
        """Return what of the agent's overrides and the hosts file contradicts the leases."""
        places = self.places
        served: dict[str, Sequence[IPv4Address | IPv6Address]] = {
            name: (ip,) for name, ip in self.leases().items()
        }
        served |= {service: places.of(service, lease) for service, lease in self.serving().items()}
        return (*overridden(self._overrides, self.leases())[1], *misled(lines, served))

    def _see(self, found: tuple[Collision, ...]) -> None:
        before, self.found = self.found, found
        self._show()
        if found == before:
            return
        for each in found:
            if each not in before:
                _log.warning("pool_conflict", pool=each.pool, detail=each.occupied.what)
        conflicts = self.conflicts()
        gone = {str(each.pool) for each in before} - {each.cidr for each in conflicts}
        for cidr in sorted(gone):
            _log.info("pool_conflict_over", pool=cidr)
        for conflict in (*conflicts, *(Conflict(cidr, "") for cidr in sorted(gone))):
            self.tell(conflict)

    async def _take(self, pool: AnyNetwork) -> None:
        assert self._take_in is not None, "only then is there something to take"
        held = contextlib.AsyncExitStack()
        await held.enter_async_context(self._take_in(pool))
        self._held[pool] = held

    async def _give_up(self, pool: AnyNetwork) -> None:
        """Leave a network to the host: nothing of ours is called there any more."""
        held = self._held.pop(pool, None)
        if held is not None:
            _log.warning("pool_given_up", pool=pool)
            self.moved()
            await held.aclose()

    def _hosts(self) -> list[HostsLine]:
        try:
            with self._hosts_file.open("rb") as file:
                text = file.read(HOSTS_BYTES_MAX).decode("utf-8", "replace")
        except OSError:
            return []  # a host without one says nothing
        return hosts_lines(text, self._domain, str(self._hosts_file))

    def _show(self) -> None:
        said = "; ".join(f"{each.pool}: {each.occupied.what}" for each in self.found)
        if self._untaken:
            names = ", ".join(map(str, self._untaken))
            why = self._trouble or said
            self._readiness.awaiting("pool", f"{names} not taken until what overlaps it is gone: {why}")
        elif self._take_in is not None:
            self._readiness.done("pool")
        if said and not self._untaken:
            self._readiness.warn("conflict", said)
        else:
            self._readiness.unwarn("conflict")

    async def _keep_report(self) -> None:
        """Write the report under a session, so that it goes when the agent goes; take it back when all is well."""
        if self._client is None:
            return
        try:
            if not self.found:
                session, self._session = self._session, None
                if session is not None:
                    await self._client.session_destroy(session)
                return
            if self._session is None or not await self._client.session_renew(self._session):
                self._session = await self._client.session_create(
                    "ztna-conflict", ttl_s=SESSION_SECONDS, behavior="delete", lock_delay_s=0.0
                )
            made = report(self.found, self.leases(), time.time())
            await self._client.kv_put(conflict_key(self._agent), to_json(made), acquire=self._session)
            self._consul_error = ""
        except ConsulError as error:
            # Relays have been told too; said once while it lasts.
            if str(error) != self._consul_error:
                _log.warning("conflict_not_reported", error=error)
            self._consul_error = str(error)


def occupied(own_device: int | None) -> list[Occupied]:
    """Return the networks that this host routes, but for the default, loopback's own and what agents added."""
    with IPRoute() as netlink:
        links = {link["index"]: link.get("ifname", "?") for link in netlink.get_links()}
        found = []
        for route in netlink.get_routes():
            if route["dst_len"] == 0 or route["proto"] == ROUTE_MARK or route["family"] not in _FAMILIES:
                continue
            network = ip_network((route.get_attr("RTA_DST"), route["dst_len"]), strict=False)
            index = route.get_attr("RTA_OIF")
            if own_device is not None and index == own_device:
                continue
            link = links.get(index, "no device")
            if not (link == "lo" and network.is_loopback):
                found.append(Occupied(network, f"route {network} ({link})"))
    return found
