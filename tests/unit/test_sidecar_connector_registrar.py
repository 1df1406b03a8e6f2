from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import msgspec
import pytest

from sidecar.connector.health import Verdict
from sidecar.connector.registrar import Desired, Registrant, own_ids, plan, registration
from sidecar.connector.routes import RouteTable
from ztna.catalog import AgentService, CheckDefinition, Probe, ProbeDefinition, TaggedAddress
from ztna.config import Endpoint, RouteConfig
from ztna.leases import Lease
from ztna.names import ConnectorId, ServiceName
from ztna.wire.control import Address

WEB = ServiceName("web")
ME = Registrant(ConnectorId("c1"), Address("192.0.2.9", 4435), ttl_s=15.0, deregister_after_s=600.0)
LEASE = Lease(IPv4Address("10.100.0.2"), 7)


def desired(verdict: Verdict = "passing", *, since: float = 0.0, lease: Lease | None = LEASE) -> Desired:
    routes = [
        RouteConfig(service=WEB, backend=Endpoint("127.0.0.1", 1), port=8080, weight=3),
        RouteConfig(service=WEB, backend=Endpoint("127.0.0.1", 1), port=53, protocol="udp", weight=3),
    ]
    return Desired(RouteTable(routes).services[WEB], 3, verdict, since, "connected", lease)


def known(**changes: object) -> dict[str, AgentService]:
    """What Consul says after our registration, with what it adds itself."""
    target = registration(desired(), ME)
    service = AgentService(
        service=target.service,
        instance_id=target.instance_id,
        address=target.address,
        port=target.port,
        tags=target.tags,
        meta=target.meta,
        tagged_addresses=dict(target.tagged_addresses) | {"lan_ipv4": TaggedAddress("192.0.2.9", 4435)},
        weight_passing=target.weight_passing,
        weight_warning=target.weight_warning,
    )
    service = msgspec.structs.replace(service, **changes)
    return {service.instance_id: service}


def test_registration_is_as_the_design_says() -> None:
    made = registration(desired("critical"), ME)
    assert (made.service, made.instance_id, made.tags) == ("web", "web@c1", ("ztna",))
    assert (made.address, made.port) == ("192.0.2.9", 4435)
    assert made.meta == {"ztna-connector": "c1", "ztna-ports": "tcp:8080,udp:53"}
    assert made.tagged_addresses == {"virtual": TaggedAddress("10.100.0.2", 8080)}
    assert (made.weight_passing, made.weight_warning) == (3, 3)
    (check,) = made.checks
    assert isinstance(check, CheckDefinition)
    assert (check.check_id, check.status, check.ttl_s) == ("ztna:web@c1", "critical", 15.0)
    assert check.deregister_after_s == 600.0
    assert registration(desired(lease=None), ME).tagged_addresses == {}


def test_what_consul_runs_stands_beside_what_we_report() -> None:
    probe = Probe(kind="tcp", target="127.0.0.1:1", interval_s=5.0, timeout_s=2.0)
    beside = ProbeDefinition(check_id="ztna:web@c1:tcp:80:0:x", name="tcp", probe=probe, status="critical")
    made = registration(replace(desired("critical"), reported="passing", probes=(beside,)), ME)
    assert [(each.check_id, each.status) for each in made.checks] == [
        ("ztna:web@c1", "passing"),
        ("ztna:web@c1:tcp:80:0:x", "critical"),
    ]


def test_the_address_it_asks_for_is_in_its_meta() -> None:
    asked = RouteConfig(
        service=WEB,
        backend=Endpoint("127.0.0.1", 1),
        port=80,
        virtual_ip=IPv4Address("10.100.0.80"),
        wildcard=True,
    )
    made = registration(Desired(RouteTable([asked]).services[WEB], 1, "passing", 0.0, ""), ME)
    assert made.meta["ztna-virtual-ip"] == "10.100.0.80"
    assert made.meta["ztna-wildcard"] == "true"


def test_nothing_to_do_when_consul_knows() -> None:
    done = plan([desired()], known(), ME, 1000.0)
    assert (done.register, done.deregister, done.waiting) == ((), (), ())


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "192.0.2.8"},
        {"tags": ("ztna", "more")},
        {"meta": {"ztna-connector": "c1", "ztna-ports": "tcp:8080"}},
        {"tagged_addresses": {}},
        {"weight_passing": 1},
    ],
)
def test_registers_again_what_differs(changes: dict[str, object]) -> None:
    assert [each.instance_id for each in plan([desired()], known(**changes), ME, 0.0).register] == ["web@c1"]


def test_registers_what_is_missing() -> None:
    # At the start, after Consul was wiped, or when a passing service was reaped.
    assert plan([desired("critical", since=900.0)], {}, ME, 1000.0).register
    assert plan([desired("passing", since=0.0)], {}, ME, 1000.0).register


def test_registers_anew_what_looks_as_it_should() -> None:
    # Its check is gone, or it was registered by a token that is another one by now.
    planned = plan([desired()], known(), ME, 0.0, anew={WEB})
    assert [each.instance_id for each in planned.register] == ["web@c1"]
    assert plan([desired("critical")], {}, ME, 1000.0, anew={WEB}).waiting == (WEB,)


def test_a_reaped_service_waits_for_its_backend() -> None:
    planned = plan([desired("critical", since=400.0)], {}, ME, 1000.0)
    assert (planned.register, planned.waiting) == ((), (WEB,))


def test_removes_only_its_own_zombies() -> None:
    zombie = known(service="old", instance_id="old@c1")
    others = [
        known(service="old", instance_id="_nomad-task-old@c1"),
        known(service="old", instance_id="old@c2", meta={"ztna-connector": "c2"}),
        known(service="odd", instance_id="odd@c1", meta={"ztna-connector": "c2"}),
        known(service="plain", instance_id="plain@c1", tags=()),
    ]
    services = dict(zombie)
    for other in others:
        services |= other
    assert plan([], services, ME, 0.0).deregister == ("old@c1",)
    assert plan([], services, ME, 0.0, is_all=False).deregister == (), "it may be wanted in a moment"
    assert own_ids(services | known(), ME.connector_id) == ("old@c1", "web@c1")
