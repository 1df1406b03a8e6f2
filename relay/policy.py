"""What may be routed: a certificate grant, an SRV record and a live connection, all three (design.md 2.2).

Pure: one snapshot of the SRV records and of the live registrations in, an order of connections or a refusal
out. Keeps nothing and counts no limits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TypeVar

import msgspec

from ztna.dns import SrvData, order
from ztna.errors import BadName, Refused
from ztna.identity import Identity
from ztna.names import ConnectorId, ServiceName, Zone
from ztna.reasons import Reason

CONNECTOR_LABEL = "connector"

Key = TypeVar("Key", bound=Hashable)


class Route(msgspec.Struct, frozen=True, order=True):
    """One SRV record of a service: which connector, and its place in the order (RFC 2782)."""

    priority: int
    weight: int
    connector_id: ConnectorId


class SrvEntry(msgspec.Struct, frozen=True):
    """The last answer for a service that was not stale, and who gave it; without routes it was negative."""

    routes: tuple[Route, ...]
    answered_at: float
    source: str = ""


class SrvTable(msgspec.Struct, frozen=True):
    """What DNS says of every service asked for. Times in seconds on the same clock as `now`.

    `fresh` is when the catalog behind each source's answers was last confirmed (its `_fresh.<zone>`), nothing for
    one that does not say; permission ends `hold_s` after that, or after the answer itself if that is older.
    """

    entries: Mapping[ServiceName, SrvEntry]
    fresh: Mapping[str, float]
    hold_s: float

    def routes(self, service: ServiceName, now: float) -> tuple[Route, ...] | None:
        """Return the service's routes, None when they are not known or too old to go by."""
        entry = self.entries.get(service)
        if entry is None or entry.source not in self.fresh:
            return None
        # One source's word that the catalog is confirmed says nothing of what another answered.
        oldest = min(entry.answered_at, self.fresh[entry.source])
        return entry.routes if now - oldest <= self.hold_s else None

    def fresh_sources(self, now: float) -> frozenset[str]:
        """Return the sources behind whose answers the catalog was confirmed recently enough."""
        return frozenset(source for source, at in self.fresh.items() if now - at <= self.hold_s)


EMPTY_TABLE = SrvTable({}, {}, 0.0)


def routes_of(records: Iterable[tuple[int, int, str]], zone: Zone) -> tuple[Route, ...]:
    """Return the routes that SRV records (priority, weight, target) name.

    A target that is not `<connector-id>.connector.<zone>` names no connector and is left out.
    """
    suffix = f".{CONNECTOR_LABEL}.{zone}"
    routes = []
    for priority, weight, target in records:
        label = target.removesuffix(suffix)
        if label == target:
            continue
        try:
            routes.append(Route(priority, weight, ConnectorId(label)))
        except BadName:
            continue
    return tuple(sorted(routes))


def candidates(
    identity: Identity,
    service: ServiceName,
    wanted: ConnectorId | None,
    live: Mapping[ConnectorId, Key],
    table: SrvTable,
    now: float,
    draw: Callable[[int], int],
    load: Mapping[Key, int],
) -> list[Key]:
    """Return the connector connections to offer a session to, in order.

    `live` has the newest connection of each connector that registered the service, `load` how many sessions
    each connection has. Raises Refused with, in
    this order and alike for every name: no_grant; no_such_service, policy_unknown, no_healthy_connector.
    """
    if not identity.may_use(service):
        raise Refused(Reason.NO_GRANT, f"{identity.name} carries no agent.{service}.ztna")
    if not live and service not in table.entries:
        raise Refused(Reason.NO_SUCH_SERVICE, service)
    routes = table.routes(service, now)
    if routes is None:
        raise Refused(Reason.POLICY_UNKNOWN, f"{service}: no SRV answer young enough")
    usable = [
        route for route in routes if route.connector_id in live and wanted in (None, route.connector_id)
    ]
    if not usable:
        raise Refused(Reason.NO_HEALTHY_CONNECTOR, service)
    loads = {each: load[key] for each, key in live.items()}
    return [live[connector_id] for connector_id in ordered(usable, draw, loads)]


def ordered(
    routes: Iterable[Route], draw: Callable[[int], int], loads: Mapping[ConnectorId, int]
) -> list[ConnectorId]:
    """Return the connector ids in the order in which to try them: RFC 2782, and of the first two the less loaded.

    Two drawn by weight, and then the one with fewer sessions for its weight, even out what chance and long
    sessions leave uneven, while connectors of weight 0 stay the last resort that they are.
    """
    records = order((SrvData(route.priority, route.weight, 0, route.connector_id) for route in routes), draw)
    distinct = list({record.target: record for record in reversed(records)}.values())[::-1]
    if len(distinct) > 1 and _is_better(distinct[1], distinct[0], loads):
        distinct[:2] = distinct[1::-1]
    return [ConnectorId(record.target) for record in distinct]


def _is_better(one: SrvData, other: SrvData, loads: Mapping[ConnectorId, int]) -> bool:
    if one.priority != other.priority:
        return False
    weights = (one.weight, other.weight) if one.weight or other.weight else (1, 1)
    sessions = [loads[ConnectorId(each.target)] for each in (one, other)]
    return sessions[0] * weights[1] < sessions[1] * weights[0]


def health(service: ServiceName, live: Collection[ConnectorId], table: SrvTable, now: float) -> str:
    """Return what agents are told of a service: passing, critical or unknown."""
    routes = table.routes(service, now)
    if routes is None:
        return "unknown"
    return "passing" if any(route.connector_id in live for route in routes) else "critical"
