"""A relay's page: who is connected, which sessions it joins, and what DNS lets it route. Pure."""

from __future__ import annotations

from ztna.pages.markup import Element, el
from ztna.pages.mesh import mesh_of
from ztna.pages.parts import (
    ROWS_MAX,
    View,
    days,
    ending,
    facts,
    head,
    peer_name,
    problem,
    section,
    since,
    table,
    tile,
)
from ztna.pages.picture import picture
from ztna.pages.seen import Relay
from ztna.pages.words import NONE, age, mark, number, plural, size


def view(seen: Relay) -> View:
    """Return the page."""
    agents = sum(peer.connector_id is None for peer in seen.connections)
    tiles = [
        tile("agents", number(agents), "connected"),
        tile("connectors", number(len(seen.connections) - agents), "connected"),
        tile("sessions", number(len(seen.sessions)), "open or opening"),
        tile(
            "DNS confirmed", since(seen.srv.fresh_age_s), "ago" if seen.srv.fresh_age_s is not None else "yet"
        ),
    ]
    return View(
        f"Relay {seen.relay.name}",
        {
            "head": head(seen, f"Relay {seen.relay.name}", tiles, f"listens at {seen.relay.address}"),
            "picture": section("picture", "What this relay joins", picture(mesh_of([seen]))),
            "sessions": section("sessions", "Sessions", _sessions(seen)),
            "connections": section("connections", "Connections", _connections(seen)),
            "srv": section("srv", "Services by DNS", *problem(seen.srv.failing), _srv(seen)),
            "forwarder": section("forwarder", "Forwarder", _forwarder(seen)),
        }
        | ending(seen),
    )


_PATHS = {
    "direct": "direct",
    "forwarded": "through this relay",
    "unseen": "not seen here",
    "v1": "opened here (v1)",
}


def _sessions(seen: Relay) -> Element:
    return table(
        "Sessions",
        ("Service", "Agent", "Connector", "Path", "Through here", "Age"),
        [
            (
                each.service,
                peer_name(each.agent),
                each.connector_id,
                _PATHS.get(each.path, each.path) if each.open else mark("warning", "opening"),
                size(each.bytes + each.link_bytes) if each.bytes + each.link_bytes else NONE,
                age(each.age_s),
            )
            for each in seen.sessions[:ROWS_MAX]
        ],
        "No session: no agent uses a service through this relay.",
        len(seen.sessions),
        figures=("Through here", "Age"),
    )


def _connections(seen: Relay) -> Element:
    return table(
        "Connections",
        ("Peer", "Role", "Address", "By", "Release", "Sessions", "Certificate", "State"),
        [
            (
                peer_name(each.peer),
                "agent" if each.connector_id is None else f"connector {each.connector_id}",
                el("code", each.address),
                each.transport.upper(),
                each.version or NONE,
                number(each.sessions),
                days(each.certificate_days),
                mark("warning", "silent") if each.silent else mark("up"),
            )
            for each in seen.connections[:ROWS_MAX]
        ],
        "Nobody is connected.",
        len(seen.connections),
        figures=("Sessions", "Certificate"),
    )


def _srv(seen: Relay) -> Element:
    return table(
        "Services by DNS",
        ("Service", "Connectors that may serve it", "Confirmed"),
        [
            (
                name,
                ", ".join(f"{target.id} (weight {target.weight})" for target in each.connectors)
                or mark("critical", "none: no instance passes"),
                age(each.age_s),
            )
            for name, each in sorted(seen.srv.services.items())[:ROWS_MAX]
        ],
        "No connector has registered a service here.",
        len(seen.srv.services),
        figures=("Confirmed",),
    )


def _forwarder(seen: Relay) -> Element:
    udp, tcp = seen.forwarder.udp, seen.forwarder.tcp
    return facts(
        {
            "UDP is copied by": "the kernel" if udp.forwarding.in_use == "kernel" else "this process",
            "UDP links": f"{number(len(udp.links))}, {number(udp.forwarding.in_kernel)} in the kernel",
            "Packets through this process": f"{number(udp.received)} in, {number(udp.sent)} out",
            "TCP streams": f"{plural(tcp.pairs, 'pair')} now, {number(tcp.joined)} so far",
            "TCP bytes": size(tcp.bytes),
        }
    )
