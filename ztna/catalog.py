"""What Consul holds, as values: instances, registrations, KV pairs and transactions (design.md 4).

Pure. Reading and writing them is ztna.consul's; nothing here knows HTTP or the shapes of Consul's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

TXN_OPERATIONS_MAX = 64
"""Consul refuses a larger transaction as a whole (agent/txn_endpoint.go, maxTxnOps)."""

MESH_TAG = "ztna"

Status = Literal["passing", "warning", "critical"]
ProbeKind = Literal["tcp", "udp", "http", "grpc", "script"]


class TaggedAddress(msgspec.Struct, frozen=True):
    """One entry of TaggedAddresses, e.g. `virtual`."""

    address: str
    port: int


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One registered instance of a service with the worst status of its checks and its node's.

    `address` is the service's own, or its node's when it has none. `instance_id` is unique on a `node` only.
    """

    service: str
    instance_id: str
    node: str
    address: str
    port: int
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = {}
    weight_passing: int = 1
    weight_warning: int = 1
    tagged_addresses: Mapping[str, TaggedAddress] = {}
    status: Status = "passing"

    @property
    def weight(self) -> int:
        """The weight for its status; 0 while critical."""
        if self.status == "critical":
            return 0
        return self.weight_passing if self.status == "passing" else self.weight_warning


class CatalogSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The services that carry a tag, all their instances (critical ones too), by service name.

    Instances are ordered by (node, instance_id). `confirmed_at` (Unix seconds) is when Consul last said that
    this is how things are; it moves without a change of `services`. `index` is Consul's.
    """

    services: Mapping[str, tuple[Instance, ...]] = {}
    index: int = 0
    confirmed_at: float = 0.0


class KvPair(msgspec.Struct, frozen=True, kw_only=True):
    """A KV entry; `session` is the lock's holder."""

    key: str
    value: bytes
    modify_index: int
    create_index: int = 0
    lock_index: int = 0
    flags: int = 0
    session: str | None = None


class KvSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Every pair under a prefix, by key. `confirmed_at` as in CatalogSnapshot."""

    pairs: Mapping[str, KvPair] = {}
    index: int = 0
    confirmed_at: float = 0.0


class KvSet(msgspec.Struct, frozen=True):
    """Set a key. With `cas`, only if its modify index is that one; 0 is: only if there is no such key."""

    key: str
    value: bytes
    cas: int | None = None


class KvDeleteCas(msgspec.Struct, frozen=True):
    """Delete a key, only if its modify index is `index`; one that is not there is no failure."""

    key: str
    index: int


class KvCheckSession(msgspec.Struct, frozen=True):
    """Fail the transaction unless the session holds the lock on the key."""

    key: str
    session: str


class KvCheckIndex(msgspec.Struct, frozen=True):
    """Fail the transaction unless the key's modify index is `index`."""

    key: str
    index: int


class KvCheckNotExists(msgspec.Struct, frozen=True):
    """Fail the transaction if the key exists."""

    key: str


TxnOp = KvSet | KvDeleteCas | KvCheckSession | KvCheckIndex | KvCheckNotExists


class TxnFailure(msgspec.Struct, frozen=True):
    """Which operation (its place in the transaction) failed, and Consul's words."""

    operation: int
    what: str


class TxnOutcome(msgspec.Struct, frozen=True):
    """All operations were carried out (`pairs` has what they set), or none and `failures` says why."""

    failures: tuple[TxnFailure, ...] = ()
    pairs: tuple[KvPair, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the transaction was carried out."""
        return not self.failures


class CheckDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A TTL check of a service: whoever registered it reports within `ttl_s`, or it goes critical.

    After `deregister_after_s` of being critical (at least 60) the service is reaped; Consul looks about
    every 30 s.
    """

    check_id: str
    name: str
    ttl_s: float
    status: Status = "critical"
    notes: str = ""
    deregister_after_s: float | None = None


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """How Consul's agent asks a backend itself; `target` is host:port, a URL for http, host:port/service for grpc."""

    kind: ProbeKind
    target: str
    interval_s: float
    timeout_s: float
    success_before_passing: int = 1
    failures_before_critical: int = 1
    failures_before_warning: int | None = None
    tls: bool = False
    tls_name: str | None = None
    tls_skip_verify: bool = False
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()


class ProbeDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A check of a service that Consul's agent runs; reaping as in CheckDefinition.

    An agent that is given another probe for a known check id goes on with the old one as well (seen on 1.8.7 and
    1.19.2), so another probe needs another id.
    """

    check_id: str
    name: str
    probe: Probe
    status: Status = "critical"
    notes: str = ""
    deregister_after_s: float | None = None


class CheckSeen(msgspec.Struct, frozen=True):
    """What Consul says of one check."""

    status: Status
    output: str


class ChecksSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Every check on one node, by id. `confirmed_at` as in CatalogSnapshot."""

    checks: Mapping[str, CheckSeen] = {}
    index: int = 0
    confirmed_at: float = 0.0


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """A service instance as one asks the local Consul agent to register it."""

    service: str
    instance_id: str
    address: str
    port: int
    tags: tuple[str, ...] = (MESH_TAG,)
    meta: Mapping[str, str] = {}
    tagged_addresses: Mapping[str, TaggedAddress] = {}
    weight_passing: int = 1
    weight_warning: int = 1
    checks: tuple[CheckDefinition | ProbeDefinition, ...] = ()


class AgentService(msgspec.Struct, frozen=True, kw_only=True):
    """A service as the local Consul agent knows it (`/v1/agent/services`); health is not in it."""

    service: str
    instance_id: str
    address: str
    port: int
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = {}
    tagged_addresses: Mapping[str, TaggedAddress] = {}
    weight_passing: int = 1
    weight_warning: int = 1
