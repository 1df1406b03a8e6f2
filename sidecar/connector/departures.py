"""Services that were removed while they had flows: these may end by themselves for a while, then they are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sidecar.connector.routes import RouteTable, ServiceRoutes
from ztna.names import ServiceName
from ztna.telemetry import logger

_log = logger(__name__)


class Departures:
    """`end(service)` is called when the time of a service that did not come back is over."""

    def __init__(self, drain_s: float, end: Callable[[ServiceName], None]) -> None:
        self._drain_s = drain_s
        self._end = end
        self._leaving: dict[ServiceName, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def changed(self, before: RouteTable, after: RouteTable) -> None:
        """See who goes, for how long as its routes say, and who is back."""
        for service in self._leaving.keys() & after.services.keys():
            self._leaving.pop(service).cancel()
        for service in before.services.keys() - after.services.keys():
            seconds = self._seconds(before.services[service])
            self._leaving[service] = self._loop.call_later(seconds, self._over, service)
            _log.info("service_leaves", service=service, seconds=seconds)

    def _seconds(self, routes: ServiceRoutes) -> float:
        return self._drain_s if routes.drain_s is None else routes.drain_s

    def _over(self, service: ServiceName) -> None:
        del self._leaving[service]
        self._end(service)
