"""A backend that dies and comes back; a connector that is killed while another serves the same service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, Running, http_get, lab, tcp_route, udp_ask, udp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT, UDP_PORT = 18080, 18007
FAILOVER_SECONDS = 5.0


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", "first", "second") as made:
        made.start_consul(request.param)
        made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        made.relay()
        yield made


def backend(made: Lab, host: str, label: str) -> Running:
    ports = ("--http", str(BACKEND_PORT), "--udp", str(UDP_PORT))
    argv = ("-m", "tests.support.backends", *ports, "--label", label)
    return made.python(f"backend-{label}", made.host(host), *argv)


def connector(made: Lab, name: str, host: str) -> Daemon:
    routes = [
        tcp_route("web-app", Endpoint("127.0.0.1", BACKEND_PORT)),
        udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
    ]
    return made.connector(name, routes, host=host).wait_ready()


def ask(made: Lab, address: str) -> str | None:
    """Return what web-app says to a new connection from the laptop; None when it is refused or cut."""
    try:
        return http_get(made.host("laptop"), f"http://{address}:8080/", seconds=3.0)[1]
    except OSError:
        return None


def echoed(made: Lab, address: str) -> bytes | None:
    """Return the label that a new UDP flow from the laptop is answered with; None when there is no answer."""
    answer = udp_ask(made.host("laptop"), address, 7, b" asks", seconds=0.5)
    return answer.removesuffix(b" asks") if answer else None


def knows_both(made: Lab, service: str) -> bool:
    """Whether the relay, which reads SRV again when its TTL of 5 s ends, has both connectors of a service."""
    relay = next(daemon for daemon in made.daemons if daemon.name == "relay")
    changes = [change for change in relay.events("srv_changed") if change["service"] == service]
    return bool(changes) and changes[-1]["connectors"] == "alpha,beta"


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
    backend(made, "first", "one")
    dying = connector(made, "alpha", "first")
    made.agent("laptop", ["web-app", "echo-service"], host="laptop").wait_ready()
    address, echo = (made.address(name, "laptop", server=core) for name in ("web-app", "echo-service"))
    until("served", lambda: ask(made, address) == "hello from one\n" and echoed(made, echo) == b"one")
    # Whatever the agent has by now is with the first; only then is there a second.
    backend(made, "second", "two")
    connector(made, "beta", "second")
    for name in ("web-app", "echo-service"):
        until(f"the relay knows both of {name}", lambda n=name: knows_both(made, n), 30)

    dying.kill()
    killed = time.monotonic()

    def switched(asking: Callable[[], object], wanted: object) -> float:
        until(f"{wanted!r} serves", lambda: asking() == wanted, every=0.01)
        return time.monotonic() - killed

    with ThreadPoolExecutor(2) as threads:
        tcp = threads.submit(switched, lambda: ask(made, address), "hello from two\n")
        udp = threads.submit(switched, lambda: echoed(made, echo), b"two")
        assert tcp.result() < FAILOVER_SECONDS
        assert udp.result() < FAILOVER_SECONDS
    assert [ask(made, address) for _ in range(5)] == ["hello from two\n"] * 5
    assert [echoed(made, echo) for _ in range(5)] == [b"two"] * 5


@pytest.fixture
def embedded(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """What Consul it is makes no difference to a flow."""
    note_version(request, "newest")
    with lab("core", "laptop", "first", "second") as made:
        made.start_consul("newest")
        made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        made.relay()
        yield made


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "forwarded"])
def test_a_flow_on_an_idle_carrier_to_a_host_that_vanished_begins_anew_elsewhere_in_time(
    embedded: Lab, direct: bool
) -> None:
    """Its OPEN is lost without a word; it is opened elsewhere once the relay says that the connector has gone."""
    made, core = embedded, embedded.host("core").address
    backend(made, "first", "one")
    connector(made, "alpha", "first")
    agent = made.agent("laptop", ["web-app"], host="laptop", direct=direct).wait_ready()
    address = made.address("web-app", "laptop", server=core)
    until("served", lambda: ask(made, address) == "hello from one\n")
    backend(made, "second", "two")
    connector(made, "beta", "second")
    until("the relay knows both", lambda: knows_both(made, "web-app"), 30)
    assert ask(made, address) == "hello from one\n", "by the carrier that is idle now"

    with made.host("first").dropping("ip saddr != 127.0.0.0/8"):
        began = time.monotonic()
        said = http_get(made.host("laptop"), f"http://{address}:8080/", seconds=2 * FAILOVER_SECONDS)[1]
        assert said == "hello from two\n"
        assert time.monotonic() - began < FAILOVER_SECONDS
        assert agent.events("open_lost"), "the idle carrier was tried"
