"""What the pages of all daemons are made of: a header with figures, sections, tables.

Pure: values in, elements out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ztna.pages import words
from ztna.pages.markup import Element, el
from ztna.pages.mesh import Service
from ztna.pages.picture import by_trouble
from ztna.pages.seen import Certificate, Counted, Daemon
from ztna.pages.words import age, mark, number, plural

ROWS_MAX = 50
"""Of one table; /status has more."""
PEER_CERTIFICATE_SOON_DAYS = 1.0

Cell = Element | str


class View(NamedTuple):
    """A page: its title, and its sections by id, in their order; an event carries those that changed."""

    title: str
    sections: Mapping[str, Element]


def head(seen: Daemon, name: str, tiles: Sequence[Element], *more: str) -> Element:
    """Return the header of a daemon's page: whether it is ready, what it waits for, its figures."""
    readiness = seen.readiness
    if readiness.ready:
        told = f"Ready, {plural(len(readiness.warnings), 'warning')}" if readiness.warnings else "Ready"
        state = mark("warning" if readiness.warnings else "ready", told)
    else:
        state = mark("not ready", "Not ready")
    notes = [
        f"Waits for {what}: {why}" if why else f"Waits for {what}" for what, why in readiness.awaiting.items()
    ]
    notes += [f"Warning, {what}: {why}" for what, why in readiness.warnings.items()]
    notes += [f"Only /status has the rest: {seen.unreadable}"] if seen.unreadable else []
    facts = [f"version {seen.version}", f"up {age(seen.uptime_s)}", f"pid {seen.pid}", *filter(None, more)]
    return header(name, seen.daemon, state, notes, facts, tiles)


def waits(seen: Daemon) -> str:
    """Return what a daemon waits for, in words."""
    return "waits for " + ", ".join(seen.readiness.awaiting) if seen.readiness.awaiting else "not ready"


def header(
    name: str, over: str, state: Element, notes: Sequence[str], facts: Sequence[str], tiles: Sequence[Element]
) -> Element:
    """Return the header of a page; `over` stands above the name."""
    shown = [el("ul", *(el("li", note) for note in notes), class_="notes")] if notes else []
    return el(
        "header",
        *([el("p", over, class_="over")] if over else []),
        el("div", el("h1", name), el("div", state, class_="state", role="status"), class_="headline"),
        el("p", " \N{MIDDLE DOT} ".join(facts), class_="facts"),
        *shown,
        *([el("dl", *tiles, class_="tiles")] if tiles else []),
        id="head",
    )


def tile(name: str, value: str, note: str) -> Element:
    """Return one figure of the header."""
    return el("div", el("dt", name), el("dd", el("strong", value), el("span", note)))


def section(id_: str, title: str, *body: Element) -> Element:
    """Return a section with its heading."""
    return el("section", el("h2", title, id=f"{id_}-title"), *body, id=id_, aria_labelledby=f"{id_}-title")


def ending(seen: Daemon) -> dict[str, Element]:
    """Return the sections on what was refused and on the daemon's certificate."""
    return refusals(seen) | {
        "certificate": section("certificate", "Certificate", _certificate(seen.certificate))
    }


def refusals(seen: Daemon) -> dict[str, Element]:
    """Return the section on what was refused."""
    return {"refused": section("refused", "Refused and dropped", _counted(seen.counted))}


def _certificate(own: Certificate | None) -> Element:
    if own is None:
        return el("p", "There is none yet.", class_="none")
    left = words.days(own.days_left)
    told: dict[str, Cell] = {
        "Name": el("code", own.name),
        "Good for": mark(
            "warning" if own.expiring else "passing",
            f"{left}, until {own.not_after[:16].replace('T', ' ')} UTC",
        ),
    }
    told |= {f"Not usable: {what}": mark("critical", why) for what, why in own.broken.items()}
    told |= {"Revocation lists": plural(len(own.crls), "list")} if own.crls else {}
    return facts(told)


def _counted(counted: Counted) -> Element:
    rows = [(where, "refused", count) for where, count in counted.refused.items()]
    rows += [(where, "dropped", count) for where, count in counted.dropped.items()]
    return table(
        "Refused and dropped",
        ("Where and why", "What", "Times"),
        [
            (where, what, number(count))
            for where, what, count in sorted(rows, key=lambda row: (-row[2], row[0]))
        ],
        "Nothing was refused or dropped since the start.",
        figures=("Times",),
    )


def facts(told: Mapping[str, Cell]) -> Element:
    """Return a list of what is what."""
    return el(
        "dl", *(el("div", el("dt", what), el("dd", value)) for what, value in told.items()), class_="pairs"
    )


def problem(told: str) -> list[Element]:
    """Return a line on what is wrong, if anything is."""
    return [el("p", mark("critical", told), class_="problem")] if told else []


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    empty: str,
    total: int = 0,
    *,
    figures: Collection[str] = (),
) -> Element:
    """Return a table of at most ROWS_MAX rows; the roles keep it one where narrow screens set rows as blocks."""
    if not rows:
        return el("p", empty, class_="none")
    looks = {head: "figure" if head in figures else None for head in heads}
    top = [el("th", head, scope="col", role="columnheader", class_=looks[head]) for head in heads]
    body = [
        el(
            "tr",
            *(
                el("td", cell, role="cell", data_label=head, class_=looks[head])
                for cell, head in zip(row, heads, strict=True)
            ),
            role="row",
        )
        for row in rows[:ROWS_MAX]
    ]
    made = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", *top, role="row"), role="rowgroup"),
        el("tbody", *body, role="rowgroup"),
        role="table",
    )
    hidden = max(total, len(rows)) - len(body)
    more = [el("p", f"and {number(hidden)} more; /status has them", class_="note")] if hidden else []
    return el("div", made, *more, class_="table")


def peer_name(peer: str) -> str:
    """Return the name of a peer without what all of them begin with."""
    return peer.removeprefix("spiffe://")


def days(left: float) -> Cell:
    """Return how long a certificate is good for, marked when it soon is not."""
    told = words.days(left)
    return told if left > PEER_CERTIFICATE_SOON_DAYS else mark("critical" if left <= 0 else "warning", told)


def since(seconds: float | None) -> str:
    """Return how long ago something was, which may be never."""
    return "never" if seconds is None else age(seconds)


def passing(services: Iterable[Service]) -> int:
    """Return how many services pass."""
    return sum(service.health == "passing" for service in services)


def worst_first(found: Collection[str], healths: Mapping[str, str]) -> list[str]:
    """Return the rows to show in the order of their names, or those in trouble first when there are more."""
    return by_trouble(healths)[:ROWS_MAX] if len(found) > ROWS_MAX else sorted(found)
