"""SIGTERM at a connector with flows: no new session comes to it, and none that runs is cut before its time."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.consul import KINDS, REAL_KINDS, note_version
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT, ECHO_PORT = 18080, 18090
DRAIN_SECONDS = 25.0
GRACE_SECONDS = 1.0
"""After it the relay ends the sessions of a connector that left DNS, unless that drains."""
FOLLOW_SECONDS = 5.0


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        made.dnsd()
        made.relay(leave_grace_s=GRACE_SECONDS)
        yield made


def connector(made: Lab, name: str, link: int) -> Daemon:
    """A connector with backends of its own, which say whose they are."""
    http, echo = HTTP_PORT + link, ECHO_PORT + link
    argv = ("-m", "tests.support.backends", "--http", str(http), "--tcp", str(echo), "--label", name)
    made.python(f"backend-{name}", made.host("core"), *argv)
    routes = [
        tcp_route("web-app", Endpoint("127.0.0.1", http)),
        tcp_route("shell", Endpoint("127.0.0.1", echo), port=22),
    ]
    at = Endpoint(made.host("core").address, 4500 + link)
    return made.connector(name, routes, link=at, drain_s=DRAIN_SECONDS).wait_ready()


def relay_lists(made: Lab) -> str:
    """The connectors of web-app that the relay goes by now."""
    relay = next(each for each in made.daemons if each.name == "relay")
    return str(
        [each["connectors"] for each in relay.events("srv_changed") if each["service"] == "web-app"][-1]
    )


def echoes(flow: socket.socket, data: bytes) -> bool:
    flow.sendall(data)
    got = b""
    while len(got) < len(data):
        part = flow.recv(len(data) - len(got))
        assert part, "the flow was cut"
        got += part
    return got == data


def test_flows_go_on_and_new_ones_go_elsewhere_until_the_last_has_ended(made: Lab) -> None:
    core = made.host("core")
    alpha = connector(made, "alpha", 1)
    agent = made.agent("laptop-1", ["web-app", "shell"], direct=False).wait_ready()
    web, shell = made.address("web-app"), made.address("shell")
    until("served", lambda: http_get(core, f"http://{web}:8080/")[1] == "hello from alpha\n")
    with core.socket() as flow:
        flow.settimeout(10.0)
        flow.connect((shell, 22))
        assert echoes(flow, b"before")
        beta = connector(made, "beta", 2)
        until("both serve", lambda: len(made.dig("core", "web-app.ztna.local", "SRV")) == 2)

        until("the relay knows beta", lambda: relay_lists(made) == "alpha,beta", FOLLOW_SECONDS + 10)
        alpha.signal(signal.SIGTERM)
        moved_by = time.monotonic() + FOLLOW_SECONDS
        # Each is answered, by one or the other: one that was reset would raise.
        while (answer := http_get(core, f"http://{web}:8080/")[1]) != "hello from beta\n":
            assert answer == "hello from alpha\n" and time.monotonic() < moved_by
        until("gone from Consul", lambda: alpha.events("deregistered"))
        ids = set(made.consul_get("/v1/agent/services"))
        assert not [each for each in ids if each.endswith("@alpha")]
        until(
            "gone from DNS", lambda: len(made.dig("core", "web-app.ztna.local", "SRV")) == 1, FOLLOW_SECONDS
        )
        accepted = len(alpha.events("session_accepted"))

        until("the relay has noticed", lambda: relay_lists(made) == "beta", FOLLOW_SECONDS + 10)
        ends = time.monotonic() + 3 * GRACE_SECONDS
        while time.monotonic() < ends:  # that nothing happens can only be seen by waiting
            assert echoes(flow, b"still here")
            assert http_get(core, f"http://{web}:8080/")[1] == "hello from beta\n"
        assert alpha.alive
        assert len(alpha.events("session_accepted")) == accepted, "no new session came"
    until("it ends with its last flow", lambda: not alpha.alive, FOLLOW_SECONDS)
    assert alpha.process is not None and alpha.process.returncode == 0
    assert beta.alive and agent.alive
    assert alpha.events("drain_cut_short") == []


def test_no_new_flow_is_lost_on_a_session_that_was_only_just_opened(made: Lab) -> None:
    """A denial on a young session is about the flow alone, unless its connector leaves."""
    core = made.host("core")
    both = {name: connector(made, name, link) for link, name in enumerate(("alpha", "beta"), 1)}
    until("both serve", lambda: len(made.dig("core", "web-app.ztna.local", "SRV")) == 2)
    made.agent("laptop-1", ["web-app"], direct=False).wait_ready()
    url = f"http://{made.address('web-app')}:8080/"
    until("the relay lists both", lambda: relay_lists(made).count(",") == 1)
    serving = until("served", lambda: http_get(core, url)[1]).rpartition(" ")[2].strip()
    (other,) = both.keys() - {serving}
    with core.socket() as held:  # so that the connector lives on while it drains
        held.connect((made.address("web-app"), 8080))
        until("it is held", lambda: both[serving].status()["connector"]["tcp_flows"] == 1)
        both[serving].signal(signal.SIGTERM)
        until("draining", lambda: both[serving].events("stopping"))
        answers = [http_get(core, url) for _ in range(50)]
        assert answers[-1] == (200, f"hello from {other}\n")
        assert {code for code, _ in answers} == {200}
        assert both[serving].alive
    until("it ends with its last flow", lambda: not both[serving].alive, FOLLOW_SECONDS)


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_a_flow_that_does_not_end_is_cut_in_time(request: pytest.FixtureRequest, kind: str) -> None:
    note_version(request, kind)
    with lab("core") as made:
        made.start_consul(kind)
        made.dnsd()
        made.relay()
        core = made.host("core")
        argv = ("-m", "tests.support.backends", "--tcp", str(ECHO_PORT))
        made.python("backend", core, *argv)
        route = tcp_route("shell", Endpoint("127.0.0.1", ECHO_PORT), port=22)
        alpha = made.connector("alpha", [route], drain_s=1.0).wait_ready()
        made.agent("laptop-1", ["shell"]).wait_ready()
        shell = made.address("shell")
        with core.socket() as flow:
            flow.settimeout(10.0)
            until("connected", lambda: flow.connect((shell, 22)) is None)
            assert echoes(flow, b"hello")
            assert alpha.stop() == 0
            assert alpha.events("drain_cut_short")
            with pytest.raises(ConnectionResetError):
                assert flow.recv(1) != b""
