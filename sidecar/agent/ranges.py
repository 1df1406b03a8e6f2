"""The pools as far as this host lets the agent have them, and who hears when it does not.

A pool that overlaps what the host already routes is not taken: traffic of the host's own would end here. It is
taken as soon as nothing overlaps it any more. A route that comes later, over a pool that is held, is only told.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from pyroute2 import IPRoute

from sidecar.agent.anyip import LOOPBACK, ROUTE_MARK, local_route
from ztna.conflicts import Collision, Occupied, collisions, conflict_key, detail, report
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError
from ztna.jsontypes import to_json
from ztna.runtime import Readiness
from ztna.telemetry import logger
from ztna.wire.control import Conflict

LOOK_SECONDS = 5.0
SESSION_SECONDS = 15.0
STEP_DOWN_SECONDS = 2.0

_log = logger(__name__)


class Ranges:
    """Looks at the host's routes every LOOK_SECONDS. `tell` hears of each collision that is new."""

    def __init__(
        self,
        client: ConsulClient,
        agent: str,
        pools: Sequence[IPv4Network],
        readiness: Readiness,
        *,
        routes_in: Path | None,
    ) -> None:
        """`routes_in` is the runtime directory when pools are to be routed here, None when they are not."""
        self._client = client
        self._agent = agent
        self._pools = tuple(pools)
        self._readiness = readiness
        self._routes_in = routes_in
        self._held = contextlib.AsyncExitStack()
        self._untaken = list(self._pools) if routes_in is not None else []
        self._session: str | None = None
        self._consul_error = ""
        self.tell: Callable[[Conflict], None] = lambda conflict: None
        self.leases: Callable[[], Mapping[str, IPv4Address]] = dict
        self.found: tuple[Collision, ...] = ()

    async def __aenter__(self) -> Ranges:
        """Take the pools that nothing overlaps. Raises ZtnaError when one cannot be had for another reason."""
        await self._look()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._held.aclose()

    async def run(self) -> None:
        """Keep looking, and keep the report in Consul for as long as something collides, until cancelled."""
        try:
            while True:
                await self._keep_report()
                await asyncio.sleep(LOOK_SECONDS)
                await self._look()
        finally:
            if self._session is not None:
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

    async def _look(self) -> None:
        before = self.found
        self.found = collisions(self._pools, await asyncio.to_thread(occupied))
        for pool in list(self._untaken):
            if not any(each.pool == pool for each in self.found):
                assert self._routes_in is not None, "only then is there something to take"
                await self._held.enter_async_context(local_route(pool, self._routes_in))
                self._untaken.remove(pool)
        self._show()
        if self.found != before:
            for each in self.found:
                _log.warning("pool_conflict", pool=each.pool, detail=each.occupied.what)
            for conflict in self.conflicts():
                self.tell(conflict)

    def _show(self) -> None:
        said = "; ".join(f"{each.pool} overlaps {each.occupied.what}" for each in self.found)
        if self._untaken:
            self._readiness.awaiting("pool", f"{said}: not taken until that is gone, or the pool another")
        elif self._routes_in is not None:
            self._readiness.done("pool")
        if said and not self._untaken:
            self._readiness.warn("conflict", said)
        else:
            self._readiness.unwarn("conflict")

    async def _keep_report(self) -> None:
        """Write the report under a session, so that it goes when the agent goes; take it back when all is well."""
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


def occupied() -> list[Occupied]:
    """Return the networks that this host routes, but for the default, loopback's own and what agents added."""
    with IPRoute() as netlink:
        links = {link["index"]: link.get("ifname", "?") for link in netlink.get_links()}
        found = []
        for route in netlink.get_routes(family=socket.AF_INET):
            if route["dst_len"] == 0 or route["proto"] == ROUTE_MARK:
                continue
            network = IPv4Network((route.get("dst"), route["dst_len"]), strict=False)
            link = links.get(route.get("oif"), "no device")
            if not (link == "lo" and network.subnet_of(LOOPBACK)):
                found.append(Occupied(network, f"route {network} ({link})"))
    return found
