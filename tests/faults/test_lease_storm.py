"""Five hundred services at once, three dnsd's, the keeper killed halfway and the next one paused."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, lab, until
from ztna.config import CheckConfig, Endpoint, PoolConfig, RouteConfig
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

CONNECTORS, SERVICES = 8, 500
KEEPER_CHANGE_SECONDS = 45.0
"""Consul may keep a dead session for twice its TTL of 10 s, then a lock delay passes."""


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        yield made


def three_dnsds(made: Lab, **keys: object) -> list[Daemon]:
    ports = (5533, 5534, 5535)
    return [made.dnsd(f"dnsd{port}", listen=Endpoint("127.0.0.1", port), **keys) for port in ports]


def keeper(dnsds: list[Daemon]) -> Daemon | None:
    """Return the one that says it keeps the leases."""
    keeping = [daemon for daemon in dnsds if daemon.alive and daemon.status()["keeper"]["elected"]]
    return keeping[0] if len(keeping) == 1 else None


def leases(made: Lab) -> dict[str, dict[str, object]]:
    prefix = "ztna/vip/service/"
    return {key.removeprefix(prefix): value for key, value in made.kv(prefix).items()}


def holdings(made: Lab) -> dict[str, dict[str, object]]:
    prefix = "ztna/vip/ip/"
    return {key.removeprefix(prefix): value for key, value in made.kv(prefix).items()}


def audit(made: Lab) -> None:
    """Prove the table twice: by `ztna leases audit` and by reading it here."""
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", "audit", "--json"]
    done = made.host("core").try_run(*argv, "--config", str(made.operator_config()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
    by_service, by_address = leases(made), holdings(made)
    addresses = [str(lease["ip"]) for lease in by_service.values()]
    assert len(set(addresses)) == len(addresses), "an address was given twice"
    for service, lease in by_service.items():
        assert by_address[str(lease["ip"])]["service"] == service
        assert IPv4Address(str(lease["ip"])) in made.pool
    held = [holding["service"] for holding in by_address.values() if holding["state"] == "leased"]
    assert sorted(map(str, held)) == sorted(by_service)


def route(name: str, port: int = 8080) -> RouteConfig:
    unchecked = CheckConfig(kind="none")
    backend = Endpoint("127.0.0.1", 9)
    return RouteConfig(service=ServiceName(name), backend=backend, port=port, checks=(unchecked,))


def test_five_hundred_at_once_with_the_keeper_killed_and_the_next_paused(made: Lab) -> None:
    dnsds = three_dnsds(made)
    for daemon in dnsds:
        daemon.wait_ready()
    first = until("a keeper", lambda: keeper(dnsds))
    names = [f"service-{number:03}" for number in range(SERVICES)]
    for number in range(CONNECTORS):
        routes = [route(name) for name in names[number::CONNECTORS]]
        made.connector(f"c{number}", routes, link=Endpoint(made.host("core").address, 4500 + number))

    until("some are leased", lambda: len(leases(made)) >= 10, 60, every=0.01)
    first.kill()
    assert len(leases(made)) < SERVICES, "it was to be killed halfway"
    survivors = [daemon for daemon in dnsds if daemon is not first]
    second = until("the next keeper", lambda: keeper(survivors), KEEPER_CHANGE_SECONDS)
    until("every service is leased", lambda: len(leases(made)) == SERVICES, 120)
    audit(made)

    # Paused past its session, with work arriving meanwhile, then continued: it must change nothing.
    second.signal(signal.SIGSTOP)
    with made.registered("late"):
        third = [daemon for daemon in survivors if daemon is not second]
        until("the third keeper", lambda: keeper(third), KEEPER_CHANGE_SECONDS)
        until("the late one is leased", lambda: "late" in leases(made), 30)
        table = leases(made)
        second.signal(signal.SIGCONT)
        until("the paused one knows", lambda: second.status()["keeper"]["elected"] is False, 30)
        assert leases(made) == table
        audit(made)


def test_an_address_goes_back_to_its_owner_and_to_nobody_else(made: Lab) -> None:
    # Six usable addresses, so that whoever comes is tempted by the freed one.
    keys = {
        "pool": PoolConfig(cidr=IPv4Network("127.100.0.0/29")),
        "grace_s": 1.0,
        "quarantine_s": 3600.0,
    }
    dnsd = made.dnsd(**keys).wait_ready()
    names = [f"service-{number}" for number in range(5)]
    at = made.host("core").address
    stays = made.connector("stays", [route(name) for name in names[1:]], link=Endpoint(at, 4501))
    leaves = made.connector("leaves", [route(names[0])], link=Endpoint(at, 4502))
    until("all are leased", lambda: len(leases(made)) == 5, 30)
    was = leases(made)[names[0]]

    leaves.stop()
    until("quarantined", lambda: holdings(made)[str(was["ip"])]["state"] == "quarantined", 30)
    with made.registered("newcomer"), made.registered("one-too-many"):
        until("one newcomer is leased", lambda: leases(made).keys() & {"newcomer", "one-too-many"}, 30)
        without = until("the other is named", lambda: dnsd.events("pool_exhausted"), 30)
        assert without[0]["service"] in {"newcomer", "one-too-many"}
        assert str(was["ip"]) not in {
            str(leases(made)[name]["ip"]) for name in leases(made) if name != names[0]
        }
        leaves.start()
        back = until("leased again", lambda: leases(made).get(names[0]), 30)
        assert back["ip"] == was["ip"]
        assert int(str(back["epoch"])) > int(str(was["epoch"]))
    assert stays.alive
