"""A connector's page: its services, their backends and checks, and who uses them. Pure."""

from __future__ import annotations

from ztna.pages import words
from ztna.pages.markup import Element, el
from ztna.pages.mesh import mesh_of
from ztna.pages.parts import (
    View,
    ending,
    head,
    peer_name,
    problem,
    section,
    table,
    tile,
    worst_first,
)
from ztna.pages.picture import picture
from ztna.pages.seen import Connector, Route
from ztna.pages.words import NONE, age, mark, number


def view(seen: Connector) -> View:
    """Return the page."""
    own = seen.connector
    backends = [backend for route in own.services.values() for backend in route.backends]
    passing = sum(backend.verdict == "passing" and not backend.ejected for backend in backends)
    tiles = [
        tile(
            "services",
            f"{sum(r.verdict == 'passing' for r in own.services.values())} of {len(own.services)}",
            "passing",
        ),
        tile("backends", f"{passing} of {len(backends)}", "passing"),
        tile(
            "flows",
            number(own.tcp_flows + own.udp_flows),
            f"{number(own.tcp_flows)} TCP, {number(own.udp_flows)} UDP",
        ),
        tile("sessions", number(own.sessions_total), "of agents"),
    ]
    return View(
        f"Connector {own.id}",
        {
            "head": head(seen, f"Connector {own.id}", tiles),
            "picture": section("picture", "What this connector fronts", picture(mesh_of([seen]))),
            "services": section("services", "Services", *problem(own.consul.problem or ""), _routes(seen)),
            "backends": section("backends", "Backends and their checks", _checks(seen)),
            "relays": section("relays", "Relays", _relays(seen)),
            "sessions": section("sessions", "Sessions", _sessions(seen)),
            "links": section("links", "Links", _links(seen)),
        }
        | ending(seen),
    )


def _routes(seen: Connector) -> Element:
    routes = seen.connector.services
    order = worst_first(routes, {name: route.verdict for name, route in routes.items()})
    return table(
        "Services",
        ("Service", "Address", "Ports", "Verdict", "For", "In Consul"),
        [
            (
                name,
                el("code", route.lease.ip) if route.lease else NONE,
                words.ports(route.lease.ports if route.lease else ()),
                mark(route.verdict),
                age(route.since_s),
                _registered(route),
            )
            for name, route in ((name, routes[name]) for name in order)
        ],
        "No service: the configuration has no routes.",
        len(routes),
        figures=("For",),
    )


def _registered(route: Route) -> Element:
    if route.refused:
        return mark("critical", f"refused: {route.refused}")
    if route.registered:
        return mark("passing", "registered")
    return mark("warning", "waits for its backend" if route.waiting_for_backend else "not yet")


def _checks(seen: Connector) -> Element:
    return table(
        "Backends",
        ("Backend", "Service", "Port", "Verdict", "Checks", "Flows", "Weight"),
        [
            (
                el("code", backend.backend),
                name,
                f"{backend.protocol} {backend.port}",
                mark("ejected") if backend.ejected else mark(backend.verdict),
                "; ".join(f"{check.kind}: {check.output}" for check in backend.checks) or NONE,
                number(backend.flows),
                number(backend.weight),
            )
            for name, route in seen.connector.services.items()
            for backend in route.backends
        ],
        "No backend.",
        figures=("Flows", "Weight"),
    )


def _relays(seen: Connector) -> Element:
    return table(
        "Relays",
        ("Relay", "Address", "State", "By", "Release"),
        [
            (
                each.name,
                el("code", each.address),
                mark("up") if each.connected else mark("down", each.problem or "not connected"),
                (each.transport or NONE).upper(),
                each.version or NONE,
            )
            for each in seen.connector.relays
        ],
        "No relay.",
    )


def _sessions(seen: Connector) -> Element:
    return table(
        "Sessions",
        ("Agent", "Service", "Relay", "State"),
        [
            (peer_name(each.agent), each.service, each.relay, mark(each.state))
            for each in seen.connector.sessions
        ],
        "No session: no agent uses what is behind this connector.",
        seen.connector.sessions_total,
    )


def _links(seen: Connector) -> Element:
    return table(
        "Links",
        ("Agent", "Relay", "Path"),
        [(peer_name(each.agent or NONE), each.relay, each.path) for each in seen.connector.links],
        "No link: no agent sends packets.",
    )
