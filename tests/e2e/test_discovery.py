"""Services that come and go while a real connector runs: by `ztna services`, by files, from Consul; on real Consuls."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.consul import KINDS, REAL_KINDS, note_version
from tests.support.dns_server import ZONE
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, until
from ztna.cli.admin import ask
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT, ECHO_PORT, SPARE_PORT, DNS_PORT = 18080, 18081, 18082, 18053
ECHO = Endpoint("127.0.0.1", ECHO_PORT)
SERVICES = ("shell", "web-app", "db")
ROUNDS = 100
DRAIN_SECONDS = 4.0
ZTNA = Path(sys.executable).with_name("ztna")


class Mesh:
    """A connector that fronts `shell` by its configuration, with all other ways open, and an agent."""

    def __init__(self, made: Lab, **keys: Any) -> None:
        self.lab = made
        self.core = made.host("core")
        self.routes = made.directory / "routes.d"
        self.routes.mkdir()
        self.socket, self.state = made.directory / "connector.sock", made.directory / "services.json"
        backends = ("--http", HTTP_PORT, "--tcp", ECHO_PORT)
        made.python("backends", self.core, "-m", "tests.support.backends", *map(str, backends))
        self.dnsd = made.dnsd()
        self.relay = made.relay()
        self.connector: Daemon = made.connector(
            "alpha",
            [tcp_route("shell", ECHO, 22)],
            grants=SERVICES,
            consul=made.consul_for("connector", SERVICES),
            routes_dir=str(self.routes),
            api=str(self.socket),
            api_state=str(self.state),
            consul_services=True,
            drain_s=DRAIN_SECONDS,
            **keys,
        )
        self.agent = made.agent("laptop", SERVICES, mode="listen")
        for daemon in (self.dnsd, self.relay, self.connector, self.agent):
            daemon.wait_ready()

    def ztna(self, *arguments: str) -> tuple[int, str]:
        argv = [str(ZTNA), "services", *arguments, "--api", str(self.socket)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def ask(self, method: str, service: str, body: object = None) -> dict[str, Any]:
        """Ask the API itself; ZtnaError when it refuses."""
        data = None if body is None else json.dumps(body).encode()
        return ask(str(self.socket), f"/v1/services/{service}", dict[str, Any], method=method, body=data)[1]

    def listed(self) -> dict[str, dict[str, Any]]:
        code, text = self.ztna("list", "--json")
        assert code in (0, 1), text
        return {each["service"]: each for each in json.loads(text)}

    def add(self, service: str, *more: str, backend: int = HTTP_PORT) -> None:
        code, said = self.ztna("add", service, "--port", "80", "--backend", f"127.0.0.1:{backend}", *more)
        assert code == 0, said

    def write(self, name: str, text: str) -> None:
        fresh = self.routes / f".{name}"
        fresh.write_text(text)
        fresh.replace(self.routes / name)

    def fetch(self, service: str) -> bool:
        """Get the page of a service by its name, through the mesh."""
        address = self.lab.dig("core", f"{service}.ztna.local")
        return bool(address) and http_get(self.core, f"http://{address[0]}:80/")[0] == 200

    def connect(self, service: str, port: int) -> socket.socket:
        address = self.lab.address(service)

        def dialled() -> socket.socket:
            flow = self.core.socket()
            flow.settimeout(30)
            try:
                flow.connect((address, port))
                says(flow, b"first")
            except OSError:
                flow.close()
                raise
            return flow

        found: socket.socket = until(f"a flow to {service}", dialled)
        return found

    def ids(self) -> set[str]:
        """The ids that the local Consul agent has."""
        return set(self.lab.consul_get("/v1/agent/services"))


def says(flow: socket.socket, data: bytes) -> None:
    flow.sendall(data)
    received = b""
    while len(received) < len(data):
        more = flow.recv(1000)
        if not more:
            raise OSError("closed")
        received += more
    assert received == data


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        yield Mesh(made)


@pytest.fixture(params=REAL_KINDS)
def real_mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        yield Mesh(made)


def test_a_service_is_added_reached_kept_over_a_restart_and_removed(mesh: Mesh) -> None:
    mesh.add("web-app")
    until("reached by name", lambda: mesh.fetch("web-app"))
    assert mesh.listed()["web-app"]["from"] == "api" and mesh.listed()["web-app"]["verdict"] == "passing"
    code, table = mesh.ztna("list")
    assert code == 0 and "web-app" in table and "tcp:80" in table and "config" in table

    mesh.connector.restart()
    mesh.connector.wait_ready()
    until("reached again", lambda: mesh.fetch("web-app"))

    code, said = mesh.ztna("remove", "shell")
    assert code == 1 and "shell comes from config: remove it there" in said
    assert mesh.ztna("remove", "web-app")[0] == 0
    until("gone from Consul", lambda: "web-app@alpha" not in mesh.ids())
    until("gone from DNS", lambda: not mesh.lab.dig("core", "web-app.ztna.local", "SRV"))
    assert mesh.ids() == {"shell@alpha"}
    code, said = mesh.ztna("add", "pay", "--port", "80", "--backend", "127.0.0.1:1")
    assert code == 1 and "pay needs connector.pay.ztna" in said
    assert mesh.connector.metric("ztna_refusals_total", where="connector_api", reason="no_grant") == 1


def test_a_program_says_how_it_is(mesh: Mesh) -> None:
    mesh.add("web-app", "--check", "ttl,ttl_s=3")
    until("critical until it speaks", lambda: mesh.lab.check_states("web-app") == ["critical"])
    for flag, state in (
        ("--pass", "passing"),
        ("--warn", "warning"),
        ("--fail", "critical"),
        ("--pass", "passing"),
    ):
        assert mesh.ztna("check", "web-app", flag, "--output", f"says {state}")[0] == 0
        until(state, lambda state=state: mesh.lab.check_states("web-app") == [state])
    until("critical by silence", lambda: mesh.lab.check_states("web-app") == ["critical"])
    assert "nothing was heard of the program for 3 s" in mesh.listed()["web-app"]["output"]
    code, said = mesh.ztna("check", "shell", "--pass")
    assert code == 1 and "no check of kind ttl" in said


def test_files_come_break_and_are_mended_and_their_conflicts_are_shown(mesh: Mesh) -> None:
    route = "{service: web-app, port: 80, backend: '127.0.0.1:%d'}"
    mesh.write("web.yaml", f"routes: [{route % HTTP_PORT}]")
    until("reached by name", lambda: mesh.fetch("web-app"))
    mesh.write("web.yaml", "routes: [")
    until("told", lambda: "routes web.yaml" in mesh.connector.get("/readyz")[1])
    assert mesh.fetch("web-app") and mesh.connector.metric("ztna_route_files_broken") == 1
    assert [each["file"] for each in mesh.connector.events("routes_broken")] == ["web.yaml"]
    mesh.add("web-app", backend=9)
    shown = mesh.listed()["web-app"]
    assert (shown["from"], shown["shadowed"]) == ("web.yaml", ["api"])
    assert "also defined by api, which does not count" in mesh.ztna("list")[1].replace("\n", " ") or (
        "also defined" in mesh.ztna("list")[1]
    )
    mesh.write(
        "web.yaml", f"routes: [{route % HTTP_PORT}, {{service: pay, port: 1, backend: '127.0.0.1:1'}}]"
    )
    mesh.connector.signal(signal.SIGHUP)
    until("mended", lambda: mesh.connector.metric("ztna_route_files_broken") == 0)
    until("the ungranted is told", lambda: mesh.listed().get("pay", {}).get("problem"))
    assert mesh.ztna("list")[0] == 1 and mesh.fetch("web-app")
    (mesh.routes / "web.yaml").unlink()
    until("the API's takes its place", lambda: mesh.listed()["web-app"]["from"] == "api")


def test_what_others_registered_is_fronted_and_never_touched(real_mesh: Mesh) -> None:
    mesh, own = real_mesh, {"shell@alpha"}
    definition = {
        "Name": "web-app",
        "ID": "_nomad-task-5a1-group-web-app-http",
        "Tags": ["ztna", "blue"],
        "Address": "127.0.0.1",
        "Port": HTTP_PORT,
        "Meta": {"ztna-ports": "tcp:80"},
        "Check": {"CheckID": "theirs", "TTL": "600s", "Status": "passing"},
    }
    mesh.lab.consul_put("/v1/agent/service/register", definition)
    until("reached by name", lambda: mesh.fetch("web-app"))
    assert mesh.ids() == own | {"web-app@alpha", definition["ID"]}
    assert mesh.listed()["web-app"]["from"] == "consul"
    theirs = mesh.lab.consul_get("/v1/agent/services")[definition["ID"]]
    assert theirs["Tags"] == ["ztna", "blue"] and theirs["Meta"] == {"ztna-ports": "tcp:80"}

    mesh.lab.consul_put("/v1/agent/check/fail/theirs")
    until("not fronted while Consul finds it critical", lambda: mesh.ids() == own | {definition["ID"]})
    assert mesh.listed()["web-app"]["problem"] == "no instance that Consul finds healthy"
    mesh.lab.consul_put("/v1/agent/check/pass/theirs")
    until("reached again", lambda: mesh.fetch("web-app"))

    mesh.connector.stop()
    until("only our own are gone", lambda: mesh.ids() == {definition["ID"]})
    assert mesh.lab.consul_get("/v1/agent/services")[definition["ID"]] == theirs
    mesh.connector.start()
    mesh.connector.wait_ready()
    until("reached after a restart", lambda: mesh.fetch("web-app"))
    mesh.connector.kill()
    mesh.connector.start()
    until("reached after a crash", lambda: mesh.fetch("web-app"))
    mesh.lab.consul_put(f"/v1/agent/service/deregister/{definition['ID']}")
    until("gone with theirs", lambda: mesh.ids() == own)


def test_a_flow_of_one_service_survives_a_hundred_changes_of_another(real_mesh: Mesh) -> None:
    mesh = real_mesh

    def registration() -> list[tuple[int, bool]]:
        found = mesh.lab.consul_get("/v1/catalog/service/shell")
        return [(each["ModifyIndex"], "virtual" in (each["ServiceTaggedAddresses"] or {})) for each in found]

    until("its registration is complete", lambda: [virtual for _, virtual in registration()] == [True])
    shell = registration()
    with mesh.connect("shell", 22) as flow:
        before = mesh.connector.status()["connector"]["sessions"]
        for number in range(ROUNDS):
            backend = f"127.0.0.1:{HTTP_PORT if number % 2 else ECHO_PORT}"
            assert mesh.ask("PUT", "web-app", {"routes": [{"port": 80, "backend": backend}]})["fronted"]
            says(flow, b"%d added" % number)
            assert mesh.ask("DELETE", "web-app") == {"removed": "web-app"}
            says(flow, b"%d removed" % number)
        assert mesh.connector.status()["connector"]["sessions"] == before
    mesh.add("web-app")
    until("the last one stands", lambda: mesh.fetch("web-app"))
    assert registration() == shell
    assert mesh.connector.status()["connector"]["tcp_flows"] <= 1


def test_flows_of_a_removed_service_drain_and_then_end(real_mesh: Mesh) -> None:
    mesh = real_mesh
    mesh.add("db", backend=ECHO_PORT)
    until("passing", lambda: mesh.listed()["db"].get("verdict") == "passing")
    with mesh.connect("db", 80) as flow, mesh.connect("shell", 22) as other:
        assert mesh.ztna("remove", "db")[0] == 0
        until("left Consul", lambda: "db@alpha" not in mesh.ids())
        says(flow, b"still here")
        with mesh.core.socket() as late:
            late.settimeout(30)
            with pytest.raises(OSError, match=r"."):
                late.connect((mesh.lab.address("db"), 80))
                says(late, b"too late")
        flow.settimeout(DRAIN_SECONDS + 30)
        with contextlib.suppress(ConnectionResetError):
            assert flow.recv(1) == b""
        until("ended", lambda: mesh.connector.status()["connector"]["tcp_flows"] == 1)
        says(other, b"not concerned")


def test_a_record_that_is_gone_gets_no_new_flow_and_those_it_has_go_on() -> None:
    with lab("core") as made:
        made.start_consul("newest")
        records, core = made.directory / "records.json", made.host("core")

        def serve(*backends: tuple[int, int, int]) -> None:
            fresh = records.with_suffix(".new")
            fresh.write_text(json.dumps({"shell": backends}))
            fresh.replace(records)

        serve((10, 1, ECHO_PORT), (20, 1, SPARE_PORT))
        made.python("dns", core, "-m", "tests.support.dns_server", str(DNS_PORT), str(records))
        made.python("spare", core, "-m", "tests.support.backends", "--tcp", str(SPARE_PORT))
        mesh = Mesh(made, srv_resolvers=(Endpoint("127.0.0.1", DNS_PORT),))
        mesh.write("db.yaml", f"routes: [{{service: db, port: 80, backend: 'srv://shell.{ZONE}'}}]")

        def flows() -> dict[str, int]:
            backends = mesh.listed().get("db", {}).get("backends", [])
            return {each["backend"].rpartition(":")[2]: each["flows"] for each in backends}

        until("fronted", lambda: flows() == {str(ECHO_PORT): 0, str(SPARE_PORT): 0})
        with mesh.connect("db", 80) as flow:
            assert flows() == {str(ECHO_PORT): 1, str(SPARE_PORT): 0}, "the lower priority"
            serve((20, 1, SPARE_PORT))
            until("the record is gone", lambda: set(flows()) == {str(SPARE_PORT)})
            with mesh.connect("db", 80) as later:
                assert flows() == {str(SPARE_PORT): 1}
                says(flow, b"still here")
                says(later, b"here too")
        serve()
        until("withdrawn", lambda: "has no SRV records" in str(mesh.listed()["db"]["problem"]))
        until("gone from Consul", lambda: mesh.ids() == {"shell@alpha"})
        serve((1, 1, ECHO_PORT))
        until("back", lambda: "db@alpha" in mesh.ids())


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_what_a_killed_connector_had_stays_in_consul_until_all_places_have_spoken(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """Only then it is known what of it is a zombie, and that is removed."""
    note_version(request, kind)
    with lab("core") as made:
        made.start_consul(kind)
        records = made.directory / "records.json"
        records.write_text(json.dumps({"shell": [(10, 1, ECHO_PORT)]}))
        argv = ("-m", "tests.support.dns_server", str(DNS_PORT), str(records))
        dns = made.python("dns", made.host("core"), *argv)
        mesh = Mesh(made, srv_resolvers=(Endpoint("127.0.0.1", DNS_PORT),))
        mesh.write("db.yaml", f"routes: [{{service: db, port: 80, backend: 'srv://shell.{ZONE}'}}]")
        mesh.write("web.yaml", f"routes: [{{service: web-app, port: 80, backend: '127.0.0.1:{HTTP_PORT}'}}]")
        everything = {"shell@alpha", "db@alpha", "web-app@alpha"}
        until("all are registered", lambda: mesh.ids() == everything)

        mesh.connector.kill()
        (mesh.routes / "web.yaml").unlink()
        dns.signal(signal.SIGSTOP)
        rounds = len(mesh.connector.events("registered"))
        mesh.connector.start()
        # A comparing removes first and registers then.
        until("it has compared", lambda: len(mesh.connector.events("registered")) > rounds)
        assert mesh.ids() == everything
        assert mesh.connector.status()["discovery"]["unheard"] == ["db"]
        dns.signal(signal.SIGCONT)

        def is_settled() -> bool:
            found = mesh.ids()
            assert {"shell@alpha", "db@alpha"} <= found, "never gone, not for a moment"
            return found == {"shell@alpha", "db@alpha"} and made.check_states("db") == ["passing"]

        until("the zombie is removed, what was waited for is not", is_settled)
        until("it has said so", lambda: mesh.connector.events("zombies_removed") != [])
        assert [each["ids"] for each in mesh.connector.events("zombies_removed")] == ["web-app@alpha"]
