"""TLS contexts for connections to backends, as routes come and go; real connections are in tests/e2e."""

from __future__ import annotations

from sidecar.connector.backend_tls import BackendTls
from sidecar.connector.routes import RouteTable
from ztna.config import BackendTlsConfig, RouteConfig
from ztna.names import ServiceName
from ztna.sections import Backend

WEB, DB = BackendTlsConfig(name="web.internal"), BackendTlsConfig(name="db.internal")


def table(*configs: BackendTlsConfig) -> RouteTable:
    routes = [
        RouteConfig(
            service=ServiceName("web"), backend=Backend("127.0.0.1", 1), port=number, backend_tls=each
        )
        for number, each in enumerate(configs, 1)
    ]
    return RouteTable(routes)


def test_a_context_lives_as_long_as_a_route_has_it() -> None:
    tls = BackendTls()
    tls.check(table(WEB, DB))
    web, db = tls.context(WEB), tls.context(DB)
    tls.keep_only(table(WEB))
    assert tls.context(WEB) is web
    assert tls.context(DB) is not db, "made anew, as it was forgotten"
