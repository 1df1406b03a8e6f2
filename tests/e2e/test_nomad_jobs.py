"""The whole mesh as Nomad's jobs, on a real Nomad and Consul with three clients: nothing is lost while allocations come and go.

The tests are one story, in the order of this file: each goes on from where the one before left the cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.support.console import command
from tests.support.consul import note_version
from tests.support.lab import http_get, lab, until
from tests.support.namespaces import Host
from tests.support.nomad import METHOD, ROOT, NomadCluster, cluster
from ztna.config import ConsulConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

APP = ROOT / "tests" / "support" / "leaving_app.py"
POOL = "10.100.0.0/16"
WEB_PORT, PLAIN_PORT = 8080, 80
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
                self.failures.append(f"after {len(self.answers)} answers: {error!r}")
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
def mesh(nomad: NomadCluster) -> NomadCluster:
    """Relay, dnsd and agents as jobs."""
    made = nomad.lab
    nomad.keep("nomad/jobs/relay", made.certificate("edge-1", relay="edge-1"))
    nomad.keep("nomad/jobs/agent", made.certificate("agent", agent=["web-app", "plain-web"]))
    web = made.certificate("web", connector=["web-app"], connector_id="nomad")
    nomad.keep("nomad/jobs/web-app/web/connector", web)
    nomad.keep("nomad/jobs/connector", made.certificate("host", connector=["plain-web"], connector_id="host"))
    nomad.job("dnsd", command=command("ztna-dnsd"), node_class="edge", pool=POOL, login_method=METHOD)
    nomad.job("relay", command=command("ztna-relay"), node_class="edge")
    sidecar = {"command": command("ztna-sidecar"), "relay": f"{nomad.core.address}:4433"}
    nomad.job("agent", pool=POOL, **sidecar, login_method=METHOD)
    return nomad


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


def test_the_mesh_is_deployed_and_a_service_is_reached_by_name(
    mesh: NomadCluster, request: pytest.FixtureRequest
) -> None:
    note_version(request, "newest")
    began = time.monotonic()
    web_app(mesh)
    print("web", time.monotonic() - began)
    address = mesh.lab.address("web-app")
    (allocation,) = mesh.allocations("web-app")
    for host in mesh.names:
        at = mesh.lab.host(host)
        answer = until("served", lambda at=at: http_get(at, f"http://{address}:{WEB_PORT}/"), 30)
        assert answer == (200, f"hello from {allocation['ID']}\n")
