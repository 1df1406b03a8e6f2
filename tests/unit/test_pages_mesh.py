"""A mesh from statuses: one is enough, and of several the nearest to the thing is believed."""

from __future__ import annotations

from typing import Any

from tests.support import statuses
from ztna.pages import seen
from ztna.pages.mesh import Edge, Mesh, Service, best, mesh_of, tally


def of(*told: dict[str, Any]) -> Mesh:
    return mesh_of(map(seen.read, told))


def service(mesh: Mesh, name: str) -> Service:
    return next(each for each in mesh.services if each.name == name)


def ways(mesh: Mesh) -> list[tuple[str | None, str]]:
    return [(edge.way, edge.carrier) for edge in mesh.paths]


def health(mesh: Mesh, id_: str) -> str:
    return next(node.health for node in mesh.nodes if node.id == id_)


def test_a_relay_alone_shows_who_is_there_and_what_goes_on() -> None:
    mesh = of(statuses.relay())
    assert [node.id for node in mesh.nodes] == [f"agent:{statuses.AGENT}", "connector:alpha", "relay:north"]
    assert health(mesh, "connector:alpha") == "warning"
    assert service(mesh, "db").health == "critical" and service(mesh, "web").connectors == (
        "connector:alpha",
    )
    assert ways(mesh) == [("forwarded", "quic"), ("forwarded", "tls")]
    assert {(edge.start, edge.carrier) for edge in mesh.edges if edge.way is None} == {
        (f"agent:{statuses.AGENT}", "quic"),
        ("connector:alpha", "tls"),
    }


def test_a_relay_knows_of_direct_paths_only_that_they_are() -> None:
    told = statuses.relay()
    told["sessions"] = [told["sessions"][0] | {"path": "direct", "link_bytes": 0}]
    assert ways(of(told)) == [("direct", "quic")]
    told["sessions"][0]["path"] = "unseen"
    assert ways(of(told)) == [("unseen", "tls")]


def test_a_connector_alone_shows_its_backends_and_believes_its_checks() -> None:
    told = statuses.connector()
    told["connector"]["services"]["web"]["backends"][0]["ejected"] = True
    mesh = of(told)
    assert service(mesh, "db") == Service(
        name="db", address="10.100.0.2", ports=(seen.Port("tcp", 8080),), health="critical", why="it is critical",
        connectors=("connector:alpha",), backends=("backend:127.0.0.1:5432",),
    )  # fmt: skip
    assert health(mesh, "backend:127.0.0.1:8080") == "warning" and health(mesh, "relay:south") == "critical"
    assert ways(mesh) == [("direct", "quic")] and not [e for e in mesh.edges if e.end == "relay:south"]


def test_a_route_without_a_lease_or_checks_is_shown_too() -> None:
    told = statuses.connector(links=[])
    told["connector"]["services"]["web"] |= {"lease": None}
    told["connector"]["services"]["web"]["backends"][0]["checks"] = []
    mesh = of(told)
    assert service(mesh, "web").address is None
    # What neither end tells of a session's path stays unseen.
    assert [(edge.way, edge.via, edge.services) for edge in mesh.paths] == [
        ("unseen", "relay:north", ("web",))
    ]


def test_an_agent_alone_shows_its_paths_with_their_round_trips() -> None:
    mesh = of(statuses.agent())
    assert [(edge.way, edge.carrier, edge.rtt_ms) for edge in mesh.paths] == [
        ("direct", "quic", 12.0),
        ("forwarded", "tcp", None),
    ]
    assert service(mesh, "db").why == "no_grant" and service(mesh, "db").health == "unknown"
    assert health(mesh, "relay:south") == "critical" and health(mesh, "connector:alpha") == "passing"
    control = [edge for edge in mesh.edges if edge.way is None]
    assert control == [Edge(start=f"agent:{statuses.AGENT}", end="relay:north", carrier="quic", rtt_ms=2.25)]


def test_where_tcp_has_a_carrier_of_its_own_each_way_has_the_services_that_go_there() -> None:
    told = statuses.agent()
    told["agent"]["services"].append({"service": "dns", "ports": [{"protocol": "udp", "port": 53}]})
    told["agent"]["sessions"].append({"service": "dns", "connector": "alpha", "relay": "north"})
    assert [(edge.carrier, edge.services) for edge in of(told).paths] == [
        ("quic", ("dns",)),
        ("tcp", ("web",)),
    ]
    # Without a carrier of its own TCP rides the link; what has no port known may go either way.
    told["agent"]["streams"]["routes"] = {"alpha": "quic"}
    assert [edge.services for edge in of(told).paths] == [("dns", "web")]
    told["agent"]["services"], told["agent"]["streams"]["routes"] = [], {"alpha": "direct"}
    assert [edge.services for edge in of(told).paths] == [("dns", "web"), ("dns", "web")]


def test_an_agent_without_a_certificate_yet_has_a_name_all_the_same() -> None:
    assert of(statuses.agent() | {"certificate": None}).of("agent")[0].name == "this agent"


def test_a_link_that_is_being_dialled_is_a_path_already_and_is_shown_once() -> None:
    told = statuses.agent()
    link = told["agent"]["links"][0]
    told["agent"]["links"] = [
        link | {"path": "dialling", "rtt_ms": None},
        link | {"rtt_ms": None},
        link,
        link,
    ]
    told["agent"]["streams"]["routes"] = {}
    assert [(edge.way, edge.rtt_ms) for edge in of(told).paths] == [("dialling", None), ("direct", 12.0)]


def test_dnsd_alone_shows_what_consul_has() -> None:
    mesh = of(statuses.dnsd())
    assert [node.id for node in mesh.nodes] == ["connector:alpha"] and health(
        mesh, "connector:alpha"
    ) == "passing"
    assert service(mesh, "db").why == "db@alpha is critical in Consul"
    assert service(mesh, "web").address == "10.100.0.2" and service(mesh, "web").why is None


def test_names_that_cannot_be_served_say_why() -> None:
    told = statuses.dnsd()
    first, second = told["names"]["services"]
    told["names"]["services"] = [
        first | {"instances": []},
        second | {"problem": "instances disagree"},
        second | {"service": "foreign", "instances": [{"id": "f@n", "status": "warning", "connector": None}]},
    ]
    mesh = of(told)
    assert service(mesh, "db").why == "Consul has no instance of it"
    assert (service(mesh, "web").health, service(mesh, "web").why) == ("critical", "instances disagree")
    assert service(mesh, "foreign").health == "warning" and service(mesh, "foreign").connectors == ()


def test_together_they_are_one_mesh_and_the_connector_is_believed_about_health() -> None:
    told = statuses.dnsd()
    told["names"]["services"][0]["instances"][0]["status"] = "passing"
    mesh = of(statuses.relay(), told, statuses.connector(), statuses.agent(), {"daemon": "ztna-other"})
    assert {kind: len(mesh.of(kind)) for kind in ("agent", "relay", "connector", "backend")} == {  # type: ignore[arg-type]
        "agent": 1, "relay": 2, "connector": 1, "backend": 2,
    }  # fmt: skip
    assert service(mesh, "db").health == "critical"
    # A daemon is believed about itself, whatever others made of it, and keeps what they knew of its address.
    assert health(mesh, "connector:alpha") == "passing"
    assert next(node.detail for node in mesh.nodes if node.id == "connector:alpha") == "127.0.0.1:8"
    (agents,) = {edge.rtt_ms for edge in mesh.edges if edge.way is None and edge.start.startswith("agent")}
    assert agents == 2.25


def test_a_daemon_that_is_not_ready_is_not_passing() -> None:
    told = statuses.relay(readiness={"ready": False, "awaiting": {"names": ""}, "warnings": {}})
    assert health(of(told), "relay:north") == "warning"


def test_the_order_of_statuses_loses_no_round_trip() -> None:
    first = of(statuses.agent(), statuses.relay())
    assert [edge.rtt_ms for edge in first.edges if edge.way is None and edge.start.startswith("agent")] == [
        2.25
    ]


def test_health_is_that_of_the_best_instance() -> None:
    assert best(["critical", "passing"]) == "passing" and best(["strange", "unknown"]) == "unknown"
    assert tally(["critical", "passing", "critical", "odd"]) == {"passing": 1, "critical": 2, "odd": 1}
