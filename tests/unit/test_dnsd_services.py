"""dnsd.services: what the catalog's instances say together."""

from __future__ import annotations

import pytest

from dnsd.services import connectors, describe, describe_all
from tests.support.dns import catalog, instance
from ztna.leases import Port

SIXTY_FIVE = ",".join(f"tcp:{port}" for port in range(1, 66))


@pytest.mark.parametrize(
    ("ports", "tags", "port", "expected"),
    [
        ("tcp:8080,udp:53", (), 1, (Port("tcp", 8080), Port("udp", 53))),
        (" udp:53 , icmp:0", (), 1, (Port("icmp", 0), Port("udp", 53))),
        (None, ("ztna-tcp:81", "ztna-udp:53"), 1, (Port("tcp", 81), Port("udp", 53))),
        (None, ("other",), 8080, (Port("tcp", 8080),)),
        (None, (), 0, ()),
    ],
)
def test_ports_come_from_meta_then_tags_then_the_instance(
    ports: str | None, tags: tuple[str, ...], port: int, expected: tuple[Port, ...]
) -> None:
    service = describe("web", (instance("web", ports=ports, tags=("ztna", *tags), port=port),))
    assert service.problem is None
    assert service.ports == expected


@pytest.mark.parametrize(
    "ports",
    [
        "",
        "tcp",
        "tcp:0",
        "tcp:65536",
        "sctp:1",
        "tcp:1,tcp:1",
        "icmp:1",
        "udp:-1",
        ",".join(f"tcp:{port}" for port in range(1, 66)),
    ],
)
def test_ports_nobody_can_read_are_a_problem(ports: str) -> None:
    service = describe("web", (instance("web", ports=ports),))
    assert service.ports == ()
    assert service.problem is not None
    assert "web@c1" in service.problem


def test_an_unreadable_tag_is_a_problem() -> None:
    assert describe("web", (instance("web", ports=None, tags=("ztna", "ztna-tcp:x")),)).problem


def test_a_name_that_is_no_service_name_is_a_problem() -> None:
    assert describe("Web_App", (instance("Web_App"),)).problem
    assert describe("connector", (instance("connector"),)).problem


def test_instances_that_disagree_are_named() -> None:
    service = describe("web", (instance("web", "c1"), instance("web", "c2", ports="tcp:9090")))
    assert service.problem is not None
    assert "web@c1 says tcp:8080" in service.problem
    assert "web@c2 says tcp:9090" in service.problem


def test_a_service_with_no_ports_on_one_side_disagrees_in_words() -> None:
    service = describe("web", (instance("web"), instance("web", "", ports=None, port=0)))
    assert service.problem is not None
    assert "says none" in service.problem


def test_only_passing_instances_with_a_good_connector_id_and_port_can_be_routed_to() -> None:
    service = catalog(
        instance("web", "c1"),
        instance("web", "c2", status="critical"),
        instance("web", "c3", status="warning"),
        instance("web", ""),
        instance("web", "Bad_Id"),
        instance("web", "c4", port=0),
    )["web"]
    assert [connector for connector, _ in connectors(service)] == ["c1"]


def test_what_did_not_change_is_the_very_same_object() -> None:
    web, db = (instance("web"),), (instance("db"),)
    before = describe_all({"web": web, "db": db})
    after = describe_all({"web": (instance("web"),), "db": (instance("db", ports="tcp:1"),)}, before)
    assert after["web"] is before["web"]
    assert after["db"].ports == (Port("tcp", 1),)
    assert describe_all({"web": web}, before)["web"] is before["web"]


def test_one_instance_may_ask_for_every_name_under_the_services() -> None:
    asked = describe("web", (instance("web", "c1"), instance("web", "c2", wildcard="true")))
    assert asked.wildcard
    for text in ("", "false", "yes"):
        assert not describe("web", (instance("web", wildcard=text),)).wildcard
