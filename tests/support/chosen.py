"""A backend that was chosen for the UDP flows of a test."""

from __future__ import annotations

from sidecar.connector.routes import Route, RouteTable
from ztna.config import Endpoint, RouteConfig
from ztna.names import ServiceName

SERVICE = ServiceName("dns")


class Chosen:
    """Counts what its flows say of it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.backend = Endpoint(*address)
        config = RouteConfig(service=SERVICE, backend=self.backend, port=53, protocol="udp")
        self.route: Route = RouteTable([config]).services[SERVICE].routes[0]
        self.successes = self.failures = self.releases = 0

    def succeeded(self) -> None:
        self.successes += 1

    def failed(self) -> None:
        self.failures += 1

    def release(self) -> None:
        self.releases += 1
