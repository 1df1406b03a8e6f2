"""A backend that dies and comes back; a connector that is killed while another serves the same service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18080
FAILOVER_SECONDS = 5.0


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", "first", "second") as made:
        made.start_consul(request.param)
        made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),)).wait_ready()
        made.relay().wait_ready()
        yield made


def backend(made: Lab, host: str, label: str) -> Daemon:
    argv = ["-m", "tests.support.backends", "--http", str(BACKEND_PORT), "--label", label]
    return made.python(f"backend-{label}", made.host(host), *argv)  # type: ignore[return-value]


def connector(made: Lab, name: str, host: str) -> Daemon:
    route = tcp_route("web-app", Endpoint("127.0.0.1", BACKEND_PORT))
    return made.connector(name, [route], host=host).wait_ready()


def ask(made: Lab, address: str) -> str | None:
    """Return what web-app says to a new connection from the laptop; None when it is refused or cut."""
    try:
        return http_get(made.host("laptop"), f"http://{address}:8080/", seconds=3.0)[1]
    except OSError:
        return None


def test_a_backend_dies_and_all_of_it_comes_back_by_itself(made: Lab) -> None:
    core = made.host("core").address
    dying = backend(made, "first", "one")
    connector(made, "alpha", "first")
    made.agent("laptop", ["web-app"], host="laptop").wait_ready()
    address = made.address("web-app", "laptop", server=core)
    until("served", lambda: ask(made, address) == "hello from one\n")

    dying.stop()
    until("critical in Consul", lambda: made.check_states("web-app") == ["critical"])
    until("gone from SRV", lambda: made.dig("laptop", "web-app.ztna.local", "SRV", server=core) == [])
    assert made.dig("laptop", "web-app.ztna.local", server=core) == [address], "the name keeps its address"
    relay = next(daemon for daemon in made.running if daemon.name == "relay")
    assert isinstance(relay, Daemon)
    until(
        "sessions are refused with the reason",
        lambda: (
            ask(made, address) is None and relay.metric("ztna_refusals_total", reason="no_healthy_connector")
        ),
        seconds=30,
    )
    started = time.monotonic()
    assert ask(made, address) is None
    assert time.monotonic() - started < 3.0, "the program is told quickly"

    dying.start()
    until("passing in Consul", lambda: made.check_states("web-app") == ["passing"])
    until("in SRV again", lambda: made.dig("laptop", "web-app.ztna.local", "SRV", server=core))
    until("served again", lambda: ask(made, address) == "hello from one\n")
    assert made.address("web-app", "laptop", server=core) == address


def test_one_of_two_connectors_is_killed_and_new_flows_use_the_other(made: Lab) -> None:
    core = made.host("core").address
    serving: dict[str, Daemon] = {}
    for label, host in (("one", "first"), ("two", "second")):
        backend(made, host, label)
        serving[f"hello from {label}\n"] = connector(made, f"c-{label}", host)
    made.agent("laptop", ["web-app"], host="laptop").wait_ready()
    address = made.address("web-app", "laptop", server=core)
    until("both in SRV", lambda: len(made.dig("laptop", "web-app.ztna.local", "SRV", server=core)) == 2)
    first = until("served", lambda: ask(made, address))

    serving[first].kill()
    killed = time.monotonic()
    other = next(answer for answer in serving if answer != first)
    until("the other serves", lambda: ask(made, address) == other, seconds=FAILOVER_SECONDS)
    assert time.monotonic() - killed < FAILOVER_SECONDS
    assert [ask(made, address) for _ in range(5)] == [other] * 5
