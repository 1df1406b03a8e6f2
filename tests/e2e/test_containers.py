"""A whole mesh in containers (testcontainers, really executed), disturbed by the engine: kill, pause, disconnect.

One mesh for all tests of the file, which each leave it as they found it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.support import docker
from tests.support.backends import stream_digest
from tests.support.console import require_tools
from tests.support.consul import require_binary
from tests.support.container_client import DATAGRAMS, DOWNLOAD_BYTES, SEED
from tests.support.container_mesh import (
    CONSUL_PORT,
    CONSULS,
    DNS_PORT,
    POOL,
    RELAYS,
    SERVICE,
    ZONE,
    ContainerMesh,
)
from tests.support.lab import until

pytestmark = [pytest.mark.docker, pytest.mark.real_consul, pytest.mark.slow]

NAME = f"{SERVICE}.{ZONE}"
AGENTS, BACKENDS = ("agent-1", "agent-2"), ("backend-1", "backend-2")
ADMIN = {"agent": 9434, "connector": 9433}
ELECTION_SECONDS, MOVED_SECONDS = 60.0, 60.0
STILL_SECONDS = 20.0
"""No conversation stands still for longer when a relay is lost; docs/relays.md promises less."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerMesh]:
    require_tools("dig")
    consul = require_binary("newest")
    place = tmp_path_factory.mktemp("mesh")
    with docker.required_engine() as host:
        image = docker.our_image(host, place)
        with ContainerMesh(host, image, docker.base_image(host), consul, place).running() as running:
            running.wait_until_healthy()
            yield running


@pytest.fixture
def address(mesh: ContainerMesh) -> str:
    """The service's virtual address, once both agents carry for it."""
    (found,) = until("a lease", lambda: mesh.dig(NAME), 60)
    until_both_carry(mesh, found)
    return str(found)


def until_both_carry(mesh: ContainerMesh, address: str) -> None:
    for agent in AGENTS:
        until(f"{agent} carries", partial(carries, mesh, agent, address), MOVED_SECONDS)


def carries(mesh: ContainerMesh, agent: str, address: str) -> str | None:
    """Return which backend answered an agent, to the last byte of TCP and UDP; None when not all came."""
    try:
        came = mesh.once(agent, address)
    except AssertionError:
        return None
    right = (DOWNLOAD_BYTES, stream_digest(SEED, DOWNLOAD_BYTES), DATAGRAMS)
    return came["label"] if (came["bytes"], came["sha256"], came["datagrams"]) == right else None


def test_dig_gets_the_names_from_outside_of_the_mesh(mesh: ContainerMesh, address: str) -> None:
    assert IPv4Address(address) in IPv4Network(POOL)
    targets = {line.split()[3] for line in mesh.dig(NAME, "SRV")}
    assert targets == {f"connector-{side}.connector.{ZONE}." for side in "12"}
    assert mesh.dig("-x", address) == [f"{NAME}."]
    assert mesh.dig(f"nothing.{ZONE}") == []
    for protocol, option in (("udp", "+notcp"), ("tcp", "+tcp")):
        server, _, port = mesh.published("dnsd", f"{DNS_PORT}/{protocol}").rpartition(":")
        argv = ["dig", f"@{server}", "-p", port, "+short", option, NAME]
        assert subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout.split() == [address]


def test_agents_that_reach_relays_only_reach_backends_through_the_mesh(
    mesh: ContainerMesh, address: str
) -> None:
    """Hashed TCP and UDP arrive through both modes of agent, by forwarder; no other way leads there."""
    for agent in AGENTS:
        assert carries(mesh, agent, address) in BACKENDS
        for name in (*BACKENDS, "connector-1", "consul-1"):
            with pytest.raises(AssertionError, match="gaierror"):
                mesh.exec(agent, "python3", "/client.py", "once", name)


def test_the_leader_of_consul_is_killed_and_names_go_on(mesh: ContainerMesh, address: str) -> None:
    leader = consul_leader(mesh)
    assert leader is not None
    mesh.docker("kill", mesh.id(leader))
    try:
        assert mesh.dig(NAME) == [address]
        assert carries(mesh, "agent-1", address) and carries(mesh, "agent-2", address)
        until("another leader", lambda: consul_leader(mesh) not in (None, leader), ELECTION_SECONDS)
        register(mesh, "newcomer", next(name for name in CONSULS if name != leader))
        (leased,) = until("a new lease", lambda: mesh.dig(f"newcomer.{ZONE}"), ELECTION_SECONDS)
        assert leased != address and mesh.dig(NAME) == [address]
    finally:
        mesh.docker("start", mesh.id(leader))
    until("three servers again", lambda: len(peers(mesh)) == len(CONSULS), ELECTION_SECONDS)


def test_a_relay_is_paused_and_the_other_one_carries(mesh: ContainerMesh, address: str) -> None:
    """The conversations that ran through it go on, and lose no byte of TCP."""
    for relay in RELAYS:
        with mesh.steady("agent-1", address) as one, mesh.steady("agent-2", address) as other:
            mesh.docker("pause", mesh.id(relay))
            try:
                until_both_carry(mesh, address)
            finally:
                mesh.docker("unpause", mesh.id(relay))
        for told in (one, other):
            assert told["wrong"] == 0 and told["tcp"] > 0 and told["udp"] > 0, told
            assert told["longest_s"] < STILL_SECONDS, told
        for agent in AGENTS:
            until(f"{agent} at both relays", partial(is_at_both, mesh, agent), MOVED_SECONDS)


def test_a_connector_loses_its_network_and_the_other_one_serves(mesh: ContainerMesh, address: str) -> None:
    """It still has Consul and its backend, and is passing there: only the relays miss it.

    Whoever serves agent-1 is cut off, and then, once the first is back, the other: so the first serves again.
    """
    network = mesh.networks["right"]
    for _ in BACKENDS:
        served = carries(mesh, "agent-1", address)
        assert served is not None
        other = next(each for each in BACKENDS if each != served)
        connector = served.replace("backend", "connector")
        mesh.docker("network", "disconnect", network.name, mesh.id(connector))
        try:
            for agent in AGENTS:
                until(
                    f"{agent} at {other}", partial(is_served_by, mesh, agent, address, other), MOVED_SECONDS
                )
        finally:
            mesh.docker("network", "connect", "--alias", connector, network.name, mesh.id(connector))
        until(f"{connector} at both relays", partial(is_at_both, mesh, connector), MOVED_SECONDS)


def test_everything_is_well_at_the_end(mesh: ContainerMesh, address: str) -> None:
    """No daemon ended or was started again, no zombie is left, and all go within the engine's patience."""
    mesh.wait_until_healthy()
    daemons = ["agent-1", "agent-2", "connector-1", "connector-2", *RELAYS, "dnsd"]
    for name in daemons:
        script = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true"
        assert mesh.exec(name, "sh", "-c", script) == "", name
        assert mesh.docker("inspect", "--format", "{{.RestartCount}}", mesh.id(name)).strip() == "0"


def consul_leader(mesh: ContainerMesh) -> str | None:
    """Return the name of the server that the others call their leader."""
    for name in CONSULS:
        with contextlib.suppress(AssertionError, ValueError, KeyError, StopIteration):
            address = json.loads(ask(mesh, name, "/v1/status/leader")).partition(":")[0]
            format_ = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
            return next(
                each
                for each in CONSULS
                if mesh.docker("inspect", "--format", format_, mesh.id(each)).strip() == address
            )
    return None


def peers(mesh: ContainerMesh) -> list[str]:
    """Return the servers that are alive, as the leader's members have them."""
    for name in CONSULS:
        with contextlib.suppress(OSError, ValueError, AssertionError):
            members = json.loads(ask(mesh, name, "/v1/agent/members"))
            return [each["Name"] for each in members if each["Status"] == 1]
    return []


def ask(mesh: ContainerMesh, name: str, path: str, body: object = None) -> str:
    """Ask a Consul at its published port."""
    request = urllib.request.Request(
        f"http://{mesh.published(name, str(CONSUL_PORT))}{path}",
        data=None if body is None else json.dumps(body).encode(),
        method="GET" if body is None else "PUT",
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def register(mesh: ContainerMesh, service: str, server: str) -> None:
    """Register an instance of a service, as a Nomad job would."""
    instance = {
        "Name": service,
        "ID": f"{service}@box",
        "Tags": ["ztna"],
        "Address": "192.0.2.7",
        "Port": 4435,
        "Meta": {"ztna-connector": "box", "ztna-ports": "tcp:8080"},
    }
    ask(mesh, server, "/v1/agent/service/register", instance)


def is_served_by(mesh: ContainerMesh, agent: str, address: str, backend: str) -> bool:
    """Say whether that backend answered the agent, to the last byte."""
    return carries(mesh, agent, address) == backend


def is_at_both(mesh: ContainerMesh, name: str) -> bool:
    """Say whether an agent or a connector has a working connection to each relay."""
    role = name.partition("-")[0]
    relays = mesh.status(name, ADMIN[role])[role]["relays"]
    return [each.get("state", "up" if each.get("connected") else "") for each in relays] == ["up"] * len(
        RELAYS
    )
