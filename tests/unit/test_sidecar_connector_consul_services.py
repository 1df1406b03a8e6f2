"""Services that others registered, as routes."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.connector.consul_services import ORIGIN, local_definitions
from sidecar.connector.routes import BACKENDS_PER_ROUTE_MAX, RouteTable
from sidecar.connector.sources import Definition
from ztna.catalog import AgentService, Status
from ztna.names import ConnectorId, ServiceName

WEB = ServiceName("web")


def instance(instance_id: str = "_nomad-task-1-web", service: str = "web", **more: Any) -> AgentService:
    fields: dict[str, Any] = {"address": "10.0.0.7", "port": 23456, "tags": ("ztna", "blue")}
    return AgentService(service=service, instance_id=instance_id, **fields | more)


def found(*instances: AgentService, **health: Status) -> dict[str, Definition]:
    known = {each.instance_id: each for each in instances}
    made = local_definitions(
        known, health, "192.0.2.1", lambda service: service in ("web", "db"), ConnectorId("rack-7--a")
    )
    return {each.service: each for each in made}


def backends(definition: Definition) -> list[list[tuple[str, int]]]:
    return [[(str(each.address), each.weight) for each in route.backends] for route in definition.routes]


def test_a_tagged_service_is_fronted_at_the_port_it_publishes() -> None:
    web = found(instance(meta={"ztna-ports": "tcp:80"}))["web"]
    assert (web.service, web.origin, web.problem) == (WEB, ORIGIN, None)
    assert [(route.port, route.protocol) for route in web.routes] == [(80, "tcp")]
    assert backends(web) == [[("10.0.0.7:23456", 1)]]


def test_several_ports_are_each_at_their_own_and_an_address_that_lacks_is_the_agents() -> None:
    web = found(instance(tags=("ztna", "ztna-udp:53", "ztna-tcp:8080"), address=""))["web"]
    assert [(route.protocol, route.port) for route in web.routes] == [("tcp", 8080), ("udp", 53)]
    assert backends(web) == [[("192.0.2.1:8080", 1)], [("192.0.2.1:53", 1)]]


def test_an_instance_without_a_port_of_its_own_is_where_it_publishes() -> None:
    assert backends(found(instance(port=0, meta={"ztna-ports": "tcp:80"}))["web"]) == [[("10.0.0.7:80", 1)]]


def test_every_instance_that_is_not_critical_is_a_backend() -> None:
    instances = [instance(f"web-{n}", address=f"10.0.0.{n}", weight_passing=n) for n in range(3)]
    web = found(*instances, **{"web-1": "critical", "web-2": "warning"})["web"]
    assert backends(web) == [[("10.0.0.0:23456", 1), ("10.0.0.2:23456", 2)]]
    none = found(instances[0], **{"web-0": "critical"})["web"]
    assert none.problem == "no instance that Consul finds healthy" and none.routes == ()


def test_what_two_registered_at_one_address_is_one_backend() -> None:
    web = found(
        instance("web-1", weight_passing=3), instance("web-2"), instance("web-3", port=23457, meta={})
    )
    assert web["web"].problem is not None, "their own ports are published, and these differ"
    same = {"ztna-ports": "tcp:80"}
    twice = (instance("web-1", weight_passing=3, meta=same), instance("web-2", meta=same))
    web = found(*twice, instance("web-3", port=23457, meta=same))
    assert backends(web["web"]) == [[("10.0.0.7:23456", 3), ("10.0.0.7:23457", 1)]]
    assert len(RouteTable(web["web"].routes).services[WEB].routes) == 1


def test_there_is_a_bound() -> None:
    many = found(*(instance(f"web-{n}", port=n + 1) for n in range(BACKENDS_PER_ROUTE_MAX + 3)))["web"]
    assert many.problem is not None and "disagree" in many.problem
    same = {"ztna-ports": "tcp:80"}
    many = found(*(instance(f"web-{n}", meta=same, port=n + 1) for n in range(BACKENDS_PER_ROUTE_MAX + 3)))[
        "web"
    ]
    assert len(many.routes[0].backends) == BACKENDS_PER_ROUTE_MAX


@pytest.mark.parametrize(
    "other",
    [
        instance(tags=("blue",)),
        instance(service="pay"),
        instance(service="Web_App"),
        instance("web@c1", meta={"ztna-connector": "c1"}),
        instance("web@c2", meta={"ztna-connector": "c2"}),
        instance(meta={"ztna-fronted-by": "rack-7--b"}),
        instance(meta={"ztna-fronted-by": ""}),
    ],
)
def test_what_is_not_tagged_not_granted_or_a_connectors_own_is_left_alone(other: AgentService) -> None:
    assert found(other) == {}


def test_one_that_names_its_connector_is_a_backend_of_that_one_alone() -> None:
    ours, others = {"ztna-fronted-by": "rack-7--a"}, {"ztna-fronted-by": "rack-7"}
    ports = {"ztna-ports": "tcp:80"}
    web = found(
        instance("web-1", meta=ports | others, port=1),
        instance("web-2", meta=ports | ours, port=2),
        instance("web-3", meta=ports, port=3),
    )["web"]
    assert backends(web) == [[("10.0.0.7:2", 1), ("10.0.0.7:3", 1)]]


def test_what_cannot_be_read_says_why() -> None:
    assert "expected ztna-ports like" in str(found(instance(meta={"ztna-ports": "x"}))["web"].problem)
    assert found(instance(port=0))["web"].problem == "instance '_nomad-task-1-web' has no port"
    differ = found(instance("a"), instance("b", meta={"ztna-ports": ""}), instance("c", port=1))
    assert "expected ztna-ports like" in str(differ["web"].problem)
    differ = found(instance("a", port=0), instance("b", meta={"ztna-ports": "tcp:80"}))
    assert differ["web"].problem == "instances disagree on the ports: a says none; b says tcp:80"
