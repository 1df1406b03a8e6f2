"""Where the virtual addresses meet networks that a host already has (design.md 4), as values.

Pure. Reading a host's routes and telling others is sidecar.agent's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

import msgspec

CONFLICT_PREFIX = "ztna/conflict/"
LEASES_NAMED_MAX = 5


class Occupied(msgspec.Struct, frozen=True, order=True):
    """A network that a host reaches some other way; `what` says which, for people."""

    network: IPv4Network
    what: str


class Collision(msgspec.Struct, frozen=True, order=True):
    """A pool that overlaps something of the host's."""

    pool: IPv4Network
    occupied: Occupied


class Report(msgspec.Struct, frozen=True):
    """KV `ztna/conflict/<agent-id>`: the first collision of an agent, and in `detail` what else there is."""

    cidr: str
    with_: str = msgspec.field(name="with")
    detail: str = ""
    seen_at: float = 0.0


def conflict_key(agent: str) -> str:
    """Return the KV key for an agent's report; of a SPIFFE name the last part is the agent's id."""
    return CONFLICT_PREFIX + agent.rpartition("/")[2]


def collisions(pools: Iterable[IPv4Network], occupied: Iterable[Occupied]) -> tuple[Collision, ...]:
    """Return every overlap of a pool with what a host has, in order."""
    taken = sorted(set(occupied))
    return tuple(
        Collision(pool, each) for pool in sorted(pools) for each in taken if each.network.overlaps(pool)
    )


def detail(collision: Collision, leases: Mapping[str, IPv4Address]) -> str:
    """Say which services lie in the overlap, some by name."""
    names = sorted(name for name, address in leases.items() if address in collision.occupied.network)
    if not names:
        return "no lease lies there yet"
    more = len(names) - LEASES_NAMED_MAX
    return f"leases there: {', '.join(names[:LEASES_NAMED_MAX])}" + (f" and {more} more" if more > 0 else "")


def report(found: tuple[Collision, ...], leases: Mapping[str, IPv4Address], seen_at: float) -> Report:
    """Return what an agent says of its collisions (at least one); `seen_at` in Unix seconds."""
    first, *others = found
    also = "".join(f"; also {each.pool} with {each.occupied.what}" for each in others)
    return Report(str(first.pool), first.occupied.what, detail(first, leases) + also, seen_at)
