"""A dnsd's page: names, addresses and their health, as Consul has them. Pure."""

from __future__ import annotations

from ztna.pages import words
from ztna.pages.markup import Element, el
from ztna.pages.mesh import Mesh, mesh_of
from ztna.pages.parts import (
    Cell,
    View,
    facts,
    head,
    passing,
    problem,
    refusals,
    section,
    table,
    tile,
    worst_first,
)
from ztna.pages.picture import picture
from ztna.pages.seen import Dnsd
from ztna.pages.words import NONE, age, mark, number


def view(seen: Dnsd, earlier: Dnsd | None = None) -> View:
    """Return the page; with an `earlier` status, the rate of queries is of the time since."""
    mesh = mesh_of([seen])
    dns, pool = seen.dns, seen.pool
    queries = _per_second(seen, earlier)
    tiles = [
        tile("services", f"{passing(mesh.services)} of {dns.services}", "passing"),
        tile("addresses", number(pool.leased or dns.leases), f"leased, {number(pool.free)} free"),
        tile("queries", words.rate(queries), "over UDP"),
        tile(
            "keeper",
            "yes" if seen.keeper.elected else "no",
            "keeps the leases" if seen.keeper.elected else "another does",
        ),
    ]
    problems = [f"{name}: {what}" for name, what in seen.keeper.problems.items()]
    problems += [f"{key} cannot be read: {why}" for key, why in dns.unreadable.items()]
    problems += [seen.keeper.trouble] if seen.keeper.trouble else []
    return View(
        "dnsd",
        {
            "head": head(
                seen,
                f"dnsd, {dns.zone}",
                tiles,
                f"zone serial {dns.serial}",
                "names are stale" if dns.stale else "",
            ),
            "picture": section("picture", "The mesh, as Consul has it", picture(mesh)),
            "services": section("services", "Services", *(problem("; ".join(problems))), _names(seen, mesh)),
            "leases": section("leases", "Leases", *_pool(seen), _leases(seen)),
            "queries": section("queries", "Queries", facts(_queries(seen, queries))),
        }
        | refusals(seen),
    )


def _pool(seen: Dnsd) -> list[Element]:
    pool = seen.pool
    if not pool.size:
        return [el("p", "Another dnsd is the keeper: it knows how full the pool is.", class_="none")]
    counts = {"leased": pool.leased, "resting": pool.resting, "free": pool.free}
    told = ", ".join(f"{number(count)} {what}" for what, count in counts.items()) + f" of {number(pool.size)}"
    used = pool.leased + pool.resting
    meter = el(
        "meter", told, min=0, max=pool.size, low=pool.size * 8 // 10, high=pool.size * 9 // 10, optimum=0, value=used,
        aria_label="Addresses in use",
    )  # fmt: skip
    return [el("p", meter, el("span", told), class_="meter")]


def _queries(seen: Dnsd, queries: float | None) -> dict[str, Cell]:
    dns = seen.dns
    return {
        "UDP queries": f"{words.rate(queries)}, {number(dns.udp_received)} since the start",
        "Dropped": number(dns.udp_dropped),
        "TCP connections": number(dns.tcp_connections),
        "Worker processes": number(len(dns.workers)),
    }


def _per_second(seen: Dnsd, earlier: Dnsd | None) -> float | None:
    """Return the UDP queries a second, since the start when nothing earlier is known of this very process."""
    if earlier is None or earlier.pid != seen.pid or earlier.uptime_s >= seen.uptime_s:
        return seen.dns.udp_received / seen.uptime_s if seen.uptime_s else None
    received = seen.dns.udp_received - earlier.dns.udp_received
    return max(received, 0) / (seen.uptime_s - earlier.uptime_s)


def _names(seen: Dnsd, mesh: Mesh) -> Element:
    names = {each.service: each for each in seen.names.services}
    health = {service.name: service.health for service in mesh.services}
    return table(
        "Services",
        ("Name", "Address", "Ports", "Health", "Instances"),
        [
            (
                f"{each.service}.{seen.dns.zone}",
                el("code", each.ip) if each.ip else mark("warning", "no address yet"),
                words.ports(each.ports),
                mark(health[each.service]),
                each.problem
                or ", ".join(f"{at.connector or at.id}: {at.status}" for at in each.instances)
                or NONE,
            )
            for each in (names[name] for name in worst_first(names, health))
        ],
        "No service: Consul's catalog has none with the tag ztna.",
        seen.names.services_total,
    )


def _leases(seen: Dnsd) -> Element:
    return table(
        "Leases",
        ("Address", "Service", "State", "Since"),
        [
            (
                el("code", each.ip),
                each.service,
                el(
                    "span",
                    mark(each.state, "rests" if each.state == "quarantined" else None),
                    " pinned" if each.pinned else "",
                ),
                age(each.since_s),
            )
            for each in seen.leases.holdings
        ],
        "No address was ever leased." if seen.keeper.elected else "The keeper has the list.",
        seen.leases.total,
        figures=("Since",),
    )
