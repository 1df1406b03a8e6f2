"""`ztna leases conflicts`: what agents report of their pools, from Consul's KV and from relays.

Knows nothing of the command line; ztna.cli.leases has the command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ztna.cli.admin import ask
from ztna.conflicts import CONFLICT_PREFIX, Report
from ztna.consul.client import ConsulClient
from ztna.errors import ProtocolError
from ztna.jsontypes import from_json


class Told(msgspec.Struct, frozen=True, order=True):
    """One agent's conflict; `by` says who told: `consul`, or a relay's admin address."""

    agent: str
    cidr: str
    with_: str = msgspec.field(name="with")
    detail: str = ""
    by: tuple[str, ...] = ()


class _RelayStatus(msgspec.Struct, frozen=True):
    conflicts: tuple[Told, ...] = ()


async def from_consul(client: ConsulClient) -> list[Told]:
    """Return what agents keep in KV; a record that cannot be read is shown as it is."""
    found = []
    for pair in await client.kv_list(CONFLICT_PREFIX, consistent=True):
        agent = pair.key.removeprefix(CONFLICT_PREFIX)
        try:
            report = from_json(pair.value, Report)
        except ProtocolError as error:
            found.append(Told(agent, "?", "an unreadable report", str(error), ("consul",)))
        else:
            found.append(Told(agent, report.cidr, report.with_, report.detail, ("consul",)))
    return found


def from_relay(admin: str) -> list[Told]:
    """Return what agents told the relay with this admin address (host:port or socket). Raises ZtnaError."""
    _, status = ask(admin, "/status", _RelayStatus)
    return [
        Told(each.agent.rpartition("/")[2], each.cidr, each.with_, each.detail, (admin,))
        for each in status.conflicts
    ]


def merged(told: Iterable[Told]) -> Sequence[Told]:
    """Return each agent's conflicts once, with all that told of them; the first told says the details."""
    found: dict[tuple[str, str, str], Told] = {}
    for each in told:
        key = (each.agent, each.cidr, each.with_)
        known = found.get(key)
        by = (*known.by, *each.by) if known is not None else each.by
        found[key] = msgspec.structs.replace(known or each, by=by)
    return sorted(found.values())
