"""Connectors that leave: with SIGTERM, with -9, or with a backend that stays away until Consul reaps its service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, Running, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

UP_PORT, DOWN_PORT = 18080, 18090
TTL_SECONDS = 3.0
REAP_AFTER_SECONDS = 60.0
"""The least that Consul allows. It looks every 30 s for what to reap."""
REAPED_SECONDS = REAP_AFTER_SECONDS + 30.0 + TTL_SECONDS + 15.0
FLAP_SECONDS = 11.0
"""Two comparings of a connector with Consul, 5 s apart, and a bit."""


def backend(made: Lab, port: int) -> Running:
    argv = ("-m", "tests.support.backends", "--http", str(port))
    return made.python(f"backend-{port}", made.host("core"), *argv)


def connector(made: Lab, name: str, link: int, **services: int) -> Daemon:
    """A connector of services by name and the port of their backend; there is no relay and it needs none here."""
    routes = [tcp_route(service, Endpoint("127.0.0.1", port)) for service, port in services.items()]
    keys = {"ttl_s": TTL_SECONDS, "deregister_critical_after_s": REAP_AFTER_SECONDS}
    return made.connector(name, routes, link=Endpoint(made.host("core").address, link), **keys)


def instances(made: Lab) -> set[str]:
    """Return the ids of all services that Consul's agent has."""
    return set(made.consul_get("/v1/agent/services"))


def lease(made: Lab, service: str) -> object:
    return made.kv("ztna/vip/service/").get(f"ztna/vip/service/{service}")


def srv(made: Lab, service: str) -> list[str]:
    return made.dig("core", f"{service}.ztna.local", "SRV")


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_exit_deregisters_everything_at_once(request: pytest.FixtureRequest, kind: str) -> None:
    note_version(request, kind)
    with lab("core") as made:
        made.start_consul(kind)
        backend(made, UP_PORT)
        leaving = connector(made, "alpha", 4501, web=UP_PORT, wiki=UP_PORT, db=DOWN_PORT)
        staying = connector(made, "beta", 4502, web=UP_PORT)
        until("all pass that can", lambda: made.check_states("web") == ["passing", "passing"])
        until("the dead one too is known", lambda: made.check_states("db") == ["critical"])
        with made.registered("mail") as other:
            assert leaving.stop() == 0
            assert instances(made) == {"web@beta", f"{other}@elsewhere"}, "gone as soon as it has ended"
        assert made.check_states("web") == ["passing"]
        assert staying.alive


class Leavers:
    """Alpha, whose backend is well and which is killed with -9; beta, whose backend never came up."""

    def __init__(self, made: Lab, kind: str) -> None:
        self.lab = made
        made.start_consul(kind)
        self.dnsd = made.dnsd().wait_ready()
        backend(made, UP_PORT)
        self.alpha = connector(made, "alpha", 4501, web=UP_PORT)
        self.beta = connector(made, "beta", 4502, db=DOWN_PORT)
        until("alpha's passes", lambda: made.check_states("web") == ["passing"])
        until("beta's is critical", lambda: made.check_states("db") == ["critical"])
        self.leases = {
            service: until("a lease", lambda s=service: lease(made, s)) for service in ("web", "db")
        }
        self.address = made.address("web")
        until("alpha is in SRV", lambda: srv(made, "web"))
        assert srv(made, "db") == []

    def live_through_it(self) -> None:
        made = self.lab
        self.alpha.kill()
        killed = time.monotonic()
        until("critical by itself", lambda: made.check_states("web") == ["critical"], 2 * TTL_SECONDS + 5)
        until("gone from SRV", lambda: srv(made, "web") == [], 5)
        assert instances(made) >= {"web@alpha", "db@beta"}
        # Consul's clock, not ours: it reaps after a minute at the least.
        until("both are reaped", lambda: not instances(made) & {"web@alpha", "db@beta"}, REAPED_SECONDS, 0.2)
        assert time.monotonic() - killed >= REAP_AFTER_SECONDS
        self._leases_stay()
        self._critical_one_stays_away()
        self.alpha.start()
        backend(made, DOWN_PORT)
        for service in ("web", "db"):
            until(f"{service} passes", lambda s=service: made.check_states(s) == ["passing"])
            until(f"{service} is in SRV", lambda s=service: srv(made, s))
        self._leases_stay()
        assert len(self.beta.events("registered")) == self.registrations + 1

    def _critical_one_stays_away(self) -> None:
        """Beta lives and sees that its service is gone; it must not make it flap."""
        until(
            "beta noticed", lambda: self.beta.status()["connector"]["services"]["db"]["waiting_for_backend"]
        )
        self.registrations = len(self.beta.events("registered"))
        ends = time.monotonic() + FLAP_SECONDS
        while time.monotonic() < ends:
            assert "db@beta" not in instances(self.lab)
            time.sleep(0.5)  # that something does not happen can only be seen by waiting
        assert len(self.beta.events("registered")) == self.registrations
        assert self.beta.events("consul_failed") == [], "to have been reaped is no failure of Consul"

    def _leases_stay(self) -> None:
        assert {service: lease(self.lab, service) for service in self.leases} == self.leases
        assert self.lab.dig("core", "web.ztna.local") == [self.address]


@pytest.fixture
def leavers(request: pytest.FixtureRequest) -> Iterator[list[Leavers]]:
    """One lab for each kind of Consul: what takes Consul a minute and a half, they do at the same time."""
    with contextlib.ExitStack() as labs:
        made = []
        for kind in KINDS:
            made.append(Leavers(labs.enter_context(lab("core")), kind))
            note_version(request, kind)
        yield made


def test_a_crashed_one_is_reaped_and_a_reaped_one_returns_only_with_its_backend(
    leavers: list[Leavers],
) -> None:
    with ThreadPoolExecutor(len(leavers)) as threads:
        for done in [threads.submit(each.live_through_it) for each in leavers]:
            done.result()
