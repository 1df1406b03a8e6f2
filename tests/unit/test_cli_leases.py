"""`ztna leases list | audit` against an embedded Consul."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.consul import ConsulUnderTest, free_ports
from ztna.cli.leases import leases
from ztna.jsontypes import to_json
from ztna.leases import Holding, Lease, Port, address_key, service_key
from ztna.names import ServiceName

IP = IPv4Address("10.100.0.9")


@pytest.fixture(scope="module")
def consul(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulUnderTest]:
    server = ConsulUnderTest("embedded", tmp_path_factory.mktemp("consul"))
    put(server, service_key(ServiceName("web")), Lease(IP, 4, (Port("tcp", 80),)))
    put(server, address_key(IP), Holding(service="web", epoch=4, state="leased", leased_at=1.7e9))
    resting = Holding(service="old", epoch=3, state="quarantined", released_at=1.7e9)
    put(server, address_key(IPv4Address("10.100.0.10")), resting)
    yield server
    server.stop()


def put(server: ConsulUnderTest, key: str, value: object) -> None:
    assert server.request("PUT", f"/v1/kv/{key}", to_json(value))[1] is True


def call(*words: str) -> Result:
    return CliRunner().invoke(leases, list(words), env={"COLUMNS": "200"})


def test_list_shows_leases_and_what_rests(consul: ConsulUnderTest) -> None:
    shown = call("list", "--consul", consul.address)
    assert shown.exit_code == 0
    for word in ("web", "10.100.0.9", "tcp:80", "old", "quarantined"):
        assert word in shown.output
    listed = json.loads(call("list", "--json", "--consul", consul.address).output)
    assert listed["leases"]["web"] == {
        "ip": "10.100.0.9",
        "epoch": 4,
        "ports": [{"protocol": "tcp", "port": 80}],
    }
    assert listed["addresses"]["10.100.0.10"]["state"] == "quarantined"


def test_audit_proves_or_tells_what_is_wrong(consul: ConsulUnderTest, tmp_path: Path) -> None:
    file = tmp_path / "ztna.yaml"
    file.write_text(f"consul: {{address: '{consul.address}'}}\n")
    fine = call("audit", "--config", str(file))
    assert (fine.exit_code, fine.output) == (0, "1 leases, 2 addresses: nothing is wrong\n")
    put(consul, service_key(ServiceName("db")), Lease(IP, 5))
    try:
        broken = call("audit", "--consul", consul.address)
        assert broken.exit_code == 1
        assert "leased to 2 services: db, web" in broken.output
        told = json.loads(call("audit", "--json", "--consul", consul.address).output)
        assert (told["ok"], len(told["broken"])) == (False, 2)
    finally:
        consul.request("DELETE", "/v1/kv/ztna/vip/service/db")


def test_no_consul_is_one_line_and_a_bad_file_is_wrong_usage(tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    away = call("list", "--consul", f"http://127.0.0.1:{nobody}")
    assert away.exit_code == 1
    assert away.output.startswith("Error: ")
    file = tmp_path / "ztna.yaml"
    file.write_text("consul: {adress: x}\n")
    assert call("list", "--config", str(file)).exit_code == 2
