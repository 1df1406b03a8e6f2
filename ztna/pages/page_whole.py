"""The page of a whole mesh, from what its daemons say. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztna.pages import words
from ztna.pages.markup import Element, el
from ztna.pages.mesh import Edge, Mesh, Node, mesh_of
from ztna.pages.parts import (
    View,
    days,
    header,
    passing,
    peer_name,
    section,
    table,
    tile,
    waits,
    worst_first,
)
from ztna.pages.picture import picture, way_told
from ztna.pages.seen import Daemon, Relay
from ztna.pages.words import NONE, age, mark, number, plural


def view(
    seen: Mapping[str, Daemon | None], addresses: Mapping[str, str], processes: Mapping[str, str]
) -> View:
    """Return the page of a whole mesh: its daemons (None: no answer), their pages, and how its processes are."""
    there = [daemon for daemon in seen.values() if daemon is not None]
    mesh = mesh_of(there)
    silent = [name for name, daemon in seen.items() if daemon is None]
    unready = [name for name, daemon in seen.items() if daemon is not None and not daemon.readiness.ready]
    ended = [name for name, state in processes.items() if state != "running"]
    told = [f"{name} does not answer" for name in silent] + [f"{name} is not ready" for name in unready]
    told += [f"{name} has ended" for name in ended]
    state = mark("not ready", "; ".join(told)) if told else mark("ready", "Everything is ready")
    facts = [plural(len(seen), "daemon"), plural(len(processes), "process", "processes")]
    sessions = sum(len(daemon.sessions) for daemon in there if isinstance(daemon, Relay))
    tiles = [
        tile("services", f"{passing(mesh.services)} of {len(mesh.services)}", "passing"),
        tile("sessions", number(sessions), "at the relay"),
        tile("paths", number(len(mesh.paths)), "in use"),
        tile("agents", number(len(mesh.of("agent"))), "known here"),
    ]
    head = header("Mesh", "", state, [], facts, tiles)
    return View(
        "Mesh",
        {
            "head": head,
            "picture": section("picture", "The mesh", picture(mesh)),
            "services": _services(mesh),
            "paths": _paths(mesh),
            "daemons": _daemons(seen, addresses),
        },
    )


def _services(mesh: Mesh) -> Element:
    nodes = {node.id: node for node in mesh.nodes}
    services = {each.name: each for each in mesh.services}
    healths = {name: each.health for name, each in services.items()}
    shown = table(
        "Services",
        ("Service", "Address", "Ports", "Health", "Connectors", "Backends"),
        [
            (
                each.name,
                el("code", each.address) if each.address else mark("warning", "no address yet"),
                words.ports(each.ports),
                mark(each.health, f"{each.health}: {each.why}" if each.why else None),
                _names(each.connectors, nodes),
                _names(each.backends, nodes),
            )
            for each in (services[name] for name in worst_first(services, healths))
        ],
        "No service is known.",
        len(services),
    )
    return section("services", "Services", shown)


def _names(ids: Iterable[str], nodes: Mapping[str, Node]) -> str:
    return ", ".join(nodes[id_].name for id_ in ids) or NONE


def _paths(mesh: Mesh) -> Element:
    shown = table(
        "Paths",
        ("Agent", "Connector", "Path", "Relay", "Round trip", "Services"),
        [
            (
                peer_name(edge.start.partition(":")[2]),
                edge.end.partition(":")[2],
                way_told(edge),
                _relay(edge),
                words.milliseconds(edge.rtt_ms),
                ", ".join(edge.services),
            )
            for edge in mesh.paths
        ],
        "No session: connect to a service and it shows here.", figures=("Round trip",)
)  # fmt: skip
    return section("paths", "Paths", shown)


def _relay(edge: Edge) -> str:
    """Return the relay that a path goes through; a direct one goes through none."""
    return NONE if edge.way == "direct" or edge.via is None else edge.via.partition(":")[2]


def _daemons(seen: Mapping[str, Daemon | None], addresses: Mapping[str, str]) -> Element:
    shown = table(
        "Daemons",
        ("Daemon", "State", "Up for", "Certificate", "Page"),
        [
            (
                name,
                mark("no answer") if daemon is None
                else mark("ready") if daemon.readiness.ready
                else mark("not ready", waits(daemon)),
                NONE if daemon is None else age(daemon.uptime_s),
                days(daemon.certificate.days_left) if daemon is not None and daemon.certificate is not None else NONE,
                el("a", addresses[name].removeprefix("http://").rstrip("/"), href=addresses[name]),
            )
            for name, daemon in seen.items()
        ],
        "None.", figures=("Up for", "Certificate")
)  # fmt: skip
    return section("daemons", "Daemons", shown)
