"""Consul and dnsd in containers, asked by `dig` from a third one (testcontainers, really executed)."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.support import docker
from tests.support.consul import require_binary
from tests.support.lab import until

pytestmark = [pytest.mark.docker, pytest.mark.real_consul, pytest.mark.slow]

DNSD_CONFIG = """
consul: {address: "http://consul:8500"}
dnsd:
  listen: 0.0.0.0:5533
  allow: [0.0.0.0/0]
  pool: {cidr: 10.100.0.0/16}
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[str | None]:
    if (reason := docker.why_not()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with docker.engine() as host:
        previous = {key: os.environ.get(key) for key in ("DOCKER_HOST", "TESTCONTAINERS_RYUK_DISABLED")}
        if host:
            os.environ["DOCKER_HOST"] = host
        os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"  # its image would have to be pulled
        yield host
        for key, value in previous.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


def test_dig_from_another_container_gets_a_leased_address(engine: str | None, tmp_path: Path) -> None:
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.image import DockerImage
    from testcontainers.core.network import Network
    from testcontainers.core.wait_strategies import HttpWaitStrategy

    testcontainers_config.ryuk_disabled = True
    consul_binary = require_binary("newest")
    (tmp_path / "dnsd.yaml").write_text(DNSD_CONFIG)
    (tmp_path / "dnsd.yaml").chmod(0o644)
    tmp_path.chmod(0o755)
    folder = docker.build_folder(tmp_path)
    base = docker.base_image(engine)
    with (
        DockerImage(path=str(folder), tag="ztna-mesh-test:latest", buildargs={"BASE": base}) as image,
        Network() as network,
        DockerContainer(base)
        .with_command("/consul agent -dev -client=0.0.0.0")
        .with_volume_mapping(str(consul_binary), "/consul")
        .with_network(network)
        .with_network_aliases("consul")
        .with_exposed_ports(8500)
        .waiting_for(
            HttpWaitStrategy(8500, "/v1/status/leader").for_response_predicate(
                lambda body: len(body.strip()) > 2
            )
        ) as consul,
        DockerContainer(str(image))
        .with_command("ztna-dnsd --config /dnsd.yaml")
        .with_volume_mapping(str(tmp_path / "dnsd.yaml"), "/dnsd.yaml")
        .with_network(network)
        .with_network_aliases("dnsd"),
        DockerContainer(str(image)).with_command("sleep 600").with_network(network) as digger,
    ):
        registration = {
            "Name": "web-app",
            "ID": "web-app@box",
            "Tags": ["ztna"],
            "Port": 4435,
            "Address": "192.0.2.7",
            "Meta": {"ztna-connector": "box", "ztna-ports": "tcp:8080"},
        }
        request = urllib.request.Request(
            f"http://{consul.get_container_host_ip()}:{consul.get_exposed_port(8500)}/v1/agent/service/register",
            data=json.dumps(registration).encode(),
            method="PUT",
        )
        assert urllib.request.urlopen(request, timeout=10).status == 200

        def dig(*question: str) -> list[str]:
            result = digger.exec(["dig", "@dnsd", "-p", "5533", "+short", "+time=1", "+tries=1", *question])
            return [line for line in result.output.decode().splitlines() if line and not line.startswith(";")]

        (address,) = until("a lease seen from another container", lambda: dig("web-app.ztna.local"), 30)
        assert IPv4Address(address) in IPv4Network("10.100.0.0/16")
        assert dig("web-app.ztna.local", "SRV") == ["0 1 4435 box.connector.ztna.local."]
        assert dig("-x", address) == ["web-app.ztna.local."]
        assert dig("nothing.ztna.local") == []
