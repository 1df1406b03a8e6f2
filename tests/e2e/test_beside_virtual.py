"""docs/virtual.md on a Consul that hands out virtual addresses of its own: both names lead to the service."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.support.console import require_tools
from tests.support.consul import NEWEST, VERSIONS_TESTED
from tests.support.lab import CONSUL_PORT, Lab, http_get, lab, tcp_route, until
from tests.support.pages import ROOT, blocks
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.real_consul]

PAGE = ROOT / "docs/virtual.md"
HTTP_PORT, CONSUL_DNS, RESOLVER = 18080, 8600, 5399
PORTS = {"http": CONSUL_PORT, "dns": CONSUL_DNS, "serf_lan": 8501, "server": 8502, "serf_wan": -1, "grpc": -1}
CONSULS_OWN = IPv4Network("240.0.0.0/4")


class Beside:
    """A service with a sidecar proxy in Consul, and a connector that fronts it too."""

    def __init__(self, made: Lab) -> None:
        self.lab, self.host = made, made.host("core")
        ports = PORTS | {"grpc_tls": 8503}
        made.start_consul("newest", acl=False, more={"connect": {"enabled": True}, "ports": ports})
        made.python("backend", self.host, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
        for name in ("web-app", "db"):
            service = {
                "Name": name,
                "Port": HTTP_PORT,
                "Tags": ["primary"],
                "Connect": {"SidecarService": {}},
            }
            made.consul_put("/v1/agent/service/register", service)
        self.virtual = until("Consul gives an address", lambda: self.ask("web-app.virtual.consul"))
        made.dnsd()
        made.relay()

    def type(self, line: str) -> list[str]:
        """Run a line of the page; Consul's DNS and dnsd are where it says."""
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        there = line.replace(f"127.0.0.1 -p {CONSUL_DNS}", f"{self.host.address} -p {CONSUL_DNS}")
        argv = [*self.host.prefix, "sh", "-c", there]
        done = subprocess.run(
            argv, cwd=self.lab.directory, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.split()

    def ask(self, name: str, *kind: str) -> list[str]:
        """Return what Consul's DNS answers."""
        return self.lab.dig("core", name, *kind, port=CONSUL_DNS, server=self.host.address)

    def envoys_see(self) -> list[str]:
        """Return the instances that a proxy is led to."""
        return sorted(each["Service"]["ID"] for each in self.lab.consul_get("/v1/health/connect/web-app"))


def test_both_names_stand_and_programs_move_one_by_one(
    record_property: Callable[[str, object], None],
) -> None:
    require_tools("dig", "dnsmasq")
    record_property(VERSIONS_TESTED, NEWEST)
    with lab("core") as made:
        beside = Beside(made)
        before, envoys = beside.ask("web-app.service.consul", "SRV"), beside.envoys_see()
        made.connector("alpha", [tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT))])
        made.agent("laptop", ["web-app"])
        ours = made.address("web-app")
        until("the name serves", lambda: http_get(beside.host, f"http://{ours}:8080/")[0] == 200, 40)

        both, tag, pin = blocks(PAGE, "sh")
        assert [beside.type(line) for line in both] == [beside.virtual, [ours]]
        assert IPv4Address(beside.virtual[0]) in CONSULS_OWN
        assert beside.envoys_see() == envoys == ["web-app-sidecar-proxy"]
        until(
            "the connector's instance passes",
            lambda: len(beside.ask("web-app.service.consul", "SRV")) == 2,
            20,
        )
        assert beside.type(tag[0]) == " ".join(before).split()

        beside.type(pin[0])
        (lines,) = blocks(PAGE, "dnsmasq")
        asking = (
            "\n".join(lines)
            .replace("10.100.0.2", ours)
            .replace("127.0.0.1#8600", f"{beside.host.address}#{CONSUL_DNS}")
        )
        config = made.directory / "dnsmasq.conf"
        config.write_text(
            f"{asking}\nport={RESOLVER}\nlisten-address=127.0.0.1\nbind-interfaces\nno-resolv\nno-hosts\n"
        )
        made.spawn(
            "dnsmasq", beside.host, "dnsmasq", "--keep-in-foreground", "--pid-file=", f"--conf-file={config}"
        )
        asked = {"port": RESOLVER}
        until(
            "the old name leads here", lambda: made.dig("core", "web-app.virtual.consul", **asked) == [ours]
        )
        assert made.dig("core", "web-app.ztna.local", **asked) == [ours]
        assert made.dig("core", "db.virtual.consul", **asked) == beside.ask("db.virtual.consul") != []

        made.consul_put("/v1/agent/service/deregister/web-app-sidecar-proxy")
        until("no proxy is left", lambda: beside.envoys_see() == [], 20)
        assert http_get(beside.host, f"http://{ours}:8080/")[0] == 200
        assert made.address("web-app") == ours
