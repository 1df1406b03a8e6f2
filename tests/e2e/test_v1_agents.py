"""Two `ztna-v1` agents on hosts of their own, with one inner address and port, at a service behind real daemons."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from tests.support.consul import note_version
from tests.support.lab import Lab, lab, udp_route, until
from ztna.config import Endpoint, TlsConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.real_consul]

DATAGRAMS = 1000
BACKEND_PORT = 18007
ASKING_SECONDS = 120.0


def _start(made: Lab, name: str, tls: TlsConfig) -> subprocess.Popen[str]:
    argv = [
        *made.host(name).prefix, sys.executable, "-m", "tests.support.v1_agent", made.host("core").address,
        "4433", tls.certificate, tls.key, "echo-service", name, str(DATAGRAMS),
    ]  # fmt: skip
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_thousand_datagrams_each_and_none_crosses(request: pytest.FixtureRequest) -> None:
    note_version(request, "newest")
    with lab("core", "left", "right") as made:
        made.start_consul("newest")
        made.python("backend", made.host("core"), "-m", "tests.support.backends", "--udp", str(BACKEND_PORT))
        made.dnsd().wait_ready()
        relay = made.relay()
        relay.wait_ready()
        route = msgspec.structs.replace(
            udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT), port=7007), allow_v1=True
        )
        made.connector("alpha", [route]).wait_ready()
        until(
            "DNS names the connector", lambda: relay.status()["srv"]["services"]["echo-service"]["connectors"]
        )
        askers = {
            name: _start(made, name, made.certificate(name, agent=["echo-service"]))
            for name in ("left", "right")
        }
        try:
            for name, asker in askers.items():
                out, errors = asker.communicate(timeout=ASKING_SECONDS)
                assert asker.returncode == 0, errors
                answers = [line.split("\t") for line in out.splitlines()]
                assert {question for question, _ in answers} == {f"{name} {n}" for n in range(DATAGRAMS)}
                assert all(answer.endswith(question) for question, answer in answers)
        finally:
            for asker in askers.values():
                asker.kill()
                asker.wait()
