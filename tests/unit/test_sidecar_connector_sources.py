"""Which definition of a name counts, and what can be fronted."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

import pytest

from sidecar.connector import sources
from sidecar.connector.routes import RouteTable
from sidecar.connector.sources import (
    KEPT,
    NOTHING,
    Definition,
    Entry,
    Origin,
    Settled,
    chosen,
    definitions,
    settle,
)
from tests.support.identities import identity
from ztna.config import Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.names import ServiceName

WEB, DB = ServiceName("web"), ServiceName("db")
CONFIG, API, CONSUL = Origin("config"), Origin("api"), Origin("consul")
FINE: Callable[[RouteTable], None] = lambda table: None  # noqa: E731
ME = identity("c", connector=("web", "db"), id_name="c1")


def route(service: str = "web", port: int = 80, **more: Any) -> RouteConfig:
    return RouteConfig(service=ServiceName(service), port=port, backend=Endpoint("127.0.0.1", 1), **more)


def defined(origin: Origin, *routes: RouteConfig) -> tuple[Definition, ...]:
    return definitions(routes or (route(),), origin)


def test_routes_make_services() -> None:
    made = definitions([route(port=443), route("db"), route(port=80)], CONFIG)
    assert [(each.service, len(each.routes)) for each in made] == [(WEB, 2), (DB, 1)]


@pytest.mark.parametrize("turned", [False, True])
def test_files_count_before_the_api_and_that_before_consul(turned: bool) -> None:
    places = [CONFIG, Origin("file", "a.yaml"), Origin("file", "b.yaml"), API, CONSUL]
    for first in range(len(places)):
        found = [each for origin in places[first:] for each in defined(origin)]
        entry = chosen(reversed(found) if turned else found)[WEB]
        assert entry.definition.origin == places[first]
        assert entry.shadowed == tuple(places[first + 1 :])
    assert [str(each) for each in places] == ["config", "a.yaml", "b.yaml", "api", "consul"]


def test_what_cannot_be_used_has_a_problem_and_keeps_no_other_out() -> None:
    twice = defined(API, route("db"), route("db"))
    settled = settle(
        chosen((*defined(CONFIG), *twice, *defined(API, route("pay")), Definition(DB, CONSUL, ()))),
        ME,
        NOTHING,
        FINE,
    )
    assert set(settled.table.services) == {WEB}
    problems = {service: entry.problem for service, entry in settled.entries.items()}
    assert problems[WEB] is None
    assert "tcp port 80 is routed twice" in str(problems[DB])
    assert problems[ServiceName("pay")] == "pay needs connector.pay.ztna in connector.tls.certificate"
    assert settled.entries[DB].shadowed == (CONSUL,)


def test_a_place_can_say_itself_that_a_service_is_unusable() -> None:
    entry = chosen((Definition(WEB, CONSUL, (), "instances disagree"),))[WEB]
    assert entry == Entry(Definition(WEB, CONSUL, (), "instances disagree"), (), "instances disagree")
    settled = settle({WEB: entry}, ME, NOTHING, FINE)
    assert settled.entries[WEB].problem == "instances disagree" and not settled.table.services


def test_what_did_not_change_is_the_very_same_object() -> None:
    before = settle(chosen((*defined(CONFIG), *defined(CONFIG, route("db")))), ME, NOTHING, FINE)
    asks = route("db", virtual_ip=IPv4Address("10.0.0.1"))
    after = settle(chosen((*defined(API), *defined(CONFIG, asks))), ME, before, FINE).table
    assert after.services[WEB] is before.table.services[WEB]
    assert after.services[DB] is not before.table.services[DB]


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SERVICES_MAX", 1)
    settled = settle(chosen((*defined(CONFIG), *defined(API, route("db")))), ME, NOTHING, FINE)
    assert set(settled.table.services) == {WEB}
    assert settled.entries[DB].problem == "db: expected at most 1 services"


def test_what_this_host_lacks_is_a_problem_of_that_service_alone_and_asked_once() -> None:
    asked: list[str] = []

    def check(table: RouteTable) -> None:
        asked.extend(table.services)
        if DB in table.services:
            raise ConfigError("db: backend_tls.ca: /ca.pem: No such file or directory")

    entries = chosen((*defined(CONFIG), *defined(CONFIG, route("db"))))
    first = settle(entries, ME, NOTHING, check)
    assert set(first.table.services) == {WEB} and "No such file" in str(first.entries[DB].problem)
    settle(entries, ME, first, check)
    assert asked == ["web", "db", "db"]


LACKING = "web: backend_tls.ca: /ca.pem: No such file or directory"


def lacks(table: RouteTable) -> None:
    raise ConfigError(LACKING)


def in_use(settled: Settled) -> tuple[int | None, Origin | None]:
    """Return the port of what web has in use, and where it came from."""
    routes = settled.table.services.get(WEB)
    return (None if routes is None else routes.ports[0].port), settled.entries[WEB].used


def test_what_worked_stays_in_use_while_this_host_lacks_what_its_successor_needs() -> None:
    before = settle(chosen(defined(API)), ME, NOTHING, FINE)
    assert in_use(before) == (80, API) and not before.entries[WEB].is_kept
    edited = chosen(defined(API, route(port=443)))
    kept = settle(edited, ME, before, lacks)
    assert in_use(kept) == (80, API) and kept.table.services[WEB] is before.table.services[WEB]
    assert kept.entries[WEB].is_kept and kept.entries[WEB].problem == f"{LACKING}; {KEPT}"
    again = settle(edited, ME, kept, lacks)
    assert in_use(again) == (80, API) and again.entries == kept.entries, "however often it is looked at"
    assert in_use(settle(edited, ME, again, FINE)) == (443, API), "once it is there"


def test_what_stays_in_use_is_still_defined_where_it_came_from() -> None:
    before = settle(chosen(defined(API)), ME, NOTHING, FINE)
    both = settle(chosen((*defined(API), *defined(CONFIG, route(port=443)))), ME, before, lacks)
    assert in_use(both) == (80, API), "what would count cannot be used"
    assert in_use(settle(chosen(defined(CONFIG, route(port=443))), ME, both, lacks)) == (None, None)
    # And it goes with the grant, and comes from nowhere when nothing was in use.
    stranger = identity("c", connector=("db",), id_name="c1")
    assert in_use(settle(chosen(defined(API)), stranger, before, FINE)) == (None, None)
    assert in_use(settle(chosen(defined(API)), ME, NOTHING, lacks)) == (None, None)


def awaited(*definitions_: Definition) -> dict[ServiceName, Entry]:
    """Return the entries as they are before DNS has said where their backends are."""
    return {
        service: Entry(entry.definition, entry.shadowed, "srv://x: not asked yet", is_awaited=True)
        for service, entry in chosen(definitions_).items()
    }


def test_what_worked_stays_in_use_until_dns_has_said_a_first_word() -> None:
    before = settle(chosen(defined(API)), ME, NOTHING, FINE)
    kept = settle(awaited(*defined(API, route(port=443))), ME, before, FINE)
    assert in_use(kept) == (80, API) and kept.entries[WEB].problem == f"srv://x: not asked yet; {KEPT}"
    assert in_use(settle(awaited(*defined(API)), ME, NOTHING, FINE)) == (None, None)
    stranger = identity("c", connector=("db",), id_name="c1")
    assert in_use(settle(awaited(*defined(API)), stranger, kept, FINE)) == (None, None)
