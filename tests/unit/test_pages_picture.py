"""The drawing: three services are readable, two hundred are sane, and every name is text."""

from __future__ import annotations

import re

import pytest

from tests.support import statuses
from ztna.pages import picture as drawing
from ztna.pages.markup import html
from ztna.pages.mesh import Edge, Mesh, Node, Service, mesh_of
from ztna.pages.picture import by_trouble, picture, summary, way_told
from ztna.pages.seen import Port

EVIL = "<img src=x onerror=alert(1)>"


def many(count: int) -> Mesh:
    names = [f"service-{number:03}" for number in range(count)]
    services = tuple(
        Service(
            name=name,
            health="critical" if number in (150, 151) else "passing",
            connectors=("connector:alpha",),
            backends=(f"backend:10.0.0.{number}:80",),
        )
        for number, name in enumerate(names)
    )
    backends = [
        Node(id=f"backend:10.0.0.{n}:80", kind="backend", name=f"10.0.0.{n}:80") for n in range(count)
    ]
    nodes = (Node(id="connector:alpha", kind="connector", name="alpha", health="passing"), *backends)
    return Mesh(nodes, (), services)


def test_the_whole_small_mesh_is_drawn() -> None:
    text = html(picture(mesh_of(statuses.all_of_them())))
    for column in ("Agents", "Relays", "Connectors", "Services", "Backends"):
        assert f">{column}</text>" in text
    for shown in (
        "ztna/agent",
        "north",
        "alpha",
        "10.100.0.2:8080",
        "127.0.0.1:5432",
        "direct, punched UDP, 12 ms",
    ):
        assert shown in text
    assert 'role="img"' in text and "1 agent, 2 relays, 1 connector, 2 backends" in text
    assert text.count('class="line direct quic"') == 2  # the path and its legend
    assert text.count('class="line forwarded tls"') == 3  # both halves and their legend


def test_two_hundred_services_show_those_in_trouble_and_sum_the_rest_up() -> None:
    text = html(picture(many(200)))
    assert text.count('<g class="box') == 1 + 2 * drawing.ROWS_MAX + 4  # and four shapes of the legend
    assert "service-150" in text and "service-151" in text and "189 more" in text
    assert "189 more: 189 passing" in text and "service-100" not in text
    # All lines to those that are not drawn are one line to the box that stands for them.
    assert text.count('class="line serves passing"') == drawing.ROWS_MAX - 2
    height = int(re.findall(r'viewBox="0 0 \d+ (\d+)"', text)[0])
    assert height < 900


def test_nothing_is_said_to_be_nothing() -> None:
    assert "Nothing to draw yet" in html(picture(Mesh()))


def test_names_are_text_and_long_ones_are_fitted() -> None:
    nodes = (
        Node(id="agent:a", kind="agent", name=EVIL),
        Node(id="relay:r", kind="relay", name="n" * 60, health="warning"),
    )
    text = html(picture(Mesh(nodes, (), (Service(name=EVIL, health="odd", why=EVIL),))))
    assert "<img" not in text and f"relay {'n' * 60}: warning" in text and "nnn…nnn" in text
    assert 'class="box unknown"' in text


def test_every_health_has_a_shape_of_its_own() -> None:
    signs = {html(drawing._sign(each, 8, 8)) for each in ("passing", "warning", "critical", "unknown")}
    assert len({re.sub(r"[ ]class.*", "", sign) for sign in signs}) == 4


def test_a_service_says_its_address_and_its_ports() -> None:
    two = (Port("tcp", 80), Port("udp", 53))
    services = (
        Service(name="a", address="10.0.0.1", ports=two[:1]),
        Service(name="b", address="10.0.0.2", ports=two),
        Service(name="c", address="10.0.0.3"),
    )
    text = html(picture(Mesh((), (), services)))
    assert "10.0.0.1:80" in text and "10.0.0.2, 2 ports" in text and "10.0.0.2 tcp 80, udp 53" in text
    assert "c: unknown; 10.0.0.3" in text


def test_a_path_to_a_node_that_is_not_known_is_left_out() -> None:
    nodes = (Node(id="agent:a", kind="agent", name="a"),)
    edges = (
        Edge(start="agent:a", end="connector:gone", way="direct", carrier="quic"),
        Edge(start="agent:a", end="agent:a"),
        Edge(start="agent:a", end="connector:gone", way="forwarded", carrier="tls"),
    )
    assert "<path d=" not in html(picture(Mesh(nodes, edges))).partition("<ul")[0]


def test_many_direct_paths_have_lanes_but_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LABELS_MAX", 1)
    nodes = tuple(
        Node(id=f"{kind}:{n}", kind=kind, name=str(n))  # type: ignore[arg-type]
        for kind in ("agent", "connector")
        for n in range(2)
    )
    edges = tuple(
        Edge(start=f"agent:{n}", end=f"connector:{n}", way="direct", carrier="quic", rtt_ms=1.0)
        for n in range(2)
    )
    text = html(picture(Mesh(nodes, edges)))
    assert 'class="label"' not in text and text.count("line direct quic") == 3


def test_a_way_is_told_in_words() -> None:
    def told(way: str, carrier: str = "") -> str:
        return way_told(Edge(start="a", end="b", way=way, carrier=carrier))  # type: ignore[arg-type]

    assert (
        told("direct", "quic") == "direct, punched UDP" and told("forwarded", "tcp") == "through a relay, TLS"
    )
    assert told("dialling") == "being dialled" and told("unseen") == "not seen from here"


def test_a_summary_without_services_has_no_counts() -> None:
    assert summary(Mesh()) == "0 services, 0 paths"


def test_trouble_comes_first() -> None:
    healths = {"a": "passing", "b": "critical", "c": "odd", "d": "unknown", "e": "warning"}
    assert by_trouble(healths) == ["b", "c", "e", "d", "a"]
