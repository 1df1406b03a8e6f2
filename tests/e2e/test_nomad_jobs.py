"""The whole mesh as jobs of a real Nomad, with a real Consul and three clients: nothing is lost while allocations move.

The tests are one story, in the order of this file: each goes on from where the one before left the cluster.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.console import command
from tests.support.consul import note_version
from tests.support.lab import http_get, lab, until
from tests.support.namespaces import Host
from tests.support.nomad import METHOD, ROOT, NomadCluster, cluster

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

APP = ROOT / "tests" / "support" / "leaving_app.py"
POOL = "10.100.0.0/16"
WEB_PORT, PLAIN_PORT = 8080, 80
GRACE_SECONDS = 20
"""How long leases stay here when their service is gone; more than any test lets it be."""
EVERY_SECONDS = 0.1
"""How often the load asks: ten requests a second."""


@dataclass
class Load:
    """Requests without a break from a host, and what became of them."""

    host: Host
    url: str
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="load")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._ending.wait(EVERY_SECONDS):
            try:
                code, text = http_get(self.host, self.url)
            except OSError as error:
                self.failures.append(
                    f"{time.strftime('%H:%M:%S')}, after {len(self.answers)} answers: {error!r}"
                )
            else:
                (self.answers if code == 200 else self.failures).append(text.strip())

    def serves(self) -> str:
        """Return whose answer came last."""
        return self.answers[-1].rpartition(" ")[2]


@dataclass
class Held:
    """One TCP flow that is used all the time until its application says that it leaves, or we are told to let go."""

    host: Host
    address: str
    allocation: str = ""
    echoed: int = 0
    ended: str = ""

    def __enter__(self) -> Held:
        self._socket = self.host.socket()
        self._socket.settimeout(10.0)
        self._socket.connect((self.address, WEB_PORT))
        self._socket.sendall(b"GET /held HTTP/1.0\r\n\r\n")
        self._lines = self._socket.makefile("rb")
        while (line := self._lines.readline()).strip():
            assert line, "no answer"
        self.allocation = self._lines.readline().decode().rpartition(" ")[2].strip()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._use, name="held flow")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()

    def _use(self) -> None:
        try:
            while not self._ending.wait(EVERY_SECONDS):
                asked = b"%d\n" % self.echoed
                self._socket.sendall(asked)
                if (line := self._lines.readline()) != asked:
                    assert line == b"leaving\n", f"{line!r} for {asked!r}"
                    assert self._lines.readline() == asked, (
                        "what crossed the word of leaving is answered, too"
                    )
                    self.ended = "told"
                    self._socket.shutdown(socket.SHUT_RDWR)
                    return
                self.echoed += 1
            self.ended = "let go"
        except (OSError, AssertionError) as error:
            self.ended = repr(error)


@pytest.fixture(scope="module")
def nomad() -> Iterator[NomadCluster]:
    with lab("core", "n1", "n2") as made, cluster(made, "core", "n1", "n2", login=True) as nomad:
        nomad.trust({"web-app": ["web-app"], "connector": ["plain-web"]})
        yield nomad


@pytest.fixture(scope="module")
def mesh(nomad: NomadCluster, untouched: dict[str, str]) -> NomadCluster:
    """Relay, dnsd and agents as jobs."""
    made = nomad.lab
    nomad.keep("nomad/jobs/relay", made.certificate("edge-1", relay="edge-1"))
    nomad.keep("nomad/jobs/agent", made.certificate("agent", agent=["web-app", "plain-web"]))
    web = made.certificate("web", connector=["web-app"], connector_id="nomad")
    nomad.keep("nomad/jobs/web-app/web/connector", web)
    nomad.keep("nomad/jobs/connector", made.certificate("host", connector=["plain-web"], connector_id="host"))
    nomad.job(
        "dnsd",
        command=command("ztna-dnsd"),
        node_class="edge",
        pool=POOL,
        grace_s=GRACE_SECONDS,
        login_method=METHOD,
    )
    nomad.job("relay", command=command("ztna-relay"), node_class="edge")
    sidecar = {"command": command("ztna-sidecar"), "relay": f"{nomad.core.address}:4433"}
    nomad.job("agent", pool=POOL, **sidecar, login_method=METHOD)
    return nomad


@pytest.fixture(scope="module")
def untouched(nomad: NomadCluster) -> dict[str, str]:
    """The addresses, routes and rules of each host before anything of ours ran."""
    return network_state(nomad)


def network_state(nomad: NomadCluster) -> dict[str, str]:
    asked = (
        ("ip", "address"),
        ("ip", "rule"),
        ("ip", "route", "show", "table", "all"),
        ("nft", "list", "ruleset"),
    )
    return {name: "".join(nomad.lab.host(name).run(*each) for each in asked) for name in nomad.names}


def web_app(nomad: NomadCluster, **variables: object) -> None:
    nomad.job(
        "web-app",
        command=command("ztna-sidecar"),
        app_command=sys.executable,
        app_args=[str(APP), "$${NOMAD_PORT_http}", "$${NOMAD_ALLOC_ID}"],
        node_class="apps",
        relay=f"{nomad.core.address}:4433",
        login_method=METHOD,
        **variables,
    )


def running(nomad: NomadCluster) -> set[str]:
    return {each["ID"] for each in nomad.allocations("web-app")}


def served_by(nomad: NomadCluster, count: int) -> None:
    """Wait until so many allocations run and as many connectors stand in DNS, and none besides; and the relay knows."""
    until(f"{count} run", lambda: len(running(nomad)) == count, 60)
    until(f"{count} in DNS", lambda: len(nomad.lab.dig("core", "web-app.ztna.local", "SRV")) == count, 30)
    until(f"{count} at the relay", lambda: routed(nomad) == count, 30)


def routed(nomad: NomadCluster) -> int:
    """How many connectors of web-app the relay may send agents to."""
    (found,) = nomad.lab.consul_get("/v1/catalog/service/ztna-relay")
    code, text = http_get(nomad.core, f"http://127.0.0.1:{found['ServicePort']}/status")
    assert code == 200
    return len(json.loads(text)["srv"]["services"]["web-app"]["connectors"])


def connectors(nomad: NomadCluster) -> list[str]:
    """The ids of our instances in the catalog."""
    found = nomad.lab.consul_get("/v1/catalog/service/web-app")
    return sorted(each["ServiceID"] for each in found if not each["ServiceID"].startswith("_nomad-"))


def leases(nomad: NomadCluster) -> dict[str, str]:
    """The state of each service's address."""
    return {each["service"]: each["state"] for each in nomad.lab.kv("ztna/vip/ip/").values()}


def certificate_of_connector(nomad: NomadCluster) -> dict[str, object]:
    """What the connector of the only allocation says of its certificate."""
    (ready,) = nomad.lab.consul_get("/v1/catalog/service/web-app-connector")
    (code, text) = http_get(nomad.lab.host(ready["Node"]), f"http://127.0.0.1:{ready['ServicePort']}/status")
    found: dict[str, object] = json.loads(text)["certificate"]
    assert code == 200
    return found


@dataclass(frozen=True)
class Traffic:
    """All that must not notice."""

    nomad: NomadCluster
    load: Load
    held: Held

    def nothing_failed(self) -> None:
        assert self.load.failures == [], self.nomad.logs()

    def unharmed(self, *, old: set[str]) -> None:
        """Fail when a request failed, or the flow that an old allocation held did not last until that let it go."""
        self.nothing_failed()
        assert self.held.allocation in old
        until("the flow was let go by its application", lambda: self.held.ended, 30)
        assert self.held.ended == "told", self.nomad.logs()
        until("asked on", lambda: self.load.serves() not in old)
        self.nothing_failed()


@contextlib.contextmanager
def traffic(nomad: NomadCluster) -> Iterator[Traffic]:
    """Requests and a held flow by the agent of the first host."""
    address = nomad.lab.address("web-app")
    with (
        Load(nomad.core, f"http://{address}:{WEB_PORT}/") as load,
        Held(nomad.core, address) as held,
    ):
        until("answered", lambda: load.answers and held.echoed)
        yield Traffic(nomad, load, held)


def test_the_mesh_is_deployed_and_a_service_is_reached_by_name(
    mesh: NomadCluster, request: pytest.FixtureRequest
) -> None:
    note_version(request, "newest")
    web_app(mesh)
    address = mesh.lab.address("web-app")
    (allocation,) = running(mesh)
    for host in map(mesh.lab.host, mesh.names):
        answer = until("served", functools.partial(http_get, host, f"http://{address}:{WEB_PORT}/"), 30)
        assert answer == (200, f"hello from {allocation}\n")
    assert connectors(mesh) == [f"web-app@nomad--{allocation[:8]}"]


def test_a_rolling_update_of_three_fails_no_request(mesh: NomadCluster) -> None:
    mesh.run("job", "scale", "web-app", "3")
    served_by(mesh, 3)
    old = running(mesh)
    with traffic(mesh) as seen:
        web_app(mesh, count=3, release="2")
        seen.unharmed(old=old)
    served_by(mesh, 3)
    assert not running(mesh) & old


def test_a_drain_of_the_node_that_serves_fails_no_request(mesh: NomadCluster) -> None:
    before = mesh.lab.address("web-app")
    with traffic(mesh) as seen:
        (serving,) = [each for each in mesh.allocations("web-app") if each["ID"] == seen.held.allocation]
        node = serving["NodeID"]
        old = {each["ID"] for each in mesh.allocations("web-app") if each["NodeID"] == node}
        mesh.run("node", "drain", "-enable", "-yes", "-deadline", "2m", node)
        seen.unharmed(old=old)
    mesh.run("node", "drain", "-disable", "-yes", node)
    served_by(mesh, 3)
    assert not running(mesh) & old
    assert mesh.lab.address("web-app") == before


def test_scaling_down_to_one_fails_no_request(mesh: NomadCluster) -> None:
    with traffic(mesh) as seen:
        mesh.run("job", "scale", "web-app", "1")
        served_by(mesh, 1)
        seen.nothing_failed()
        assert seen.held.ended == ("" if seen.held.allocation in running(mesh) else "told")


def test_an_allocation_that_is_killed_serves_again_and_leaves_nothing_twice(mesh: NomadCluster) -> None:
    address = mesh.lab.address("web-app")
    (allocation,) = running(mesh)
    wanted = f"NOMAD_ALLOC_ID={allocation}".encode()
    killed = [pid for pid in mesh.tasks() if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert len(killed) >= 2
    # Those that were scaled away may still drain; each job's tasks have one token each, and nobody else has any.
    wanted_logins = sorted(["agent"] * len(mesh.names) + ["dnsd", "web-app"])
    until("only who runs is logged in", lambda: sorted(mesh.logins().values()) == wanted_logins, 60)
    (mesh.abandoned,) = (token for token, job in mesh.logins().items() if job == "web-app")
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    until(
        "others run in their place",
        lambda: not set(killed) & mesh.tasks() and mesh.allocations("web-app"),
        60,
    )
    until("served", lambda: http_get(mesh.core, f"http://{address}:{WEB_PORT}/")[0] == 200, 60)
    served_by(mesh, 1)
    until("one instance", lambda: len(connectors(mesh)) == 1, 30)


def test_a_flow_that_runs_outlives_a_new_certificate_and_restarts_of_nomad_and_consul(
    mesh: NomadCluster,
) -> None:
    with traffic(mesh) as seen:
        renewed = mesh.lab.certificate("renewed", connector=["web-app"], connector_id="nomad")
        mesh.keep("nomad/jobs/web-app/web/connector", renewed)
        until("taken up", lambda: certificate_of_connector(mesh)["name"] == "spiffe://ztna/renewed", 30)
        seen.nothing_failed()
        for each in (*mesh.consuls.values(), *mesh.agents.values()):
            each.restart()
        until("every client is ready", mesh.ready, 60)
        served_by(mesh, 1)
        answers, echoed = len(seen.load.answers), seen.held.echoed
        until("asked on", lambda: len(seen.load.answers) > answers + 10, 30)
        until("used on", lambda: seen.held.echoed > echoed)
        assert seen.held.ended == ""


def test_a_service_with_nothing_but_the_tag_is_fronted_by_the_connector_of_its_host(
    mesh: NomadCluster,
) -> None:
    mesh.purge("web-app")
    sidecar = {"command": command("ztna-sidecar"), "relay": f"{mesh.core.address}:4433"}
    mesh.job("connector", node_class="apps", login_method=METHOD, **sidecar)
    mesh.job("plain", node_class="apps", command=sys.executable)
    address = mesh.lab.address("plain-web", seconds=60)
    answer = until("served by name", lambda: http_get(mesh.core, f"http://{address}:{PLAIN_PORT}/"), 60)
    assert answer[0] == 200 and "Directory listing" in answer[1]
    assert connectors(mesh) == []
    until(
        "only the address of the job that was purged rests",
        lambda: leases(mesh) == {"web-app": "quarantined", "plain-web": "leased"},
        60,
    )
    assert set(mesh.lab.kv("ztna/vip/service/")) == {"ztna/vip/service/plain-web"}


def test_stopped_jobs_leave_nothing(mesh: NomadCluster, untouched: dict[str, str]) -> None:
    made = mesh.lab
    mesh.purge("plain-web", "connector", "agent", "relay", "dnsd")
    until("no task is left", lambda: not mesh.tasks(), 60)
    until(
        "no service",
        lambda: set(made.consul_get("/v1/catalog/services")) <= {"consul", "nomad", "nomad-client"},
    )
    checks = made.consul_get("/v1/health/state/any")
    assert {each["ServiceName"] for each in checks} <= {"", "consul", "nomad", "nomad-client"}
    left = mesh.logins()
    assert set(left) <= {mesh.abandoned}, f"but that of the connector that was killed: {left}"
    assert network_state(mesh) == untouched
