"""A laptop that reaches nothing but its relay: names, addresses and flows, and nothing of what was not granted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT = 18080
STUB = Endpoint("127.0.0.1", 53)


class Mesh:
    """Two services on one host; a laptop that may use one of them and knows a relay's address only."""

    def __init__(self, made: Lab, transport: str) -> None:
        self.lab = made
        self.transport = transport
        core = made.host("core")
        made.python("backends", core, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
        self.dnsd = made.dnsd()
        self.relay = made.relay(resolvers=(Endpoint("127.0.0.1", 5533),))
        backend = Endpoint("127.0.0.1", HTTP_PORT)
        self.connector = made.connector(
            "alpha", [tcp_route("web-app", backend, 8080), tcp_route("billing", backend, 8080)]
        )
        self.agent = made.agent(
            "laptop",
            ["web-app"],
            host="laptop",
            names="relay",
            dns_listen=STUB,
            admin_socket=str(made.directory / "agent.sock"),
        )

    def dig(self, *question: str) -> list[str]:
        return self.lab.dig("laptop", *question, port=STUB.port)

    def code(self, *question: str) -> str:
        done = self.lab.host("laptop").try_run("dig", "@127.0.0.1", "+time=5", "+tries=1", *question)
        return done.stdout.partition("status: ")[2].partition(",")[0]


@pytest.fixture(scope="module", params=["quic", "tls"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with lab("core", "laptop") as made:
        place = Path("/etc/netns") / made.host("laptop").namespace
        place.mkdir(parents=True)
        try:
            # `ip netns exec` shows this to what runs there as /etc/resolv.conf.
            (place / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            made.start_consul("newest")
            # The laptop reaches the relay's ports alone; or not even by UDP.
            udp = "udp dport { 5533, 4435 }" if request.param == "quic" else "udp dport { 4433-4435, 5533 }"
            with made.host("laptop").dropping("tcp dport { 8500, 5533, 4435 }", udp):
                yield Mesh(made, request.param)
        finally:
            shutil.rmtree(place)


def test_programs_reach_services_by_name_with_nothing_but_the_relay(mesh: Mesh) -> None:
    mesh.agent.wait_ready()
    ip = until("the name", lambda: mesh.dig("web-app.ztna.local"))[0]
    assert mesh.dig("-x", ip) == ["web-app.ztna.local."]
    assert mesh.dig("_web-app._tcp.ztna.local", "SRV")[0].endswith("8080 web-app.ztna.local.")
    assert mesh.dig("WEB-APP.ztna.LOCAL", "+tcp") == [ip]
    curl = ("curl", "-sS", "--fail", "--max-time", "10", "http://web-app.ztna.local:8080/")
    until("the page", lambda: mesh.lab.host("laptop").try_run(*curl).returncode == 0)
    (service,) = mesh.agent.status()["agent"]["services"]
    assert (service["service"], service["ip"]) == ("web-app", ip)
    agent = mesh.agent.status()["agent"]
    assert agent["names"] == "relay" and agent["relays"][0]["transport"] == mesh.transport


def test_the_way_is_traced_and_measured_also_where_udp_is_blocked(mesh: Mesh) -> None:
    mesh.agent.wait_ready()
    until("the name", lambda: mesh.dig("web-app.ztna.local"))
    ztna = str(Path(sys.executable).with_name("ztna"))
    asked = ("web-app", "--agent", str(mesh.lab.directory / "agent.sock"), "--json")
    path = "forwarded" if mesh.transport == "quic" else "over TLS, forwarded"

    def pong() -> bool:
        done = mesh.lab.host("laptop").try_run(ztna, "ping", *asked, "--count", "1")
        told = json.loads(done.stdout)
        if told.get("path") != path:
            raise ValueError(told)
        return done.returncode == 0 and told["ms"] > 0

    until("a pong", pong)
    done = mesh.lab.host("laptop").try_run(ztna, "trace", *asked)
    steps = {each["step"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 0 and all(step["ok"] for step in steps.values()), steps
    assert path in steps["packet carrier"]["told"]


def test_of_what_was_not_granted_nothing_is_told(mesh: Mesh) -> None:
    mesh.agent.wait_ready()
    until("both are registered", lambda: mesh.lab.dig("core", "billing.ztna.local"))
    billing = mesh.lab.dig("core", "billing.ztna.local")[0]
    for question in (("billing.ztna.local",), ("no-such-name.ztna.local",), ("alpha.connector.ztna.local",)):
        assert mesh.code(*question) == "REFUSED", question
    assert mesh.code("-x", billing) == mesh.code("-x", "127.100.255.254") == "REFUSED"
    assert mesh.code("example.org") == "REFUSED"
    assert mesh.dig("_services._dns-sd._udp.ztna.local", "PTR") == ["_web-app._tcp.ztna.local."]
    assert mesh.relay.metric("ztna_refusals_total", where="relay_names") > 0


def test_a_lease_that_moves_is_followed(mesh: Mesh) -> None:
    mesh.agent.wait_ready()
    before = until("the name", lambda: mesh.dig("web-app.ztna.local"))[0]
    argv = ("leases", "move", "web-app", "--config", str(mesh.lab.operator_config()))
    mesh.lab.host("core").run(str(Path(sys.executable).with_name("ztna")), *argv)
    (ip,) = until(
        "the new address",
        lambda: [each for each in mesh.dig("web-app.ztna.local") if each != before],
        seconds=60,
    )
    assert mesh.agent.status()["agent"]["services"][0]["ip"] == ip, "known before a program hears of it"
    curl = ("curl", "-sS", "--fail", "--max-time", "10", "http://web-app.ztna.local:8080/")
    until("the page", lambda: mesh.lab.host("laptop").try_run(*curl).returncode == 0, seconds=60)


def test_without_dns_names_are_kept_for_a_while_and_found_again(mesh: Mesh) -> None:
    mesh.agent.wait_ready()
    until("the name", lambda: mesh.dig("web-app.ztna.local"))
    mesh.dnsd.stop()
    until("it says so", lambda: mesh.code("web-app.ztna.local", "HTTPS") == "SERVFAIL")
    assert len(mesh.agent.status()["agent"]["services"]) == 1, "what is not answered stays as it was"
    mesh.dnsd.start()
    until("the name", lambda: mesh.code("web-app.ztna.local", "HTTPS") == "NOERROR", seconds=60)
