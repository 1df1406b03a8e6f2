"""What `ztna top` shows: one row a service, put together from what the daemons of a host say of themselves. Pure.

Where several daemons know the same, who is nearest to it is believed: relays count sessions, agents bytes and flows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

Json = Mapping[str, Any]

SORTS = ("service", "rate", "flows", "sessions", "health", "rtt")
_WORST_FIRST = {"critical": 0, "warning": 1, "unknown": 2, "passing": 3}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One service. Bytes are of what runs or is open now; `relayed` is what this host's relay saw, both ways."""

    service: str
    address: str | None = None
    health: str | None = None
    connectors: tuple[str, ...] = ()
    sessions: int = 0
    flows: int = 0
    path: str | None = None
    rtt_ms: float | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    relayed_bytes: int = 0
    sent_per_s: float | None = None
    received_per_s: float | None = None
    relayed_per_s: float | None = None


def rows(states: Mapping[str, Json]) -> list[Row]:
    """Return the services that the daemons know, in order of their names.

    `states` is `/status` of each daemon by its name, its section: `relay`, or `relay 127.0.0.1:9441` of several.
    """
    agents = [state.get("agent", {}) for state in _of(states, "agent")]
    connectors = [state.get("connector", {}) for state in _of(states, "connector")]
    relays = list(_of(states, "relay"))
    relayed = [each for state in relays for each in state.get("sessions", ()) if each["open"]]
    listed = {each["service"]: each for agent in agents for each in agent.get("services", ())}
    fronted = _joined(connector.get("services", {}) for connector in connectors)
    ends = [each for end in (*agents, *connectors) for each in end.get("sessions", ())]
    sessions = Counter(each["service"] for each in (relayed if relays else ends))
    running = _joined(agent.get("streams", {}).get("running", {}) for agent in agents)
    links = {link["connector"]: link for agent in agents for link in agent.get("links", ())}
    relayed_to: dict[str, list[Json]] = defaultdict(list)
    for each in relayed:
        relayed_to[each["service"]].append(each)
    return [
        _row(
            name,
            listed.get(name, {}),
            fronted.get(name, {}),
            relayed_to[name],
            running.get(name, {}),
            links,
            sessions[name],
        )
        for name in sorted({*listed, *fronted, *relayed_to})
    ]


def _of(states: Mapping[str, Json], section: str) -> Iterator[Json]:
    return (state for name, state in states.items() if name.partition(" ")[0] == section)


def _joined(maps: Iterable[Mapping[str, Json]]) -> Mapping[str, Json]:
    """Return what the maps have; of what several have, the last."""
    return {name: value for each in maps for name, value in each.items()}


def _row(
    name: str,
    listed: Json,
    fronted: Json,
    relayed: Sequence[Json],
    running: Json,
    links: Mapping[str, Json],
    sessions: int,
) -> Row:
    own = listed.get("connector")
    link = links.get(own or "", {})
    paths = {each["path"] for each in relayed if each["path"] != "unseen"}
    return Row(
        service=name,
        address=listed.get("ip") or (fronted.get("lease") or {}).get("ip"),
        health=_health(listed.get("health"), fronted.get("verdict")),
        connectors=tuple(sorted({*filter(None, (own,)), *(each["connector_id"] for each in relayed)})),
        sessions=sessions,
        flows=running.get("flows", 0),
        path=link.get("path") or "+".join(sorted(paths)) or None,
        rtt_ms=link.get("rtt_ms"),
        sent_bytes=running.get("sent_bytes", 0),
        received_bytes=running.get("received_bytes", 0),
        relayed_bytes=sum(each["bytes"] for each in relayed),
    )


def _health(told: str | None, verdict: str | None) -> str | None:
    """Return what relays told the agent, of all connectors together; else the verdict of the one on this host."""
    return verdict if told in (None, "unknown") and verdict is not None else told


def with_rates(now: Iterable[Row], before: Mapping[str, Row], seconds: float) -> list[Row]:
    """Return the rows with bytes a second since earlier ones; a service that was not there then has none.

    Where flows have ended meanwhile there are fewer bytes than before: what they moved last is not known, so nought.
    """
    return [_with_rate(row, before.get(row.service), seconds) for row in now]


def _with_rate(row: Row, before: Row | None, seconds: float) -> Row:
    if before is None or seconds <= 0:
        return row

    return msgspec.structs.replace(
        row,
        sent_per_s=max(0, row.sent_bytes - before.sent_bytes) / seconds,
        received_per_s=max(0, row.received_bytes - before.received_bytes) / seconds,
        relayed_per_s=max(0, row.relayed_bytes - before.relayed_bytes) / seconds,
    )


def in_order(of: Iterable[Row], sort: str) -> list[Row]:
    """Return the rows by one of SORTS: names from a on, else what is most, or worst, first."""
    return sorted(of, key=_KEYS[sort])


_KEYS: Mapping[str, Callable[[Row], tuple[float, str]]] = {
    "service": lambda row: (0, row.service),
    "rate": lambda row: (
        -max((row.sent_per_s or 0) + (row.received_per_s or 0), row.relayed_per_s or 0),
        row.service,
    ),
    "flows": lambda row: (-row.flows, row.service),
    "sessions": lambda row: (-row.sessions, row.service),
    "health": lambda row: (_WORST_FIRST.get(row.health or "", len(_WORST_FIRST)), row.service),
    "rtt": lambda row: (-(row.rtt_ms or 0), row.service),
}


def short(value: float | None, unit: str = "") -> str:
    """Return a number in at most five characters and its unit: 999, 1.2k, 345M; nothing for none."""
    if value is None:
        return ""
    for letter, size in _SIZES:
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.1f}{letter}{unit}" if scaled < 99.95 else f"{scaled:.0f}{letter}{unit}"
    return f"{value:.0f}{unit}"


_SIZES: Sequence[tuple[str, float]] = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def daemons(states: Mapping[str, Json]) -> Iterator[tuple[str, bool, str]]:
    """Return of each daemon its name, whether it is ready, and what it waits for or warns of."""
    for name, state in states.items():
        readiness = state["readiness"]
        trouble = {**readiness["awaiting"], **readiness["warnings"]}
        yield (
            name,
            bool(readiness["ready"]),
            "; ".join(f"{what}: {detail}" if detail else what for what, detail in trouble.items()),
        )
