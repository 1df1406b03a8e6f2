"""A mesh drawn: agents, relays, connectors, services and backends in columns, with the paths between them.

Pure: a Mesh in, SVG elements out. A column that is too long shows who is in trouble first and sums the rest up in one
box, so that 200 services are as readable as three. State is told by shape and by colour, and every box has a title.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ztna.pages.markup import Element, el
from ztna.pages.mesh import HEALTHS, Edge, Mesh, Node, Service, best, tally
from ztna.pages.words import milliseconds, plural, ports

ROWS_MAX = 12
"""Boxes of one column."""
LABELS_MAX = 6
"""Paths that have their words beside them; the table has them all."""
BOX_WIDTH, BOX_HEIGHT = 180, 46
GAP_X, GAP_Y = 62, 16
MARGIN, HEAD = 4, 34
LANE = 22
"""How far below the relays the first direct path goes by, and the next below it."""
NAME_CHARACTERS, DETAIL_CHARACTERS = 17, 23

COLUMNS = (
    ("agent", "Agents"),
    ("relay", "Relays"),
    ("connector", "Connectors"),
    ("service", "Services"),
    ("backend", "Backends"),
)
WAYS = (
    ("direct quic", "direct, punched UDP"),
    ("direct tls", "direct, TLS"),
    ("forwarded quic", "through a relay, UDP"),
    ("forwarded tls", "through a relay, TLS"),
    ("control", "control connection"),
)
"""How each kind of line is called."""


class Box(NamedTuple):
    """One box of a column: a node, a service, or the rest of them."""

    id: str
    name: str
    detail: str
    health: str
    title: str


class Place(NamedTuple):
    """Where a box is: its left edge and its middle."""

    x: int
    y: int


def picture(mesh: Mesh) -> Element:
    """Return the drawing with its legend."""
    columns = [(title, _shortened(kind, boxes)) for kind, title in COLUMNS if (boxes := _boxes(mesh, kind))]
    if not columns:
        return el("p", "Nothing to draw yet: no agent, connector or service is known here.", class_="none")
    tallest = max(len(boxes) for _, (boxes, _) in columns)
    places, stands_for = _places([shown for _, shown in columns], tallest)
    drawn = _Drawing(mesh, places, stands_for)
    lines = drawn.lines()
    width = 2 * MARGIN + len(columns) * BOX_WIDTH + (len(columns) - 1) * GAP_X
    height = max(HEAD + tallest * (BOX_HEIGHT + GAP_Y), drawn.lowest + GAP_Y) + MARGIN
    heads = [
        el("text", title, x=MARGIN + at * (BOX_WIDTH + GAP_X), y=16, class_="column")
        for at, (title, _) in enumerate(columns)
    ]
    drawn_boxes = [_drawn(box, places[box.id]) for _, (shown, _) in columns for box in shown]
    svg = el(
        "svg", *heads, *lines, *drawn_boxes, *drawn.labels,
        class_=f"columns-{len(columns)}" + (" crowded" if len(mesh.paths) > LABELS_MAX else ""),
        viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=summary(mesh),
    )  # fmt: skip
    scroll = el("div", svg, class_="drawing", tabindex="0", role="region", aria_label="The mesh as a picture")
    return el("div", scroll, _legend({way(edge) for edge in mesh.edges}), class_="picture")


def summary(mesh: Mesh) -> str:
    """Return the picture in words."""
    told = [
        plural(len(mesh.of(kind)), kind)
        for kind in ("agent", "relay", "connector", "backend")
        if mesh.of(kind)
    ]
    counts = ", ".join(
        f"{count} {health}" for health, count in tally(each.health for each in mesh.services).items()
    )
    told.append(plural(len(mesh.services), "service") + (f" ({counts})" if counts else ""))
    told.append(plural(len(mesh.paths), "path"))
    return ", ".join(told)


def way(edge: Edge) -> str:
    """Return which kind of line an edge is, as `WAYS` has them."""
    if edge.way not in ("direct", "forwarded"):
        return "control" if edge.way is None else "unseen"
    return f"{edge.way} {'quic' if edge.carrier == 'quic' else 'tls'}"


def way_told(edge: Edge) -> str:
    """Return the way of a path in words."""
    return dict(WAYS).get(way(edge)) or ("being dialled" if edge.way == "dialling" else "not seen from here")


def by_trouble(healths: Mapping[str, str]) -> list[str]:
    """Return the names of what has these healths, worst first."""

    def rank(name: str) -> tuple[int, str]:
        order = ("critical", "warning", "unknown", "passing")
        health = healths[name]
        return (order.index(health) if health in order else 0, name)

    return sorted(healths, key=rank)


# --- boxes


def _boxes(mesh: Mesh, kind: str) -> list[Box]:
    if kind == "service":
        return [_service_box(service) for service in mesh.services]
    nodes = [node for node in mesh.nodes if node.kind == kind]
    if kind == "backend":
        # Beside the service that it is behind, so that lines do not cross.
        order = {id_: at for at, service in enumerate(mesh.services) for id_ in service.backends}
        nodes.sort(key=lambda node: order.get(node.id, len(order)))
    return [_node_box(node) for node in nodes]


def _service_box(service: Service) -> Box:
    detail = (
        f"{service.address}:{service.ports[0].port}" if service.address and service.ports else service.health
    )
    if len(service.ports) > 1:
        detail = f"{service.address}, {len(service.ports)} ports"
    title = f"{service.name}: {service.health}" + (f", {service.why}" if service.why else "")
    title += f"; {service.address} {ports(service.ports)}" if service.address else ""
    return Box(f"service:{service.name}", service.name, detail, service.health, title)


def _node_box(node: Node) -> Box:
    name = node.name.removeprefix("spiffe://")
    detail = node.detail or node.health
    return Box(
        node.id, name, detail, node.health, f"{node.kind} {node.name}: {node.health}. {node.detail}".strip()
    )


def _shortened(kind: str, boxes: Sequence[Box]) -> tuple[list[Box], dict[str, str]]:
    """Return the boxes to draw, and by which box each of the rest is stood for."""
    if len(boxes) <= ROWS_MAX:
        return list(boxes), {}
    by_id = {box.id: box for box in boxes}
    order = by_trouble({box.id: box.health for box in boxes})
    shown, rest = order[: ROWS_MAX - 1], order[ROWS_MAX - 1 :]
    counts = tally(by_id[id_].health for id_ in rest)
    told = ", ".join(f"{count} {health}" for health, count in counts.items())
    more = Box(f"more {kind}", f"{len(rest)} more", told, best(counts), f"{len(rest)} more: {told}")
    return [*(by_id[id_] for id_ in shown), more], dict.fromkeys(rest, more.id)


def _places(
    columns: Sequence[tuple[Sequence[Box], Mapping[str, str]]], tallest: int
) -> tuple[dict[str, Place], dict[str, str]]:
    """Return where each box is, and what stands for those that are not drawn. Columns are centred."""
    places: dict[str, Place] = {}
    stands_for: dict[str, str] = {}
    for at, (boxes, rest) in enumerate(columns):
        x = MARGIN + at * (BOX_WIDTH + GAP_X)
        top = HEAD + (tallest - len(boxes)) * (BOX_HEIGHT + GAP_Y) // 2
        for row, box in enumerate(boxes):
            places[box.id] = Place(x, top + row * (BOX_HEIGHT + GAP_Y) + BOX_HEIGHT // 2)
        stands_for |= rest
    return places, stands_for


def _drawn(box: Box, at: Place) -> Element:
    top = at.y - BOX_HEIGHT // 2
    return el(
        "g",
        el("title", box.title),
        el("rect", x=at.x, y=top, width=BOX_WIDTH, height=BOX_HEIGHT, rx=9),
        _sign(box.health, at.x + 17, at.y),
        el("text", _fitted(box.name, NAME_CHARACTERS), x=at.x + 34, y=at.y - 4, class_="name"),
        el("text", _fitted(box.detail, DETAIL_CHARACTERS), x=at.x + 34, y=at.y + 12, class_="detail"),
        class_=f"box {box.health if box.health in HEALTHS else 'unknown'}",
    )


def _sign(health: str, x: int, y: int) -> Element:
    """Return the shape of a state: a disc, a triangle, a cross on a square, or a ring."""
    match health:
        case "passing":
            return el("circle", cx=x, cy=y, r=6, class_="sign")
        case "warning":
            return el("path", d=f"M{x} {y - 7}L{x + 7} {y + 6}L{x - 7} {y + 6}Z", class_="sign")
        case "critical":
            cross = f"M{x - 5} {y - 5}L{x + 5} {y + 5}M{x + 5} {y - 5}L{x - 5} {y + 5}"
            return el("path", d=cross, class_="sign stroke")
        case _:
            return el("circle", cx=x, cy=y, r=5, class_="sign ring")


def _fitted(text: str, characters: int) -> str:
    """Return what fits: of a long text its beginning and its end, which tells most names apart."""
    if len(text) <= characters:
        return text
    kept = characters - 1
    return f"{text[: kept - kept // 3]}\N{HORIZONTAL ELLIPSIS}{text[-(kept // 3) :]}"


# --- lines


class _Drawing:
    """The lines of one picture; `lowest` is how far down they reach."""

    def __init__(self, mesh: Mesh, places: Mapping[str, Place], stands_for: Mapping[str, str]) -> None:
        self._mesh = mesh
        self._places = places
        self._stands_for = stands_for
        self._below = max(
            (places[id_].y for id_ in places if id_.startswith(("relay:", "more relay"))), default=0
        )
        self._lanes = 0
        self.lowest = 0
        self.labels: list[Element] = []

    def lines(self) -> list[Element]:
        """Return all lines, those that matter most last, which is on top."""
        control = [edge for edge in self._mesh.edges if edge.way is None]
        lines = {self._line(edge.start, edge.end, "control"): None for edge in control}
        for service in self._mesh.services:
            # Which connector has which backend is only certain where there is one.
            id_ = f"service:{service.name}"
            for connector in service.connectors:
                lines[self._line(connector, id_, f"serves {service.health}")] = None
            for backend in service.backends:
                lines[self._line(id_, backend, "serves")] = None
        paths = self._mesh.paths
        for edge in paths:
            lines |= dict.fromkeys(self._path(edge, is_labelled=len(paths) <= LABELS_MAX))
        return [el("path", d=d, class_=f"line {look}") for d, look in lines if d]

    def _place(self, id_: str) -> Place | None:
        return self._places.get(self._stands_for.get(id_, id_))

    def _line(self, start: str, end: str, look: str) -> tuple[str, str]:
        """Return a curve from one box to another, whichever is further left; nothing when one is not drawn."""
        ends = [place for place in (self._place(start), self._place(end)) if place is not None]
        if len(ends) < 2 or ends[0].x == ends[1].x:
            return "", look
        left, right = sorted(ends)
        x, half = left.x + BOX_WIDTH, (right.x - left.x - BOX_WIDTH) // 2
        return f"M{x} {left.y}C{x + half} {left.y} {x + half} {right.y} {right.x} {right.y}", look

    def _path(self, edge: Edge, *, is_labelled: bool) -> Iterable[tuple[str, str]]:
        look = way(edge)
        if edge.way != "direct":
            relay = edge.via or ""
            return [self._line(edge.start, relay, look), self._line(relay, edge.end, look)]
        start, end = self._place(edge.start), self._place(edge.end)
        if start is None or end is None:
            return []
        lane = max(self._below + BOX_HEIGHT // 2, HEAD) + LANE * (self._lanes + 1)
        self._lanes = min(self._lanes + 1, LABELS_MAX)
        self.lowest = max(self.lowest, lane)
        if is_labelled:
            told = way_told(edge) + ("" if edge.rtt_ms is None else f", {milliseconds(edge.rtt_ms)}")
            middle = (start.x + BOX_WIDTH + end.x) // 2
            self.labels.append(el("text", told, x=middle, y=lane - 5, class_="label"))
        return [(_under(start, end, lane), look)]


def _under(start: Place, end: Place, lane: int) -> str:
    """Return the curve from an agent to a connector that passes under the relays."""
    left, right, bend = start.x + BOX_WIDTH, end.x, GAP_X // 2
    return (
        f"M{left} {start.y}C{left + bend} {start.y} {left + bend // 2} {lane} {left + GAP_X} {lane}"
        f"L{right - GAP_X} {lane}C{right - bend // 2} {lane} {right - bend} {end.y} {right} {end.y}"
    )


def _legend(ways: set[str]) -> Element:
    """Return what the lines and shapes mean, of those that are drawn."""
    lines = [
        el("li", _swatch(el("path", d="M1 8L33 8", class_=f"line {name}"), 34), told)
        for name, told in WAYS
        if name in ways
    ]
    shapes = [el("li", _swatch(_sign(health, 8, 8), 16, health), health) for health in HEALTHS]
    return el("ul", *lines, *shapes, class_="legend")


def _swatch(drawn: Element, width: int, look: str = "") -> Element:
    group = el("g", drawn, class_=f"box {look}")
    return el("svg", group, width=width, height=16, viewBox=f"0 0 {width} 16", aria_hidden="true")
