"""Where the virtual addresses meet what a host already has (design.md 4), as values.

Pure. Reading a host's routes and hosts file and telling others is sidecar.agent's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import msgspec

CONFLICT_PREFIX = "ztna/conflict/"
LEASES_NAMED_MAX = 5

AnyNetwork = IPv4Network | IPv6Network


class Occupied(msgspec.Struct, frozen=True):
    """A network that a host reaches some other way; `what` says which, for people."""

    network: AnyNetwork
    what: str


class Collision(msgspec.Struct, frozen=True):
    """A pool, or one virtual address, and what of the host's it meets. `detail` says more where leases do not."""

    pool: AnyNetwork
    occupied: Occupied
    detail: str = ""


class HostsLine(msgspec.Struct, frozen=True):
    """What the host's own file says of a name of the zone."""

    address: IPv4Address | IPv6Address
    service: str
    what: str


class Report(msgspec.Struct, frozen=True):
    """KV `ztna/conflict/<agent-id>`: the first collision of an agent, and in `detail` what else there is."""

    cidr: str
    with_: str = msgspec.field(name="with")
    detail: str = ""
    seen_at: float = 0.0


def conflict_key(agent: str) -> str:
    """Return the KV key for an agent's report; of a SPIFFE name the last part is the agent's id."""
    return CONFLICT_PREFIX + agent.rpartition("/")[2]


def collisions(pools: Iterable[AnyNetwork], occupied: Iterable[Occupied]) -> tuple[Collision, ...]:
    """Return every overlap of a pool with what a host has, in order."""
    taken = sorted(set(occupied), key=lambda each: (*_place(each.network), each.what))
    return tuple(
        Collision(pool, each)
        for pool in sorted(pools, key=_place)
        for each in taken
        if pool.version == each.network.version and _overlap(pool, each.network)
    )


def overridden(
    overrides: Mapping[str, IPv4Address], leases: Mapping[str, IPv4Address]
) -> tuple[dict[str, IPv4Address], tuple[Collision, ...]]:
    """Return the overrides that may hold, and those that may not: what is leased to another leads to that."""
    holders = {address: name for name, address in leases.items()}
    holding, colliding = {}, []
    for service, address in sorted(overrides.items()):
        holder = holders.get(address, service)
        if holder == service:
            holding[service] = address
        else:
            one = IPv4Network(address)
            said = f"{address} is leased to {holder}, so {service} stays at its own lease"
            colliding.append(Collision(one, Occupied(one, f"agent.overrides of {service}"), said))
    return holding, tuple(colliding)


def hosts_lines(text: str, domain: str, file: str) -> list[HostsLine]:
    """Return what a hosts file (hosts(5)) says of services of the zone; lines it cannot read are not its."""
    suffix = "." + domain.lower()
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        address, *names = line.partition("#")[0].split() or [""]
        try:
            at = ip_address(address)
        except ValueError:
            continue
        for name in names:
            lowered = name.lower().rstrip(".")
            service = lowered.removesuffix(suffix)
            if service != lowered and "." not in service:
                found.append(HostsLine(at, service, f"{file}:{number}: {at} {lowered}"))
    return found


def misled(
    lines: Sequence[HostsLine], served: Mapping[str, Sequence[IPv4Address | IPv6Address]]
) -> tuple[Collision, ...]:
    """Return the lines that lead programs elsewhere than where a service is served; `served` by service."""
    return tuple(
        Collision(
            _alone(served[line.service][0]),
            Occupied(_alone(line.address), line.what),
            f"{line.service} is served at {' and '.join(map(str, served[line.service]))}",
        )
        for line in lines
        if served.get(line.service) and line.address not in served[line.service]
    )


def detail(collision: Collision, leases: Mapping[str, IPv4Address]) -> str:
    """Say what a collision means: which services lie in the overlap, some by name."""
    if collision.detail:
        return collision.detail
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


def _place(network: AnyNetwork) -> tuple[int, int, int]:
    return (network.version, int(network.network_address), network.prefixlen)


def _overlap(one: AnyNetwork, other: AnyNetwork) -> bool:
    """Say whether two networks of one version do."""
    first, last = int(one.network_address), int(one.broadcast_address)
    return first <= int(other.broadcast_address) and int(other.network_address) <= last


def _alone(address: IPv4Address | IPv6Address) -> AnyNetwork:
    return IPv4Network(address) if isinstance(address, IPv4Address) else IPv6Network(address)
