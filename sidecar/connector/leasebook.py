"""The leases of our services as Consul's KV has them: the newest ever seen of each, and reading again on doubt.

A lease that vanishes from the KV (a Consul that was wiped) stays here until a newer one is written: epochs only rise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from ztna.catalog import KvPair, KvSnapshot
from ztna.consul.client import ConsulClient
from ztna.consul.watch import KvWatch
from ztna.errors import ConsulError, ProtocolError
from ztna.jsontypes import from_json
from ztna.leases import SERVICE_PREFIX, Lease, service_key
from ztna.names import ServiceName
from ztna.telemetry import dropped, logger

READ_AGAIN_SECONDS = 1.0
READ_AGAIN_EVERY_SECONDS = 0.1

_log = logger(__name__)


class LeaseBook:
    """`changed(service, lease)` is called for each newer lease, after it is in the book."""

    def __init__(
        self,
        client: ConsulClient,
        services: Container[ServiceName],
        changed: Callable[[ServiceName, Lease], None],
    ) -> None:
        self.watch = KvWatch(client, SERVICE_PREFIX)
        self._client = client
        self._services = services
        self._changed = changed
        self._leases: dict[ServiceName, Lease] = {}
        self._seen: dict[str, int] = {}
        self._reading: dict[ServiceName, asyncio.Future[None]] = {}
        self.watch.subscribe(self._published)

    def lease(self, service: ServiceName) -> Lease | None:
        """Return the newest lease seen."""
        return self._leases.get(service)

    def services_changed(self) -> None:
        """Learn the leases of services that are new among ours."""
        if self.watch.latest is not None:
            self._published(self.watch.latest)

    async def read_again(self, service: ServiceName, epoch: int) -> Lease | None:
        """Return the newest lease, asking Consul for up to READ_AGAIN_SECONDS for one of that epoch or later.

        However many ask about a service at once, Consul is read once at a time for it.
        """
        try:
            async with asyncio.timeout(READ_AGAIN_SECONDS):
                while (lease := self.lease(service)) is None or lease.epoch < epoch:
                    await self._read(service)
        except TimeoutError:
            pass
        return self.lease(service)

    async def _read(self, service: ServiceName) -> None:
        reading = self._reading.get(service)
        if reading is not None:
            await asyncio.shield(reading)
            return
        reading = self._reading[service] = asyncio.get_running_loop().create_future()
        try:
            pair = await self._client.kv_get(service_key(service), consistent=True)
            if pair is not None:
                self._learn(service, pair)
            await asyncio.sleep(READ_AGAIN_EVERY_SECONDS)
        except ConsulError:
            # The watch says what is wrong with Consul; here it only means that nothing newer is known.
            await asyncio.sleep(READ_AGAIN_EVERY_SECONDS)
        finally:
            del self._reading[service]
            reading.set_result(None)

    def _published(self, snapshot: KvSnapshot) -> None:
        for key, pair in snapshot.pairs.items():
            name = key.removeprefix(SERVICE_PREFIX)
            if name in self._services and self._seen.get(name) != pair.modify_index:
                self._learn(ServiceName(name), pair)

    def _learn(self, service: ServiceName, pair: KvPair) -> None:
        self._seen[service] = pair.modify_index
        try:
            lease = from_json(pair.value, Lease)
        except ProtocolError as error:
            dropped("leases", "malformed")
            _log.error("lease_malformed", service=service, error=error)
            return
        known = self._leases.get(service)
        if known is None or lease.epoch > known.epoch:
            self._leases[service] = lease
            _log.info("leased", service=service, address=lease.ip, epoch=lease.epoch)
            self._changed(service, lease)
