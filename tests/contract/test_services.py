"""Services, checks and the catalog: what Consul's HTTP API answers, and what our client makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.consul import ConsulUnderTest, shared_of_kind
from ztna.catalog import CheckDefinition, Instance, Registration, Status, TaggedAddress
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulRejected

SYNC_SECONDS = 10.0


def definition(unique: str, **fields: object) -> dict[str, object]:
    return {
        "ID": f"{unique}@c1",
        "Name": unique,
        "Address": "127.0.0.9",
        "Port": 4435,
        "Tags": ["ztna"],
        "Meta": {"ztna-connector": "c1"},
        "TaggedAddresses": {"virtual": {"Address": "10.100.0.2", "Port": 80}},
        "Weights": {"Passing": 3, "Warning": 2},
        "Checks": [{"CheckID": f"{unique}:ttl", "Name": "backend", "TTL": "60s", "Notes": "why"}],
        **fields,
    }


def register(consul: ConsulUnderTest, body: object, query: str = "") -> None:
    status, text, _ = consul.request("PUT", f"/v1/agent/service/register{query}", body)
    assert status == 200, text


def deregister(consul: ConsulUnderTest, service_id: str) -> None:
    assert consul.request("PUT", f"/v1/agent/service/deregister/{service_id}")[0] == 200


def until(consul: ConsulUnderTest, path: str, holds: Callable[[Any], bool]) -> Any:
    """Read until the answer is as wanted: the agent's sync with the catalog has its own clock."""
    end = time.monotonic() + SYNC_SECONDS
    while not holds(found := consul.request("GET", path)[1]):
        assert time.monotonic() < end, f"{path}: {found}"
        time.sleep(0.02)
    return found


def statuses(entries: Any) -> list[str]:
    return [check["Status"] for entry in entries for check in entry["Checks"] if check["ServiceID"]]


# Raw HTTP


def test_a_registered_service_is_in_catalog_health_and_agent(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    [entry] = until(consul, f"/v1/health/service/{unique}", bool)
    service = entry["Service"]
    assert service["TaggedAddresses"] == {
        "lan_ipv4": {"Address": "127.0.0.9", "Port": 4435},
        "virtual": {"Address": "10.100.0.2", "Port": 80},
        "wan_ipv4": {"Address": "127.0.0.9", "Port": 4435},
    }
    fields = ("ID", "Service", "Tags", "Address", "Port", "Meta", "Weights", "EnableTagOverride")
    assert [service[field] for field in fields] == [
        f"{unique}@c1",
        unique,
        ["ztna"],
        "127.0.0.9",
        4435,
        {"ztna-connector": "c1"},
        {"Passing": 3, "Warning": 2},
        False,
    ]
    node_check, check = entry["Checks"]
    assert (node_check["CheckID"], node_check["Status"]) == ("serfHealth", "passing")
    assert (check["CheckID"], check["Name"], check["Status"]) == (f"{unique}:ttl", "backend", "critical")
    assert (check["Notes"], check["Type"], check["ServiceTags"]) == ("why", "ttl", ["ztna"])
    assert consul.request("GET", "/v1/catalog/services")[1][unique] == ["ztna"]
    [flat] = consul.request("GET", f"/v1/catalog/service/{unique}")[1]
    assert (flat["ServiceID"], flat["ServiceAddress"]) == (f"{unique}@c1", "127.0.0.9")
    assert f"{unique}@c1" in consul.request("GET", "/v1/agent/services")[1]
    assert f"{unique}:ttl" in consul.request("GET", "/v1/agent/checks")[1]
    node = entry["Node"]["Node"]
    assert f"{unique}@c1" in consul.request("GET", f"/v1/catalog/node/{node}")[1]["Services"]
    assert check in consul.request("GET", f"/v1/health/node/{node}")[1]
    assert check in consul.request("GET", "/v1/health/state/any")[1]
    assert check in consul.request("GET", "/v1/health/state/critical")[1]
    assert check not in consul.request("GET", "/v1/health/state/passing")[1]
    assert consul.request("GET", f"/v1/health/checks/{unique}")[1] == [check]
    deregister(consul, f"{unique}@c1")
    until(consul, f"/v1/health/service/{unique}", lambda found: found == [])
    assert unique not in consul.request("GET", "/v1/catalog/services")[1]


def test_what_is_left_out_gets_consuls_defaults(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, {"Name": unique, "Check": {"TTL": "60s"}})
    [entry] = until(consul, f"/v1/health/service/{unique}", bool)
    service = entry["Service"]
    assert (service["ID"], service["Address"], service.get("Port", 0)) == (unique, "", 0)
    assert (service["Tags"], service["Weights"]) == ([], {"Passing": 1, "Warning": 1})
    assert "TaggedAddresses" not in service
    check = entry["Checks"][1]
    assert (check["CheckID"], check["Name"]) == (f"service:{unique}", f"Service '{unique}' check")
    deregister(consul, unique)


def test_field_names_have_no_case(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, {"name": unique, "id": f"{unique}-1", "port": 7, "check": {"ttl": "1m"}})
    [entry] = until(consul, f"/v1/health/service/{unique}", bool)
    assert (entry["Service"]["ID"], entry["Service"]["Port"]) == (f"{unique}-1", 7)
    deregister(consul, f"{unique}-1")


def test_a_ttl_check_says_what_it_was_told(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    path, check = f"/v1/health/service/{unique}", f"{unique}:ttl"
    for status in ("passing", "warning", "critical"):
        body = {"Status": status, "Output": f"is {status}"}
        assert consul.request("PUT", f"/v1/agent/check/update/{check}", body)[0] == 200
        until(consul, path, lambda found, status=status: statuses(found) == [status])
        [shown] = consul.request("GET", f"/v1/health/checks/{unique}")[1]
        assert shown["Output"] == f"is {status}"
    assert consul.request("PUT", f"/v1/agent/check/pass/{check}?note=fine")[0] == 200
    until(consul, path, lambda found: statuses(found) == ["passing"])
    assert consul.request("GET", f"{path}?passing")[1]
    assert consul.request("PUT", f"/v1/agent/check/fail/{check}")[0] == 200
    until(consul, path, lambda found: statuses(found) == ["critical"])
    assert consul.request("GET", f"{path}?passing")[1] == []
    deregister(consul, f"{unique}@c1")


def test_a_ttl_that_passes_turns_critical_with_the_last_output(consul: ConsulUnderTest, unique: str) -> None:
    check = {"CheckID": f"{unique}:ttl", "Name": "b", "TTL": "300ms", "Status": "passing"}
    register(consul, definition(unique, Checks=[check]))
    consul.request("PUT", f"/v1/agent/check/update/{unique}:ttl", {"Status": "passing", "Output": "fine"})
    until(consul, f"/v1/health/service/{unique}", lambda found: statuses(found) == ["critical"])
    [shown] = until(consul, f"/v1/health/checks/{unique}", lambda found: "TTL" in found[0]["Output"])
    assert shown["Output"] == "TTL expired (last output before timeout follows): fine"
    deregister(consul, f"{unique}@c1")


def test_registering_again_keeps_what_a_check_said(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    consul.request("PUT", f"/v1/agent/check/update/{unique}:ttl", {"Status": "passing", "Output": "ok"})
    until(consul, f"/v1/health/service/{unique}", lambda found: statuses(found) == ["passing"])
    register(consul, definition(unique, Port=1), "?replace-existing-checks=true")
    path = f"/v1/health/service/{unique}"
    [entry] = until(consul, path, lambda found: found[0]["Service"]["Port"] == 1)
    assert statuses([entry]) == ["passing"]
    deregister(consul, f"{unique}@c1")


def test_registering_the_same_again_changes_nothing(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    [before] = until(consul, f"/v1/health/service/{unique}", lambda found: len(statuses(found)) == 1)
    register(consul, definition(unique))
    assert consul.request("GET", f"/v1/health/service/{unique}")[1] == [before]
    deregister(consul, f"{unique}@c1")


def test_checks_are_replaced_only_when_asked(consul: ConsulUnderTest, unique: str) -> None:
    other = {"CheckID": f"{unique}:other", "Name": "other", "TTL": "60s"}
    register(consul, definition(unique))
    register(consul, definition(unique, Checks=[other]))
    path = f"/v1/health/checks/{unique}"
    until(consul, path, lambda found: len(found) == 2)
    register(consul, definition(unique, Checks=[other]), "?replace-existing-checks=true")
    [left] = until(consul, path, lambda found: len(found) == 1)
    assert left["CheckID"] == f"{unique}:other"
    deregister(consul, f"{unique}@c1")


def test_tags_choose_instances(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    register(consul, definition(unique, ID=f"{unique}@c2", Tags=["other"], Checks=[]))
    path = f"/v1/health/service/{unique}"
    until(consul, path, lambda found: len(found) == 2)
    assert [each["Service"]["ID"] for each in consul.request("GET", f"{path}?tag=ztna")[1]] == [
        f"{unique}@c1"
    ]
    assert consul.request("GET", f"{path}?tag=ztna&tag=other")[1] == []
    assert set(consul.request("GET", "/v1/catalog/services")[1][unique]) == {"ztna", "other"}
    deregister(consul, f"{unique}@c1")
    deregister(consul, f"{unique}@c2")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"Name": ""}, "Missing service name"),
        ({"Name": "x", "Wrong": 1}, 'Request decode failed: json: unknown field "Wrong"'),
        ({"Name": "x", "Check": {"TTL": "soon"}}, 'Request decode failed: time: invalid duration "soon"'),
        ({"Name": "x", "Check": {"Name": "none"}}, "Invalid check: TTL must be > 0 for TTL checks"),
    ],
)
def test_registrations_that_cannot_be(consul: ConsulUnderTest, body: object, words: str) -> None:
    assert consul.request("PUT", "/v1/agent/service/register", body)[:2] == (400, words)


def test_a_status_that_does_not_exist(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, definition(unique))
    body = {"Status": "fine"}
    answer = consul.request("PUT", f"/v1/agent/check/update/{unique}:ttl", body)[:2]
    assert answer == (400, "Invalid check status: 'fine'")
    deregister(consul, f"{unique}@c1")


def test_what_is_not_there(consul: ConsulUnderTest, unique: str) -> None:
    assert consul.request("GET", f"/v1/health/service/{unique}")[:2] == (200, [])
    assert consul.request("GET", f"/v1/health/checks/{unique}")[:2] == (200, [])
    assert consul.request("GET", f"/v1/catalog/service/{unique}")[:2] == (200, [])
    assert consul.request("GET", f"/v1/catalog/node/{unique}")[:2] == (200, None)
    assert consul.request("GET", f"/v1/health/node/{unique}")[:2] == (200, [])
    assert consul.request("GET", f"/v1/{unique}")[0] == 404
    assert consul.request("POST", f"/v1/kv/{unique}", b"")[:2] == (405, "method POST not allowed")
    assert consul.request("GET", "/v1/catalog/services?dc=elsewhere")[:2] == (500, "No path to datacenter")


def test_the_server_about_itself(consul: ConsulUnderTest) -> None:
    assert ":" in consul.request("GET", "/v1/status/leader")[1]
    assert consul.request("GET", "/v1/status/peers")[1] == [consul.request("GET", "/v1/status/leader")[1]]
    assert consul.request("GET", "/v1/catalog/datacenters")[1] == ["dc1"]
    [node] = consul.request("GET", "/v1/catalog/nodes")[1]
    about = consul.request("GET", "/v1/agent/self")[1]
    assert (about["Config"]["NodeName"], about["Config"]["NodeID"]) == (node["Node"], node["ID"])
    [member] = consul.request("GET", "/v1/agent/members")[1]
    assert member == about["Member"]


# Shapes


def shape(value: Any) -> Any:
    """Reduce JSON to its field names and kinds of values; a list to the shape of its last element."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[-1])] if value else []
    return type(value).__name__


@pytest.mark.real_consul
@pytest.mark.parametrize(
    "path",
    [
        "/v1/health/service/{name}",
        "/v1/health/checks/{name}",
        "/v1/health/state/critical",
        "/v1/catalog/service/{name}",
        "/v1/catalog/nodes",
        "/v1/agent/services",
        "/v1/agent/checks",
        "/v1/catalog/datacenters",
        "/v1/status/peers",
    ],
)
def test_the_embedded_answers_have_the_shape_of_the_newest(
    request: pytest.FixtureRequest, unique: str, path: str
) -> None:
    shapes = []
    for kind in ("embedded", "newest"):
        consul = shared_of_kind(request, kind)
        register(consul, definition(unique))
        until(consul, f"/v1/health/service/{unique}", lambda found: len(statuses(found)) == 1)
        found = consul.request("GET", path.format(name=unique))[1]
        if path.startswith("/v1/agent/"):
            found = found[next(key for key in found if key.startswith(unique))]
        shapes.append(shape(found))
        deregister(consul, f"{unique}@c1")
    assert shapes[0] == shapes[1]


# Through our client


async def test_the_client_registers_reports_and_reads(consul: ConsulUnderTest, unique: str) -> None:
    check = CheckDefinition(check_id=f"{unique}:ttl", name="backend", ttl_s=60, deregister_after_s=60)
    registration = Registration(
        service=unique,
        instance_id=f"{unique}@c1",
        address="127.0.0.9",
        port=4435,
        meta={"ztna-connector": "c1"},
        tagged_addresses={"virtual": TaggedAddress("10.100.0.2", 80)},
        weight_passing=3,
        checks=(check,),
    )
    async with ConsulClient(consul.config()) as client:
        await client.register_service(registration)
        expected: tuple[tuple[Status, int], ...] = (("passing", 3), ("warning", 1), ("critical", 0))
        for status, weight in expected:
            assert await client.update_check(check.check_id, status, "x" * 10_000)
            [instance] = await reads(client, unique, status)
            assert instance.weight == weight
        assert (instance.address, instance.port, instance.tags) == ("127.0.0.9", 4435, ("ztna",))
        assert instance.tagged_addresses["virtual"] == TaggedAddress("10.100.0.2", 80)
        assert unique in await client.services(tag="ztna")
        assert unique not in await client.services(tag="other")
        assert await client.service_instances(unique, tag="other") == ()
        assert (await client.agent_services())[f"{unique}@c1"].meta == {"ztna-connector": "c1"}
        assert (await client.agent_checks())[check.check_id] == "critical"
        await client.deregister_service(f"{unique}@c1")
        assert not await client.update_check(check.check_id, "passing")
        await client.deregister_service(f"{unique}@c1")
        with pytest.raises(ConsulRejected, match="Missing service name"):
            await client.register_service(Registration(service="", instance_id="x", address="", port=1))
        assert await client.leader()
        assert (await client.agent_self())["Config"]["Datacenter"] == "dc1"


async def reads(client: ConsulClient, name: str, status: str) -> tuple[Instance, ...]:
    """Read, quorum and all, until the status has reached the catalog."""
    end = time.monotonic() + SYNC_SECONDS
    while True:
        found = await client.service_instances(name, consistent=True)
        if [instance.status for instance in found] == [status]:
            return found
        assert time.monotonic() < end, found


async def test_an_instance_without_an_address_has_its_nodes(consul: ConsulUnderTest, unique: str) -> None:
    register(consul, {"Name": unique})
    until(consul, f"/v1/health/service/{unique}", bool)
    async with ConsulClient(consul.config()) as client:
        [instance] = await client.service_instances(unique)
        assert instance.address == "127.0.0.1"
        assert instance.status == "passing"
        await client.deregister_service(unique)
