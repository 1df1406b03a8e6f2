"""What goes into the keeper's planning and what comes out of it, as values.

Pure. What is planned is dnsd.keeper's; carrying it out is dnsd.keeping's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from typing import Literal

import msgspec

from dnsd.pool import Pool
from dnsd.services import Service
from ztna.catalog import TXN_OPERATIONS_MAX, KvCheckSession, TxnOp
from ztna.leases import KEEPER_KEY, Table

POOL_USE_WARNING = 0.9

Kind = Literal[
    "granted",
    "returned",
    "moved",
    "released",
    "repaired",
    "ports_changed",
    "pinned",
    "unpinned",
    "freed",
    "wish_granted",
    "wish_refused",
    "wish_forgotten",
]


class Rules(msgspec.Struct, frozen=True):
    """For how long a service may be gone before its lease is released, and what then rests how long."""

    pool: Pool
    grace_s: float
    quarantine_s: float


class CatalogRead(msgspec.Struct, frozen=True):
    """A consistent read: the names in the catalog and the Unix time before it was asked for."""

    names: frozenset[str]
    at: float


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper knows when it plans. `gone_since`: by service with a lease but not in the catalog.

    `epoch_floor` is the highest epoch it has seen, which KV may have lost since.
    """

    services: Mapping[str, Service]
    table: Table
    gone_since: Mapping[str, float] = {}
    catalog_read: CatalogRead | None = None
    epoch_floor: int = 0


class Change(msgspec.Struct, frozen=True):
    """One service's step, whole or not at all; `operations` guard each key by its index.

    `why` is for the log, where the kind does not say it.
    """

    kind: Kind
    service: str
    address: IPv4Address | None
    operations: tuple[TxnOp, ...]
    why: str = ""


ProblemKind = Literal[
    "pool_exhausted",
    "lease_unreadable",
    "service_not_served",
    "virtual_ip_refused",
    "outside_pool",
    "catalog_empty",
]
WITHOUT_LEASE: frozenset[ProblemKind] = frozenset(
    {"pool_exhausted", "lease_unreadable", "service_not_served"}
)
"""The problems that leave their service without an address, or not served."""


class Problem(msgspec.Struct, frozen=True, order=True):
    """A service that has no lease, is not served, or has not the address it asks for, and what to do."""

    service: str
    kind: ProblemKind
    what: str


class PoolUse(msgspec.Struct, frozen=True):
    """How many addresses of the pool are leased, and how many rest and cannot be given out yet."""

    size: int
    leased: int
    resting: int

    @property
    def is_scarce(self) -> bool:
        """Whether so much is in use that somebody should enlarge the pool."""
        return self.leased + self.resting >= POOL_USE_WARNING * self.size


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The changes, what stands in the way of others, and what to remember for the next plan.

    `wants_catalog_read`: releases are due and need a CatalogRead. `due_at` is when time alone may change the plan.
    """

    changes: tuple[Change, ...]
    problems: tuple[Problem, ...]
    gone_since: Mapping[str, float]
    wants_catalog_read: bool
    due_at: float | None
    epoch_floor: int
    pool: PoolUse


class Transaction(msgspec.Struct, frozen=True):
    """Changes that are carried out together, and the operations that do it."""

    changes: tuple[Change, ...]
    operations: tuple[TxnOp, ...]


def transactions(changes: Sequence[Change], session: str) -> tuple[Transaction, ...]:
    """Pack changes into transactions; each fails as a whole once `session` has lost the keeper's lock."""
    guard = KvCheckSession(KEEPER_KEY, session)
    packed: list[list[Change]] = []
    room = 0
    for change in changes:
        room -= len(change.operations)
        if room < 0:
            packed.append([])
            room = TXN_OPERATIONS_MAX - 1 - len(change.operations)
        packed[-1].append(change)
    return tuple(
        Transaction(
            tuple(batch), (guard, *(operation for change in batch for operation in change.operations))
        )
        for batch in packed
    )
