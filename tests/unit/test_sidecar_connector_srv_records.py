"""What SRV records make of a route."""

from __future__ import annotations

import pytest

from sidecar.connector.routes import BACKENDS_PER_ROUTE_MAX
from sidecar.connector.sources import Definition, Origin
from sidecar.connector.srv_records import backends_of, names_of, resolved, sound
from ztna.config import BackendConfig, Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.names import ServiceName
from ztna.resolver import SrvRecord
from ztna.sections import Backend

WEB = ServiceName("web")
NAME = "_web._tcp.example"
PLAIN = RouteConfig(service=WEB, port=443, backend=Backend("127.0.0.1", 1))
NAMED = RouteConfig(service=WEB, port=80, backend=Backend(f"srv://{NAME}", 0))
ONE = BackendConfig(address=Endpoint("10.0.0.1", 80), weight=1)


def definition(*routes: RouteConfig) -> Definition:
    return Definition(WEB, Origin("config"), routes)


def test_records_become_backends_with_their_weight_and_priority() -> None:
    records = [
        SrvRecord(20, 5, 8080, "spare.example", ("10.0.0.9",)),
        SrvRecord(10, 0, 8080, "b.example", ("10.0.0.3", "10.0.0.2")),
        SrvRecord(10, 7, 80, "a.example", ("10.0.0.1",)),
        SrvRecord(10, 7, 80, "same.example", ("10.0.0.1",)),
        SrvRecord(10, 7, 80, "nowhere.example"),
        SrvRecord(10, 7, 0, "portless.example", ("10.0.0.4",)),
    ]
    made = backends_of(records)
    assert made == backends_of(reversed(records))
    assert [(str(each.address), each.weight, each.priority) for each in made] == [
        ("10.0.0.1:80", 7, 10),
        ("10.0.0.2:8080", 1, 10),
        ("10.0.0.3:8080", 1, 10),
        ("10.0.0.9:8080", 5, 20),
    ]


def test_there_is_a_bound() -> None:
    records = [SrvRecord(1, 1, port, "a", ("10.0.0.1",)) for port in range(1, BACKENDS_PER_ROUTE_MAX + 9)]
    assert len(backends_of(records)) == BACKENDS_PER_ROUTE_MAX


def test_names_are_replaced_and_nothing_else_is() -> None:
    assert names_of([definition(PLAIN, NAMED)]) == {NAME}
    assert resolved(definition(PLAIN), lambda name: ()) == definition(PLAIN)
    made = resolved(definition(PLAIN, NAMED), {NAME: (ONE,)}.__getitem__)
    assert made.routes[0] is PLAIN
    assert (made.routes[1].backend, made.routes[1].backends) == (None, (ONE,))


def test_a_name_beside_other_backends_is_refused() -> None:
    both = RouteConfig(service=WEB, port=80, backend=Backend(f"srv://{NAME}", 0), backends=(ONE,))
    with pytest.raises(ConfigError, match="web: expected backend or backends, got both"):
        sound([both])


def test_routes_are_in_order_or_not_whatever_dns_says() -> None:
    sound([PLAIN, NAMED])
    with pytest.raises(ConfigError, match="tcp port 80 is routed twice"):
        sound([NAMED, NAMED])
