"""`ztna leases` against an embedded Consul; a keeper that answers is in tests/contract/test_wishes.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ztna.cli.leases
from tests.support.consul import ConsulUnderTest, free_ports
from ztna.cli.leases import leases
from ztna.conflicts import Report, conflict_key
from ztna.jsontypes import to_json
from ztna.leases import Holding, Lease, Port, Wish, WishAnswer, address_key, service_key, wish_key
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


def test_show_tells_all_about_one_service(consul: ConsulUnderTest) -> None:
    shown = call("show", "web", "--consul", consul.address)
    assert (shown.exit_code, shown.output.splitlines()[0]) == (0, "web has 10.100.0.9 for tcp:80, epoch 4")
    told = json.loads(call("show", "web", "--json", "--consul", consul.address).output)
    assert (told["lease"]["ip"], list(told["addresses"]), told["wish"]) == (
        "10.100.0.9",
        ["10.100.0.9"],
        None,
    )
    rests = call("show", "old", "--consul", consul.address)
    assert (rests.exit_code, "10.100.0.10 rests since" in rests.output) == (0, True)
    nobody = call("show", "nobody", "--consul", consul.address)
    assert (nobody.exit_code, "neither a lease nor" in nobody.output) == (1, True)


def test_show_tells_of_a_wish(consul: ConsulUnderTest) -> None:
    key = wish_key(ServiceName("web"))
    try:
        put(consul, key, Wish("pin", "w1", asked_by="eve@host"))
        assert "wish of eve@host to pin it: waits for the keeper" in _show(consul)
        put(consul, key, Wish("move", "w1", answer=WishAnswer(False, "no", 1.0)))
        assert "wish of somebody to move it: answered: no" in _show(consul)
    finally:
        consul.request("DELETE", f"/v1/kv/{key}")


def _show(consul: ConsulUnderTest) -> str:
    return call("show", "web", "--consul", consul.address).output


@pytest.mark.parametrize("words", [("pin", "No_Name"), ("move", "web", "10.0.0"), ("show", "x.y")])
def test_what_is_no_name_or_address_is_wrong_usage(words: tuple[str, ...]) -> None:
    assert call(*words).exit_code == 2


def test_without_a_keeper_the_wish_is_withdrawn(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ztna.cli.leases, "ANSWER_SECONDS", 0.3)
    silent = call("pin", "web", "--consul", consul.address)
    assert silent.exit_code == 1
    assert "is a ztna-dnsd with dnsd.keeper running?" in silent.output
    assert consul.request("GET", "/v1/kv/ztna/vip/wish/web")[0] == 404


def test_a_wish_that_waits_is_replaced_only_with_force(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ztna.cli.leases, "ANSWER_SECONDS", 0.3)
    key = wish_key(ServiceName("web"))
    try:
        put(consul, key, Wish("pin", "w1"))
        waiting = call("unpin", "web", "--consul", consul.address)
        assert (waiting.exit_code, "replace it with --force" in waiting.output) == (1, True)
        assert "is withdrawn" in call("unpin", "web", "--force", "--consul", consul.address).output
        for over in (Wish("pin", "w1", answer=WishAnswer(True, "done", 1.0)), "nonsense"):
            put(consul, key, over)
            assert "is withdrawn" in call("unpin", "web", "--consul", consul.address).output
    finally:
        consul.request("DELETE", f"/v1/kv/{key}")


def test_watch_prints_what_is_there_and_each_change(consul: ConsulUnderTest) -> None:
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", "watch", "--consul", consul.address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:
            assert watching.stdout.readline() == "new web ip=10.100.0.9 ports=tcp:80 epoch=4\n"
            put(consul, service_key(ServiceName("web")), Lease(IP, 5, (Port("udp", 53),)))
            assert watching.stdout.readline() == "changed web ip=10.100.0.9 ports=udp:53 epoch=5\n"
            put(consul, service_key(ServiceName("web")), "?")
            assert watching.stdout.readline().startswith("changed web error=bad JSON")
            consul.request("DELETE", f"/v1/kv/{service_key(ServiceName('web'))}")
            assert watching.stdout.readline().startswith("gone web")
        finally:
            put(consul, service_key(ServiceName("web")), Lease(IP, 4, (Port("tcp", 80),)))
            watching.send_signal(signal.SIGINT)
        assert (watching.wait(10), watching.stderr and watching.stderr.read()) == (0, "")


def test_watch_as_json_and_without_consul(consul: ConsulUnderTest) -> None:
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", "watch", "--json", "--consul"]
    with subprocess.Popen([*argv, consul.address], stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        watching.terminate()
    assert (first["event"], first["service"], first["ip"]) == ("new", "web", "10.100.0.9")
    (nobody,) = free_ports(1)
    away = subprocess.run([*argv, f"http://127.0.0.1:{nobody}"], capture_output=True, text=True, timeout=60)
    assert (away.returncode, away.stderr.startswith("Error: ")) == (1, True)


class Status(BaseHTTPRequestHandler):
    """A relay's admin page."""

    def do_GET(self) -> None:
        told = [
            {
                "agent": "spiffe://example.org/laptop-1",
                "cidr": "10.100.0.0/16",
                "with": "route 10.0.0.0/8 (vpn0)",
            },
            {
                "agent": "laptop-2",
                "cidr": "10.100.0.0/16",
                "with": "route 10.100.3.0/24 (eth0)",
                "detail": "x",
            },
        ]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"conflicts": told, "connections": []}).encode())

    def log_message(self, *words: object) -> None:
        pass


def test_conflicts_are_merged_from_consul_and_relays(consul: ConsulUnderTest) -> None:
    assert call("conflicts", "--consul", consul.address).output == "no agent reports a conflict\n"
    mine = Report("10.100.0.0/16", "route 10.0.0.0/8 (vpn0)", "leases there: web", 5.0)
    put(consul, conflict_key("laptop-1"), mine)
    consul.request("PUT", "/v1/kv/ztna/conflict/odd", b"{}")
    with ThreadingHTTPServer(("127.0.0.1", 0), Status) as relay:
        threading.Thread(target=relay.serve_forever).start()
        at = f"127.0.0.1:{relay.server_port}"
        asked = ("conflicts", "--consul", consul.address, "--relay", at)
        try:
            found = json.loads(call(*asked, "--json").output)
            shown = call(*asked)
        finally:
            relay.shutdown()
            consul.request("DELETE", "/v1/kv/ztna/conflict/?recurse=1")
    assert [(each["agent"], each["by"]) for each in found] == [
        ("laptop-1", ["consul", at]),
        ("laptop-2", [at]),
        ("odd", ["consul"]),
    ]
    assert found[0]["detail"] == "leases there: web"
    assert (shown.exit_code, "vpn0" in shown.output, "unreadable" in shown.output) == (0, True, True)
    (nobody,) = free_ports(1)
    away = call("conflicts", "--consul", consul.address, "--relay", f"127.0.0.1:{nobody}")
    assert (away.exit_code, away.output.startswith("Error: relay at")) == (1, True)
