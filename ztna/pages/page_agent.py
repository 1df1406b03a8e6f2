"""An agent's page: what it reaches, at which address, and by which path. Pure."""

from __future__ import annotations

from ztna.pages import words
from ztna.pages.markup import Element, el
from ztna.pages.mesh import mesh_of
from ztna.pages.parts import (
    View,
    ending,
    facts,
    head,
    passing,
    peer_name,
    section,
    table,
    tile,
    worst_first,
)
from ztna.pages.picture import picture
from ztna.pages.seen import Agent
from ztna.pages.words import NONE, mark, number, plural, size


def view(seen: Agent) -> View:
    """Return the page."""
    own = seen.agent
    mesh = mesh_of([seen])
    nearest = next((relay for relay in own.relays if relay.preferred), None)
    tiles = [
        tile("services", f"{passing(mesh.services)} of {len(mesh.services)}", "passing"),
        tile("sessions", number(len(own.sessions)), "open"),
        tile(
            "flows",
            number(own.streams.flows + own.udp_flows),
            f"{number(own.streams.flows)} TCP, {number(own.udp_flows)} UDP",
        ),
        tile(
            "relay",
            words.milliseconds(nearest.rtt_ms if nearest else None),
            nearest.relay if nearest else "none is up",
        ),
    ]
    held = facts({f"Not listened at {at}": why for at, why in own.held_ports.items()})
    carriers = ", ".join(f"to {connector} {way}" for connector, way in own.streams.routes.items())
    told = f"{plural(own.streams.carriers, 'stream carrier')}{': ' + carriers if carriers else ''}"
    title = f"Agent {peer_name(seen.certificate.name)}" if seen.certificate else "Agent"
    return View(
        title,
        {
            "head": head(seen, title, tiles, f"mode {own.mode}", f"pool {own.pool}"),
            "picture": section("picture", "What this agent reaches", picture(mesh)),
            "services": section("services", "Services", _services(seen), held),
            "links": section("links", "Links: UDP and ICMP", _links(seen)),
            "flows": section("flows", "TCP flows", _running(seen), el("p", told, class_="note")),
            "relays": section("relays", "Relays", _relays(seen)),
        }
        | ending(seen),
    )


def _services(seen: Agent) -> Element:
    services = {each.service: each for each in seen.agent.services}
    order = worst_first(services, {name: each.health for name, each in services.items()})
    return table(
        "Services",
        ("Service", "Address", "Ports", "Health", "Session", "Connector"),
        [
            (
                each.service,
                el("code", each.ip),
                words.ports(each.ports),
                mark(each.health),
                mark("critical", f"{each.state}: {each.reason}") if each.reason else mark(each.state),
                each.connector or NONE,
            )
            for each in (services[name] for name in order)
        ],
        "No service has an address yet.",
        len(services),
    )


def _links(seen: Agent) -> Element:
    return table(
        "Links",
        ("Connector", "Path", "Relay", "Carrier", "Round trip", "Sent", "Received", "Direct paths tried"),
        [
            (
                each.connector,
                mark("open", each.path) if each.path == "direct" else each.path,
                each.relay,
                each.carrier.upper(),
                words.milliseconds(each.rtt_ms),
                size(each.sent_bytes),
                size(each.received_bytes),
                ", ".join(f"{tried.address} {tried.state}" for tried in each.candidates) or NONE,
            )
            for each in seen.agent.links
        ],
        "No link: no UDP or ICMP flow runs.",
        figures=("Round trip", "Sent", "Received"),
    )


def _running(seen: Agent) -> Element:
    return table(
        "TCP flows",
        ("Service", "Flows", "Sent", "Received"),
        [
            (name, number(each.flows), size(each.sent_bytes), size(each.received_bytes))
            for name, each in sorted(seen.agent.streams.running.items())
        ],
        "No TCP flow runs.",
        figures=("Flows", "Sent", "Received"),
    )


def _relays(seen: Agent) -> Element:
    return table(
        "Relays",
        ("Relay", "State", "By", "Release", "Round trip"),
        [
            (
                el("span", each.relay, " (nearest)" if each.preferred else ""),
                mark("up") if each.state == "up" else mark("down", each.problem or each.state),
                (each.transport or NONE).upper(),
                each.version or NONE,
                words.milliseconds(each.rtt_ms),
            )
            for each in seen.agent.relays
        ],
        "No relay.",
        figures=("Round trip",),
    )
