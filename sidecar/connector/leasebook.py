"""The leases of our services as Consul's KV has them: the newest seen of each, and reading again on doubt.

An answer that is older than what is known is an old answer, unless a consistent read that began after that was
known says the same: then the KV was restored from a backup, and what it holds now is right, as it is for a
connector that has just started. A lease that vanishes from the KV (a Consul that was wiped) stays here until
another one is written, or until its address is another service's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from ztna.catalog import KvPair, KvSnapshot
from ztna.consul.client import ConsulClient
from ztna.consul.watch import KvWatch
from ztna.errors import ConsulError, ProtocolError
from ztna.jsontypes import from_json
from ztna.leases import SERVICE_PREFIX, Lease, Table, is_another, read_table, service_key, went_back
from ztna.names import ServiceName
from ztna.telemetry import dropped, logger

READ_AGAIN_SECONDS = 1.0
READ_AGAIN_EVERY_SECONDS = 0.1
COMPARE_AGAIN_SECONDS = 1.0
"""After a comparison with all of the KV that failed; also the least time between two of them."""

_log = logger(__name__)


class LeaseBook:
    """`changed(service, lease)` is called after another lease, or None, is what the book says of a service."""

    def __init__(
        self,
        client: ConsulClient,
        services: Container[ServiceName],
        changed: Callable[[ServiceName, Lease | None], None],
    ) -> None:
        self.watch = KvWatch(client, SERVICE_PREFIX)
        self._client = client
        self._services = services
        self._changed = changed
        self._leases: dict[ServiceName, Lease] = {}
        self._seen: dict[str, KvPair] = {}
        self._table = Table()
        self._doubted = asyncio.Event()
        self._reading: dict[ServiceName, asyncio.Future[None]] = {}
        self.watch.subscribe(self._published)

    def lease(self, service: ServiceName) -> Lease | None:
        """Return the lease to go by."""
        return self._leases.get(service)

    async def run(self) -> None:
        """Follow the KV until cancelled, and compare with all of it each time it seems to have gone back."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watch.run(), name="lease watch")
            while True:
                await self._doubted.wait()
                self._doubted.clear()
                try:
                    await self._compare()
                except ConsulError:
                    # The watch says what is wrong with Consul.
                    self._doubted.set()
                await asyncio.sleep(COMPARE_AGAIN_SECONDS)

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
            if name in self._services and self._seen.get(name) != pair:
                self._learn(ServiceName(name), pair)
        if any(service_key(service) not in snapshot.pairs for service in self._leases):
            # Otherwise nobody else's record matters here.
            self._table = read_table(snapshot.pairs, self._table)
            if went_back(self._leases, self._table):
                self._doubted.set()

    def _learn(self, service: ServiceName, pair: KvPair) -> None:
        self._seen[service] = pair
        try:
            lease = from_json(pair.value, Lease)
        except ProtocolError as error:
            dropped("leases", "malformed")
            _log.error("lease_malformed", service=service, error=error)
            return
        known = self._leases.get(service)
        if known is None or lease.epoch > known.epoch:
            self._go_by(service, lease)
        elif is_another(lease, known):
            self._doubted.set()

    async def _compare(self) -> None:
        """Go by what the KV has of services that are known by another lease since before it was read."""
        known = dict(self._leases)
        pairs = await self._client.kv_list(SERVICE_PREFIX, consistent=True)
        table = read_table({pair.key: pair for pair in pairs})
        for service, lease in went_back(known, table).items():
            was = known[service]
            if self._leases.get(service) is was:
                _log.warning("lease_went_back", service=service, address=was.ip, epoch=was.epoch)
                self._go_by(service, lease)

    def _go_by(self, service: ServiceName, lease: Lease | None) -> None:
        if lease is None:
            del self._leases[service]
            # The very same record may come back, restored.
            self._seen.pop(service, None)
        else:
            self._leases[service] = lease
            _log.info("leased", service=service, address=lease.ip, epoch=lease.epoch)
        self._changed(service, lease)
