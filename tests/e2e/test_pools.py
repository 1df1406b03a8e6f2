"""A pool of two networks through a whole mesh, and addresses that move while programs talk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Lab, lab, udp_ask, udp_route, until
from ztna.config import Endpoint, PoolConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

SERVICES = ("echo-a", "echo-b", "echo-c")
MORE = IPv4Network("10.101.0.0/24")
BACKEND_PORT = 18007


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", pool="10.100.0.0/30") as made:
        made.start_consul(request.param)
        yield made


def leases(made: Lab, *words: str) -> tuple[int, dict[str, object]]:
    """Run `ztna leases` as an operator; return the exit status and what it says."""
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", *words, "--json"]
    done = made.host("core").try_run(*argv, "--config", str(made.operator_config()))
    return done.returncode, json.loads(done.stdout)


def test_the_second_network_serves_and_a_service_is_followed_to_its_new_address(made: Lab) -> None:
    laptop = made.host("laptop")
    made.python("backends", made.host("core"), "-m", "tests.support.backends", "--udp", str(BACKEND_PORT))
    dnsd = made.dnsd(
        listen=Endpoint("0.0.0.0", 5533),
        allow=(IPv4Network("0.0.0.0/0"),),
        pool=PoolConfig(cidr=made.pool, more=(MORE,)),
    )
    relay = made.relay()
    routes = [udp_route(name, Endpoint("127.0.0.1", BACKEND_PORT)) for name in SERVICES]
    connector = made.connector("alpha", routes)
    agent = made.agent("laptop", SERVICES, host="laptop", mode="anyip", more_pools=(MORE,))
    for daemon in (dnsd, relay, connector, agent):
        daemon.wait_ready()

    def vip(name: str) -> str:
        return made.address(name, "laptop", server=made.host("core").address)

    def answers(address: str) -> bool:
        return udp_ask(laptop, address, 7, b"hello") == b"hello"

    addresses = {name: vip(name) for name in SERVICES}
    (beyond,) = [name for name, address in addresses.items() if address.startswith("10.101.0.")]
    for address in addresses.values():
        until(f"{address} answers", lambda address=address: answers(address), 30)

    status, told = leases(made, "pin", "echo-a", "10.101.0.77")
    assert (status, told["ok"]) == (0, True), told
    until("the name has moved", lambda: vip("echo-a") == "10.101.0.77", 30)
    until("the new address answers", lambda: answers("10.101.0.77"), 30)
    taken = addresses["echo-b" if beyond != "echo-b" else "echo-c"]
    status, told = leases(made, "move", "echo-a", taken, "--force")
    assert (status, "is held by" in str(told["what"])) == (1, True)
    assert answers(taken)
    assert leases(made, "audit")[0] == 0
