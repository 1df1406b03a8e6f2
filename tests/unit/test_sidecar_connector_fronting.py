"""What a connector fronts, with real checks of real backends: the choice among them, and another table in its place."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

from sidecar.connector.fronting import Fronting
from sidecar.connector.health import CheckKey
from sidecar.connector.probes import Prober
from sidecar.connector.pushes import Pushes
from sidecar.connector.routes import Route, RouteTable
from ztna.config import BackendConfig, CheckConfig, Endpoint, RouteConfig
from ztna.names import ServiceName

WAIT_SECONDS = 15.0
WEB, DB = ServiceName("web"), ServiceName("db")
PROMPT = CheckConfig(interval_s=0.05, timeout_s=1.0, failures_before_critical=1)


class _Over(Exception):
    pass


async def until(what: str, found: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def listening() -> tuple[socket.socket, Endpoint]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, Endpoint(*sock.getsockname())


def table(*services: tuple[ServiceName, tuple[Endpoint, ...]], **keys: Any) -> RouteTable:
    return RouteTable(
        [
            RouteConfig(
                **{
                    "service": service,
                    "port": 80,
                    "backends": tuple(BackendConfig(address=each) for each in backends),
                    "checks": (PROMPT,),
                }
                | keys
            )
            for service, backends in services
        ]
    )


def only(fronting: Fronting, service: ServiceName) -> Route:
    (route,) = fronting.table.services[service].routes
    return route


@asynccontextmanager
async def fronting(made: RouteTable) -> AsyncIterator[tuple[Fronting, list[ServiceName]]]:
    changed: list[ServiceName] = []
    prober = Prober()
    try:
        async with asyncio.TaskGroup() as tasks:
            front = Fronting(made, prober, Pushes(), changed=changed.append, tasks=tasks)
            front.start()
            yield front, changed
            raise _Over
    except* _Over:
        pass
    finally:
        await prober.close()


async def test_a_backend_that_dies_is_told_of_where_another_is_better() -> None:
    one, at_one = listening()
    two, at_two = listening()
    lost: list[Endpoint] = []
    with closing(two):
        async with fronting(table((WEB, (at_one, at_two)))) as (front, changed):
            front.lost = lambda route, backend: lost.append(backend)
            await until("both pass", lambda: {each["verdict"] for each in front.status(WEB)} == {"passing"})
            assert front.is_available(WEB) and WEB in changed
            one.close()
            await until("one is lost", lambda: lost == [at_one])
            assert front.is_available(WEB), "another serves"
            chosen = {front.choose(only(front, WEB), "ann").backend for _ in range(4)}  # type: ignore[union-attr]
            assert chosen == {at_two}
            two.close()
            await until("none is left", lambda: not front.is_available(WEB))
            assert lost == [at_one], "there is nothing better to go to"


class Elsewhere:
    """Somebody who runs all checks."""

    def runs(self, service: ServiceName, key: CheckKey) -> bool:
        return True

    def why_not(self, service: ServiceName, key: CheckKey) -> str | None:
        return None


async def test_a_udp_backend_that_others_check_is_looked_up_all_the_same() -> None:
    """A UDP flow goes where the checks last found its backend: nothing else asks for its address."""
    at = Endpoint("localhost", 53)
    ttl, delegated = CheckConfig(kind="ttl"), CheckConfig(runner="consul", interval_s=0.05)
    made = table((WEB, (at,)), protocol="udp", checks=(ttl,))
    async with fronting(made) as (front, _):
        await until("found", lambda: front.address(at) == ("127.0.0.1", 53))
        assert not front.is_available(WEB), "its program has said nothing yet"
    made = table((WEB, (at,)), protocol="udp", checks=(delegated,))
    async with fronting(made) as (front, _):
        front.delegate = Elsewhere()
        await until("found", lambda: front.address(at) == ("127.0.0.1", 53))
        assert not front.is_available(WEB), "who checks has said nothing yet"


async def test_another_table_keeps_what_stays() -> None:
    one, at_one = listening()
    two, at_two = listening()
    with closing(one), closing(two):
        async with fronting(table((WEB, (at_one,)), (DB, (at_two,)))) as (front, changed):
            await until("both pass", lambda: front.is_available(WEB) and front.is_available(DB))
            claim = front.choose(only(front, WEB), "ann")
            assert claim is not None
            changed.clear()
            front.replace(table((WEB, (at_one, at_two)), balance="least_connections"))
            assert front.is_available(WEB) and not changed, "it was passing all the while"
            assert WEB in front and DB not in front and not front.is_available(DB)
            (first, second) = front.status(WEB)
            assert (first["verdict"], first["flows"], second["verdict"]) == ("passing", 1, "critical")
            await until("the new one passes", lambda: front.status(WEB)[1]["verdict"] == "passing")
            least = front.choose(only(front, WEB), "ann")
            assert least is not None and least.backend == at_two
            # A flow of a backend that is gone ends without a trace.
            front.replace(table((WEB, (at_two,))))
            claim.failed()
            claim.succeeded()
            claim.release()
            assert [each["flows"] for each in front.status(WEB)] == [1]


async def test_flows_count_through_the_removal_and_return_of_their_route() -> None:
    one, at_one = listening()
    with closing(one):
        async with fronting(table((WEB, (at_one,)))) as (front, _changed):
            route = only(front, WEB)
            old = front.choose(route, "ann")
            assert old is not None
            front.replace(table())
            assert front.choose(route, "bob") is None, "nothing is begun on a route that is gone"
            front.replace(table((WEB, (at_one,))))
            assert [each["flows"] for each in front.status(WEB)] == [1]
            new = front.choose(only(front, WEB), "bob")
            assert new is not None
            old.release()
            assert [each["flows"] for each in front.status(WEB)] == [1], "the new one runs"
            front.replace(table())
            new.release()
            front.replace(table((WEB, (at_one,))))
            assert [each["flows"] for each in front.status(WEB)] == [0]


async def test_one_backend_for_another_is_no_outage() -> None:
    one, at_one = listening()
    two, at_two = listening()
    with closing(one), closing(two):
        async with fronting(table((WEB, (at_one,)))) as (front, _changed):
            await until("it passes", lambda: front.is_available(WEB))
            front.replace(table((WEB, (at_two,))))
            assert front.is_available(WEB)
            assert front.choose(only(front, WEB), "ann").backend == at_two  # type: ignore[union-attr]
            await until("it is asked", lambda: front.status(WEB)[0]["verdict"] == "passing")
