"""Which leases this agent serves: those of granted services, inside its pool, as Consul's KV has them now.

Reads and follows; binds nothing and decides about no session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address

from sidecar.agent.rereading import Rereading
from ztna.catalog import KvPair, KvSnapshot
from ztna.consul.client import ConsulClient
from ztna.consul.watch import KvWatch
from ztna.errors import BadName, ConsulError, LeaseError, ProtocolError
from ztna.identity import Grants
from ztna.jsontypes import from_json
from ztna.leases import SCHEMA_KEY, SCHEMA_VERSION, SERVICE_PREFIX, Lease, Table, read_table, service_key
from ztna.names import ServiceName
from ztna.telemetry import dropped, logger

RETRY_SECONDS = 1.0

_WHERE = "agent_leases"
_log = logger(__name__)


class LeaseFollower:
    """Follows the leases and tells of every change; reads a single one anew when asked to."""

    def __init__(
        self,
        client: ConsulClient,
        grants: Grants,
        is_ours: Callable[[ServiceName, Lease], bool],
        *,
        changed: Callable[[Mapping[ServiceName, Lease]], None],
        read: Callable[[ServiceName, Lease | None], None],
    ) -> None:
        """`is_ours` says whether a lease may be served here, whoever wrote it.

        `changed` gets all leases to serve, at first and after each change; `read` the answers to `read_again`.
        """
        self.watch = KvWatch(client, SERVICE_PREFIX)
        self._client = client
        self._grants = grants
        self._is_ours = is_ours
        self._changed = changed
        self._read = read
        self._rereading = Rereading(self._reread)
        self._odd: dict[str, str] = {}
        self._table = Table()
        self.leases: Mapping[ServiceName, Lease] = {}

    def addresses(self) -> Mapping[str, IPv4Address]:
        """Return the leased address of every service, granted or not."""
        return {name: stored.record.ip for name, stored in self._table.leases.items()}

    def use_grants(self, grants: Grants) -> None:
        """Go by another certificate's grants from now on."""
        self._grants = grants
        if self.watch.latest is not None:
            self._publish(self.watch.latest)

    def read_again(self, service: ServiceName) -> None:
        """Read one lease now, and tell `read`."""
        self._rereading.want(service)

    async def run(self) -> None:
        """Follow until cancelled. Raises LeaseError when the KV has a schema that is newer than this program."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watch.run(), name="leases watch")
            tasks.create_task(self._rereading.run(), name="leases read again")
            snapshot = await self.watch.changed()
            await self._check_schema()
            self._publish(snapshot)
            while True:
                newer = await self.watch.changed(snapshot)
                if newer.pairs is not snapshot.pairs:
                    self._publish(newer)
                snapshot = newer

    async def _check_schema(self) -> None:
        while True:
            try:
                pair = await self._client.kv_get(SCHEMA_KEY)
            except ConsulError as error:
                _log.warning("schema_unreadable", detail=error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            text = pair.value.decode("ascii", "replace").strip() if pair is not None else str(SCHEMA_VERSION)
            if text.isdigit() and int(text) <= SCHEMA_VERSION:
                return
            raise LeaseError(
                f"Consul KV {SCHEMA_KEY} is {text[:20]!r}; this program understands up to {SCHEMA_VERSION}: "
                "upgrade it"
            )

    async def _reread(self, service: ServiceName) -> None:
        try:
            pair = await self._client.kv_get(service_key(service))
        except ConsulError as error:
            _log.warning("lease_unreadable", service=service, detail=error)
            return
        self._read(service, self._lease(service, pair) if pair is not None else None)

    def _publish(self, snapshot: KvSnapshot) -> None:
        self._table = read_table(snapshot.pairs, self._table)
        found: dict[ServiceName, Lease] = {}
        odd = self._odd
        self._odd = {}
        for key, pair in snapshot.pairs.items():
            try:
                service = ServiceName(key.removeprefix(SERVICE_PREFIX))
            except BadName as error:
                self._note_odd(key, str(error), odd)
                continue
            if not self._grants.allows(service):
                continue
            lease = self._lease(service, pair, odd)
            if lease is not None:
                found[service] = lease
        self.leases = found
        self._changed(found)

    def _lease(
        self, service: ServiceName, pair: KvPair, known_odd: Mapping[str, str] | None = None
    ) -> Lease | None:
        """Return the record if it can be served."""
        try:
            lease = from_json(pair.value, Lease)
        except ProtocolError as error:
            self._note_odd(pair.key, str(error), known_odd or self._odd)
            return None
        if not self._is_ours(service, lease):
            self._note_odd(
                pair.key, f"{lease.ip} is outside agent.pool and its more_pools", known_odd or self._odd
            )
            return None
        return lease

    def _note_odd(self, key: str, detail: str, known: Mapping[str, str]) -> None:
        if known.get(key) != detail:
            dropped(_WHERE, "unusable")
            _log.warning("lease_unusable", key=key, detail=detail)
        self._odd[key] = detail
