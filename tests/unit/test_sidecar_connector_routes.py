from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import IPv4Address

import pytest

from sidecar.connector.balance import Policy
from sidecar.connector.routes import RouteTable
from ztna.config import BackendConfig, BackendTlsConfig, CheckConfig, Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.identity import Grants, Identity
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName
from ztna.sections import Backend

BACKEND = Endpoint("127.0.0.1", 8080)
WEB = ServiceName("web")


def route(service: str = "web", port: int | None = 80, **others: object) -> RouteConfig:
    fields = {"service": ServiceName(service), "backend": BACKEND, "port": port} | others
    return RouteConfig(**fields)  # type: ignore[arg-type]


def several(*backends: BackendConfig) -> RouteConfig:
    return route(backend=None, backends=backends)


def identity(*, services: tuple[str, ...] = (), id_name: str | None = "c1") -> Identity:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    granted = Grants(frozenset(map(ServiceName, services)))
    return Identity("c", "f" * 64, Grants(), granted, None, id_name, now, now)


def test_groups_the_ports_of_a_service() -> None:
    table = RouteTable(
        [route(port=443), route(port=80, protocol="udp"), route("db", port=5432), route(port=80)]
    )
    assert set(table.services) == {"web", "db"}
    assert table.services[WEB].ports == (Port("tcp", 80), Port("tcp", 443), Port("udp", 80))


def test_picks_by_published_port() -> None:
    table = RouteTable([route(), route(port=53, protocol="udp")])
    picked = table.pick(WEB, "udp", 53)
    assert picked is not None and picked.weights == {BACKEND: 1}
    assert table.pick(WEB, "tcp", 53) is None
    assert table.pick(ServiceName("db"), "tcp", 80) is None


def test_pings_are_published_last_and_answered_by_the_backend_unless_told() -> None:
    ping = route(port=None, protocol="icmp")
    table = RouteTable([ping, route(), route("db", port=None, protocol="icmp", icmp="connector")])
    assert table.services[WEB].ports == (Port("tcp", 80), Port("icmp", 0))
    answered_here = [table.pick(ServiceName(name), "icmp", 0) for name in ("web", "db")]
    assert [each is not None and each.answers_pings for each in answered_here] == [False, True]
    assert (
        table.pings and not RouteTable([route(), route(port=None, protocol="icmp", icmp="connector")]).pings
    )
    assert [check.kind for check in table.services[WEB].routes[1].backends[0].checks] == ["icmp"]


def test_v1_agents_are_served_udp_where_a_route_says_so() -> None:
    table = RouteTable(
        [route(), route(port=53, protocol="udp", allow_v1=True), route("db", port=1, protocol="udp")]
    )
    assert [each.allow_v1 for each in table.services.values()] == [True, False]
    assert [route.allow_v1 for route in table.services[WEB].routes] == [False, True]
    with pytest.raises(ConfigError, match=r"connector.routes\[1\].allow_v1: expected protocol udp"):
        RouteTable([route(), route(port=81, allow_v1=True)])


def test_one_route_may_ask_for_the_address_of_all() -> None:
    asked = IPv4Address("10.100.0.80")
    table = RouteTable([route(virtual_ip=asked), route(port=81), route("db", port=5432)])
    assert table.services[WEB].virtual_ip == asked
    assert table.services[ServiceName("db")].virtual_ip is None


def test_several_backends_share_a_port() -> None:
    own = (CheckConfig(kind="http", path="/ready"), CheckConfig())
    other = Endpoint("10.0.0.2", 80)
    table = RouteTable(
        [
            route(
                backend=None,
                backends=(BackendConfig(address=BACKEND, weight=3), BackendConfig(address=other, checks=own)),
                balance="source_hash",
                eject_after=1,
                eject_s=2.0,
                drain_s=7.0,
            ),
            route(port=81),
            route("db", port=5432),
        ]
    )
    shared, alone = table.services[WEB].routes
    assert shared.weights == {BACKEND: 3, other: 1}
    assert shared.policy == Policy("source_hash", 1, 2.0)
    assert [[check.kind for check in backend.checks] for backend in shared.backends] == [
        ["tcp"],
        ["http", "tcp"],
    ]
    assert [check.target for check in shared.backends[1].checks] == [other, other]
    assert shared.is_same(RouteTable([route()]).services[WEB].routes[0])
    assert not shared.is_same(alone)
    assert (table.services[WEB].drain_s, table.services[ServiceName("db")].drain_s) == (7.0, None)


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ([route(protocol="icmp")], r"routes\[0\]\.port: icmp has no ports"),
        ([route(port=None)], r"routes\[0\]\.port: expected the port"),
        ([route(icmp="connector")], r"routes\[0\]\.icmp: only a route of protocol icmp has it, got tcp"),
        ([route(port=None, protocol="icmp")] * 2, "icmp port 0 is routed twice"),
        ([route(), route()], "tcp port 80 is routed twice"),
        ([route(weight=1), route(port=81, weight=2)], "one weight, got 1, 2"),
        ([route(checks=())], r"routes\[0\]\.checks: expected 1 to 16"),
        (
            [route(backends=(BackendConfig(address=BACKEND),))],
            r"routes\[0\]: expected backend or backends, got both",
        ),
        ([route(backend=None)], r"routes\[0\]: expected backend or backends, got neither"),
        (
            [several(BackendConfig(address=BACKEND), BackendConfig(address=BACKEND))],
            "127.0.0.1:8080 is there twice",
        ),
        (
            [several(*(BackendConfig(address=Endpoint("b", number)) for number in range(1, 66)))],
            "expected at most 64, got 65",
        ),
        (
            [several(BackendConfig(address=BACKEND, checks=(CheckConfig(path="x"),)))],
            r"routes\[0\]\.backends\[0\]\.checks\[0\]\.path",
        ),
        ([route(proxy_protocol="v2", protocol="udp")], r"routes\[0\]\.proxy_protocol: expected protocol tcp"),
        (
            [route(backend_tls=BackendTlsConfig(), protocol="udp")],
            r"routes\[0\]\.backend_tls: expected protocol tcp",
        ),
        (
            [route(backend_tls=BackendTlsConfig(key="k"))],
            r"routes\[0\]\.backend_tls: expected certificate and key",
        ),
        ([route(), route("db", checks=(CheckConfig(path="x"),))], r"routes\[1\]\.checks\[0\]\.path"),
        (
            [route(virtual_ip=IPv4Address("10.0.0.2")), route(port=81, virtual_ip=IPv4Address("10.0.0.1"))],
            r"one virtual_ip, got 10\.0\.0\.1, 10\.0\.0\.2",
        ),
    ],
)
def test_refuses_what_cannot_be_used(routes: list[RouteConfig], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RouteTable(routes)


def test_flows_live_as_long_as_the_floors_of_the_rfcs_unless_told() -> None:
    made = [route(), route(port=53, protocol="udp"), route(port=None, protocol="icmp")]
    tcp, udp, ping = RouteTable(made).services[WEB].routes
    assert tcp.tcp_idle_s >= 2 * 3600 + 4 * 60, "RFC 5382, REQ-5"
    assert udp.udp_idle_s >= 2 * 60, "RFC 4787, REQ-5"
    assert ping.udp_idle_s >= 60, "RFC 5508, REQ-2"
    less = RouteTable([route(tcp_idle_s=1.0), route(port=53, protocol="udp", udp_idle_s=2.0)])
    tcp, udp = less.services[WEB].routes
    assert (tcp.tcp_idle_s, udp.udp_idle_s) == (1.0, 2.0)


def test_checks_as_the_protocol_unless_told() -> None:
    table = RouteTable(
        [route(), route(port=53, protocol="udp", checks=(CheckConfig(kind="none"), CheckConfig()))]
    )
    kinds = [[check.kind for check in each.backends[0].checks] for each in table.services[WEB].routes]
    assert kinds == [["tcp"], ["none", "udp"]]


def test_tcp_checks_say_who_they_are_where_a_backend_wants_that() -> None:
    checks = (CheckConfig(), CheckConfig(port=81), CheckConfig(kind="http"))
    table = RouteTable([route(proxy_protocol="v1", checks=checks), route(port=81)])
    said = [[check.introduction for check in each.backends[0].checks] for each in table.services[WEB].routes]
    assert said == [[b"PROXY UNKNOWN\r\n", b"", b""], [b""]]


def test_the_slowest_start_of_a_service_counts() -> None:
    table = RouteTable([route(slow_start_s=5.0), route(port=81)])
    assert table.services[WEB].slow_start_s == 5.0


def test_our_certificate_must_allow_every_route() -> None:
    table = RouteTable([route(), route("db")])
    table.require_granted(identity(services=("web", "db")), ConnectorId("c1--a"))
    with pytest.raises(ConfigError, match=r"connector\.db\.ztna"):
        table.require_granted(identity(services=("web",)), ConnectorId("c1"))
    with pytest.raises(ConfigError, match=r"id\.c2\.ztna"):
        table.require_granted(identity(services=("web", "db")), ConnectorId("c2"))


def test_backends_have_a_priority_and_names_are_to_be_asked_for_first() -> None:
    spare = BackendConfig(address=Endpoint("10.0.0.9", 1), priority=20)
    shared = RouteConfig(service=WEB, port=80, backends=(BackendConfig(address=BACKEND), spare))
    assert RouteTable([shared]).services[WEB].routes[0].priorities == {BACKEND: 0, spare.address: 20}
    with pytest.raises(
        ConfigError, match=r"routes\[0\]\.backend: srv://_web\._tcp\.example has to be asked for"
    ):
        RouteTable([RouteConfig(service=WEB, port=80, backend=Backend("srv://_web._tcp.example", 0))])
