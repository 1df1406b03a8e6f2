"""Services that are removed: how long their flows may go on, and what happens when they come back."""

from __future__ import annotations

import asyncio

from sidecar.connector.departures import Departures
from sidecar.connector.routes import RouteTable
from ztna.config import Endpoint, RouteConfig
from ztna.names import ServiceName

WEB, DB, SLOW = ServiceName("web"), ServiceName("db"), ServiceName("slow")


def table(*services: ServiceName) -> RouteTable:
    drains = {SLOW: 3600.0}
    backend = Endpoint("127.0.0.1", 1)
    return RouteTable(
        [RouteConfig(service=each, port=80, backend=backend, drain_s=drains.get(each)) for each in services]
    )


async def test_who_goes_is_ended_after_its_time_unless_it_comes_back() -> None:
    ended: list[ServiceName] = []
    over = asyncio.Event()

    def end(service: ServiceName) -> None:
        ended.append(service)
        over.set()

    departures = Departures(0.01, end)
    departures.changed(table(WEB, DB, SLOW), table(WEB))
    departures.changed(table(WEB), table(WEB, SLOW))
    departures.changed(table(WEB, SLOW), table())
    departures.changed(table(), table(WEB))
    async with asyncio.timeout(5):
        await over.wait()
    assert ended == [DB], "web came back in time, and slow has an hour by its own route"
    departures.changed(table(WEB), table(WEB, DB, SLOW))
