"""What a connector fronts as files, DNS, its API and the local Consul agent change: real files, sockets, packets."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from sidecar.connector import api_state, local_api
from sidecar.connector import discovery as module
from sidecar.connector.backend_tls import BackendTls
from sidecar.connector.check_files import require
from sidecar.connector.discovery import Discovery
from sidecar.connector.pushes import Pushes
from sidecar.connector.routes import RouteTable, ServiceRoutes
from sidecar.connector.sources import Settled
from tests.support.certificates import Pki
from tests.support.dns_server import ZONE, DnsServer
from ztna import sections
from ztna.catalog import Registration
from ztna.config import (
    BackendTlsConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    Endpoint,
    RelayTarget,
    RouteConfig,
)
from ztna.config import load as load_config
from ztna.consul.client import ConsulClient
from ztna.consul.embedded import EmbeddedConsul
from ztna.credentials import Credentials
from ztna.errors import ConfigError
from ztna.jsontypes import to_json
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName
from ztna.runtime import Daemon
from ztna.sections import Backend
from ztna.telemetry import ROUTE_FILES_BROKEN, SERVICES_DEFINED

WAIT_SECONDS = 15.0
WEB, DB, PAY = ServiceName("web"), ServiceName("db"), ServiceName("pay")
NAMED = f"srv://named.{ZONE}"


class _Over(Exception):
    """The test is done."""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(Path(tmp_path_factory.mktemp("pki")))


async def until(what: str, found: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def route(
    service: str = "web", port: int = 80, backend: str = "127.0.0.1:8080", **more: Any
) -> dict[str, Any]:
    return {"service": service, "port": port, "backend": backend, **more}


def put(path: Path, *routes: dict[str, Any]) -> None:
    """Write a file of routes as one step (JSON is YAML)."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps({"routes": routes}))
    fresh.replace(path)


class Place:
    """One Discovery and everything it looks at."""

    def __init__(self, discovery: Discovery, daemon: Daemon, folder: Path, consul: ConsulClient) -> None:
        self.discovery = discovery
        self.daemon = daemon
        self.folder = folder
        self.consul = consul
        self.dns: DnsServer
        self.tables: list[RouteTable] = []

    @property
    def fronted(self) -> set[str]:
        return set(self.discovery.table.services)

    def shown(self, service: str = "web") -> dict[str, Any]:
        return next((each for each in self.discovery.shown() if each["service"] == service), {})

    def warning(self, name: str) -> str:
        return str(self.daemon.readiness.report()["warnings"].get(name, ""))

    def backends(self, service: ServiceName = WEB) -> list[tuple[str, int, int]]:
        routes = self.discovery.table.services.get(service)
        if routes is None:
            return []
        return [(str(each.address), each.weight, each.priority) for each in routes.routes[0].backends]


@asynccontextmanager
async def place(pki: Pki, folder: Path, *routes: RouteConfig, **keys: Any) -> AsyncIterator[Place]:
    """A Discovery that has begun; the certificate grants web and db."""
    (folder / "routes.d").mkdir(exist_ok=True)
    consul, dns = await EmbeddedConsul.start(), DnsServer()
    tls = pki.connector("c1", [WEB, DB])
    config = ConnectorConfig(
        id=ConnectorId("c1"),
        tls=tls,
        relays=(RelayTarget(address=Endpoint("127.0.0.1", 9), name="relay"),),
        routes=routes,
        routes_dir=str(folder / "routes.d"),
        srv_resolvers=(await dns.start(),),
        **keys,
    )
    try:
        # As people may write it: without a scheme, and by a name.
        asked = ConsulConfig(address=consul.address.replace("http://127.0.0.1:", "localhost:"))
        async with ConsulClient(asked) as client, asyncio.TaskGroup() as tasks:
            daemon = Daemon("test", Config(consul=asked, connector=config), tasks)
            discovery = Discovery(daemon, Credentials.load(tls), client, check=check_files, tasks=tasks)
            made = Place(discovery, daemon, folder / "routes.d", client)
            made.dns = dns
            discovery.apply = made.tables.append
            await discovery.begin()
            yield made
            raise _Over
    except* _Over:
        pass
    finally:
        dns.close()
        await consul.stop()


def check_files(table: RouteTable) -> None:
    """Look for all files that routes name, as the daemon does."""
    BackendTls().check(table)
    require(table)


def own(service: ServiceName = WEB, backend: str = "127.0.0.1") -> RouteConfig:
    return RouteConfig(service=service, port=80, backend=Backend(backend, 0 if "://" in backend else 8080))


async def test_files_of_the_directory_come_change_and_go(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path, own(DB)) as made:
        assert made.fronted == {"db"}
        before = made.discovery.table.services[DB]
        put(made.folder / "a.yaml", route())
        await until("fronted", lambda: made.fronted == {"db", "web"})
        put(made.folder / "a.yaml", route(), route(port=443))
        await until("changed", lambda: len(made.discovery.table.services[WEB].routes) == 2)
        assert made.shown()["ports"] == ["tcp:80", "tcp:443"] and made.shown()["from"] == "a.yaml"
        (made.folder / "a.yaml").unlink()
        await until("gone", lambda: made.fronted == {"db"})
        assert made.discovery.table.services[DB] is before
        (made.folder / ".hidden.yaml").write_text("nonsense: true")
        (made.folder / "notes.txt").write_text("nothing")
        put(made.folder / "b.json", route())
        await until("JSON too", lambda: made.fronted == {"db", "web"})
        assert made.discovery.status()["files"] == {"b.json": None}


async def test_a_broken_file_keeps_what_it_had_and_says_so(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        file = made.folder / "a.yaml"
        put(file, route())
        put(made.folder / "b.yaml", route("db"))
        await until("fronted", lambda: made.fronted == {"db", "web"})
        for broken, said in (
            ("routes: [", "a.yaml, line "),
            (json.dumps({"routes": [route(port=0)]}), r"routes[0].port: expected int >= 1, got 0"),
            (json.dumps({"routes": [route(), route()]}), "routes: web: tcp port 80 is routed twice"),
            (json.dumps({"rotes": []}), "did you mean routes?"),
        ):
            file.write_text(broken)
            await until(f"told: {said}", lambda said=said: said in made.warning("routes a.yaml"))
            assert str(file) in made.warning("routes a.yaml")
            assert made.fronted == {"db", "web"} and ROUTE_FILES_BROKEN._value.get() == 1
        put(file, route(backend="127.0.0.1:9"))
        await until("mended", lambda: not made.warning("routes a.yaml"))
        assert made.backends() == [("127.0.0.1:9", 1, 0)] and ROUTE_FILES_BROKEN._value.get() == 0
        put(made.folder / "c.yaml", route("web", port=9))
        (made.folder / "c.yaml").write_text("[")
        made.discovery.reload()
        await until("told at once", lambda: "nothing of it is in use" in made.warning("routes c.yaml"))
        (made.folder / "c.yaml").unlink()
        await until("forgotten", lambda: not made.warning("routes c.yaml"))


async def test_a_file_that_a_route_needs_may_come_later(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        authorities = tmp_path / "later.pem"
        put(made.folder / "a.yaml", route(backend_tls={"ca": str(authorities)}), route("db"))
        await until("fronted", lambda: made.fronted == {"db"})
        assert "later.pem: No such file" in made.shown()["problem"]
        authorities.write_bytes(Path(pki.connector("c2", [WEB]).ca).read_bytes())
        await until("all is there", lambda: made.fronted == {"db", "web"})
        assert made.shown()["problem"] is None and not made.warning("services")


async def test_a_route_that_worked_stays_in_use_while_its_successor_lacks_a_file(
    pki: Pki, tmp_path: Path
) -> None:
    async with place(pki, tmp_path) as made:
        authorities = tmp_path / "later.pem"
        for number, lacking in enumerate(
            (
                {"backend_tls": {"ca": str(authorities)}},
                {"checks": [{"kind": "http", "tls": True, "ca": str(authorities)}]},
                {"checks": [{"kind": "script", "command": [str(authorities)]}]},
            )
        ):
            backend = f"127.0.0.1:{9000 + number}"
            put(made.folder / "a.yaml", route(backend=backend), route("db", 5432))
            await until("fronted", lambda at=backend: made.backends() == [(at, 1, 0)])
            put(made.folder / "a.yaml", route(backend="127.0.0.1:9", **lacking), route("db", 5433))
            await until(
                "another one", lambda: made.discovery.table.services[DB].ports == (Port("tcp", 5433),)
            )
            assert made.backends() == [(backend, 1, 0)], "it works as before"
            said = made.shown()["problem"]
            assert "later.pem" in said and said.endswith("; what it had before is in use"), said
            assert made.shown()["fronted"] and f"web: {said}" in made.warning("services")
            assert SERVICES_DEFINED.labels("kept")._value.get() == 1
            assert SERVICES_DEFINED.labels("refused")._value.get() == 0
        put(made.folder / "a.yaml", route(backend="127.0.0.1:9", backend_tls={"ca": str(authorities)}))
        await until("told", lambda: "backend_tls" in made.shown()["problem"])
        authorities.write_bytes(Path(pki.connector("c2", [WEB]).ca).read_bytes())
        await until("it has come", lambda: made.backends() == [("127.0.0.1:9", 1, 0)])
        assert made.shown()["problem"] is None and SERVICES_DEFINED.labels("kept")._value.get() == 0


async def test_a_route_that_is_led_to_dns_works_as_before_until_that_has_answered(
    pki: Pki, tmp_path: Path
) -> None:
    async with place(pki, tmp_path) as made:
        put(made.folder / "a.yaml", route())
        await until("fronted", lambda: made.fronted == {"web"})
        made.dns.silent = True
        put(made.folder / "a.yaml", route(backend=NAMED))
        await until("told", lambda: made.shown()["problem"])
        assert made.backends() == [("127.0.0.1:8080", 1, 0)]
        made.dns.backends["named"] = [(10, 5, 1000)]
        made.dns.silent = False
        await until("answered", lambda: made.backends() == [("127.0.0.1:1000", 5, 10)])
        assert made.shown()["problem"] is None


async def test_what_every_place_defines_is_known_after_its_first_word(pki: Pki, tmp_path: Path) -> None:
    (tmp_path / "routes.d").mkdir()
    (tmp_path / "routes.d" / "broken.yaml").write_text("[")
    lacking = own(DB, backend="127.0.0.1")
    lacking = msgspec.structs.replace(lacking, backend_tls=BackendTlsConfig(ca=str(tmp_path / "ca.pem")))
    put(tmp_path / "routes.d" / "db.yaml", sections.plain(lacking, secrets=True))
    async with place(pki, tmp_path, own(backend=NAMED), consul_services=True) as made:
        made.dns.silent = True

        def unheard() -> object:
            return made.discovery.status()["unheard"]

        await until("Consul has said", lambda: unheard() == ["broken.yaml", "web", "db"])
        assert not made.discovery.has_heard_all
        (made.folder / "broken.yaml").unlink()
        await until("gone is a word, too", lambda: unheard() == ["web", "db"])
        (tmp_path / "ca.pem").write_bytes(Path(pki.connector("c2", [WEB]).ca).read_bytes())
        await until("the file has come", lambda: unheard() == ["web"])
        assert not made.discovery.has_heard_all
        made.dns.silent = False
        await until("no such name is a word, too", lambda: made.discovery.has_heard_all)
        (made.folder / "later.yaml").write_text("[")
        made.discovery.reload()
        await until("told", lambda: made.warning("routes later.yaml"))
        assert made.discovery.has_heard_all and unheard() == [], "that was the start"


async def test_the_first_word_is_not_waited_for_for_ever(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_WORD_SECONDS", 0.2)
    async with place(pki, tmp_path, own(backend=NAMED)) as made:
        made.dns.silent = True
        await until("given up", lambda: made.discovery.has_heard_all)
        assert made.fronted == set()


async def test_secrets_that_go_into_consul_are_told_of(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        check: dict[str, Any] = {"kind": "http", "headers": ["Authorization: Bearer hunter2"]}
        backends = [{"address": "127.0.0.1:8080", "checks": [{**check, "runner": "consul"}]}]
        put(made.folder / "a.yaml", {"service": "web", "port": 80, "backends": backends})
        await until("told", lambda: "web: checks.headers: Authorization" in made.warning("secrets_in_consul"))
        assert "hunter2" not in made.warning("secrets_in_consul") and made.fronted == {"web"}
        put(made.folder / "a.yaml", route(checks=[check]))
        await until("kept here", lambda: not made.warning("secrets_in_consul"))


async def test_what_is_no_file_holds_up_no_other(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        os.mkfifo(made.folder / "a.yaml")
        (made.folder / "b.yaml").mkdir()
        for name in ("a.yaml", "b.yaml"):
            await until("told", lambda name=name: "expected a regular file" in made.warning(f"routes {name}"))
        put(made.folder / "c.yaml", route())
        await until("fronted", lambda: made.fronted == {"web"})


async def test_a_file_may_have_any_name(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        file = made.folder / os.fsdecode(b"\xff.yaml")
        put(file, route())
        await until("fronted", lambda: made.fronted == {"web"})
        file.write_text("[")
        await until("told", lambda: made.warning("routes \\xff.yaml"))
        # What is shown is JSON, to load balancers too.
        assert b"xff.yaml" in to_json(made.discovery.status())
        assert b"xff.yaml" in to_json(made.daemon.readiness.report())
        assert b"xff.yaml" in to_json(made.discovery.shown())
        file.unlink()
        await until("gone", lambda: made.fronted == set() and not made.warning("routes \\xff.yaml"))


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ({"ca": "/etc/\0"}, "ca: expected the path of a file"),
        ({"name": "..example"}, "name: expected the name of a host"),
    ],
)
async def test_tls_that_can_never_be_is_its_services_problem_alone(
    pki: Pki, tmp_path: Path, tls: dict[str, str], said: str
) -> None:
    async with place(pki, tmp_path) as made:
        put(made.folder / "a.yaml", route(backend_tls=tls), route("db"))
        await until("fronted", lambda: made.fronted == {"db"})
        assert f"backend_tls.{said}" in made.shown()["problem"]


async def test_a_directory_that_goes_away_keeps_what_it_had(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        put(made.folder / "a.yaml", route())
        await until("fronted", lambda: made.fronted == {"web"})
        away = made.folder.rename(tmp_path / "away")
        await until("told", lambda: made.warning("routes_dir"))
        assert made.fronted == {"web"}
        away.rename(made.folder)
        await until("back", lambda: not made.warning("routes_dir"))
        assert made.fronted == {"web"}


async def test_the_configurations_own_routes_are_read_again(pki: Pki, tmp_path: Path) -> None:
    file = tmp_path / "connector.yaml"
    tls = pki.connector("c1", [WEB, DB])
    head: dict[str, Any] = {
        "id": "c1",
        "tls": {"certificate": tls.certificate, "key": tls.key, "ca": tls.ca},
        "relays": [{"address": "127.0.0.1:9", "name": "relay"}],
    }

    def write(*routes: dict[str, Any], **more: Any) -> None:
        file.write_text(json.dumps({"connector": {**head, **more, "routes": routes}}))

    def read() -> Config:
        return load_config(file, {}, {}, "connector")

    write(route())
    consul = ConsulConfig(address="http://127.0.0.1:1")
    async with ConsulClient(consul) as client, asyncio.TaskGroup() as tasks:
        daemon = Daemon("test", read(), tasks, reread=read, file=file)
        discovery = Discovery(daemon, Credentials.load(tls), client, check=BackendTls().check, tasks=tasks)
        await discovery.begin()
        assert set(discovery.table.services) == {WEB}
        write(route(), route("db"), drain_s=3.0)
        await until("read again", lambda: set(discovery.table.services) == {WEB, DB})
        file.write_text("connector: [")
        await until("told", lambda: "routes config" in daemon.readiness.report()["warnings"])
        assert set(discovery.table.services) == {WEB, DB}
        file.write_text("domain: other.example")
        await until(
            "told", lambda: "no such section" in daemon.readiness.report()["warnings"]["routes config"]
        )
        write(route(), route("pay"))
        await until("the ungranted is out, the others go on", lambda: set(discovery.table.services) == {WEB})
        assert "pay needs connector.pay.ztna" in daemon.readiness.report()["warnings"]["services"]
        for task in asyncio.all_tasks():
            if task.get_name() in ("files of routes", "files that routes need"):
                task.cancel()


async def test_srv_records_are_backends_and_follow_their_ttl(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path, own(backend=NAMED), own(DB)) as made:
        await until("told", lambda: "has no SRV records" in str(made.shown().get("problem")))
        assert made.fronted == {"db"}
        made.dns.backends["named"] = [(20, 1, 1002), (10, 5, 1000), (10, 0, 1001)]
        await until("fronted", lambda: made.fronted == {"db", "web"})
        assert made.backends() == [
            ("127.0.0.1:1000", 5, 10),
            ("127.0.0.1:1001", 1, 10),
            ("127.0.0.1:1002", 1, 20),
        ]
        before = made.discovery.table.services[DB]
        made.dns.backends["named"] = [(10, 7, 1001)]
        await until("changed", lambda: made.backends() == [("127.0.0.1:1001", 7, 10)])
        made.dns.backends.clear()
        await until("withdrawn", lambda: made.fronted == {"db"})
        assert made.discovery.table.services[DB] is before
        assert made.dns.asked[0] == f"named.{ZONE} SRV"


async def test_the_last_answer_holds_for_its_bound_while_dns_is_away(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path, own(backend=NAMED), srv_keep_s=3.0) as made:
        made.dns.routes["named"] = [(10, 5, "a")]
        await until("fronted", lambda: made.fronted == {"web"})
        loop = asyncio.get_running_loop()
        made.dns.stale = True
        await until("told", lambda: made.discovery.status()["srv"][f"named.{ZONE}"]["problem"])  # type: ignore[index]
        assert made.fronted == {"web"}
        made.dns.stale = False
        await until("well", lambda: not made.discovery.status()["srv"][f"named.{ZONE}"]["problem"])  # type: ignore[index]
        made.dns.silent, away_at = True, loop.time()
        await until("given up", lambda: made.fronted == set())
        assert loop.time() - away_at >= 1.0, "no sooner than its bound after the last answer"
        assert "the last answer is over 3 s old" in str(made.shown()["problem"])
        settled = len(made.tables)
        made.dns.stale, made.dns.silent = True, False
        await until("told", lambda: "is stale" in str(made.shown()["problem"]))
        assert len(made.tables) == settled, "nothing is handed on when nothing is another"
        made.dns.stale = False
        made.dns.silent = False
        await until("back", lambda: made.fronted == {"web"})


async def test_a_name_that_no_route_has_any_more_is_not_asked_for(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        made.dns.routes["named"] = [(10, 5, "a")]
        put(made.folder / "a.yaml", route(backend=NAMED))
        await until("fronted", lambda: made.fronted == {"web"})
        put(made.folder / "a.yaml", route())
        await until("by address", lambda: made.backends() == [("127.0.0.1:8080", 1, 0)])
        assert made.discovery.status()["srv"] == {}
        assert f"SRV named.{ZONE}" not in {
            task.get_name() for task in asyncio.all_tasks() if not task.cancelling()
        }


async def test_tagged_services_of_the_local_consul_agent_are_fronted(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONSUL_SERVICES_SECONDS", 0.05)
    async with place(pki, tmp_path, consul_services=True) as made:
        for service in ("web", "pay"):
            await made.consul.register_service(
                Registration(
                    service=service,
                    instance_id=f"_nomad-task-{service}",
                    address="",
                    port=23456,
                    meta={"ztna-ports": "tcp:80"},
                )
            )
        await until("fronted", lambda: made.fronted == {"web"})
        assert made.discovery.table.services[WEB].ports == (Port("tcp", 80),)
        assert made.backends() == [("localhost:23456", 1, 0)]
        assert made.shown("pay") == {}, "not granted, and nobody asked for it by name"
        put(made.folder / "a.yaml", route())
        await until("the file counts", lambda: made.shown()["from"] == "a.yaml")
        assert made.shown()["shadowed"] == ["consul"]
        assert "web: defined by a.yaml, which counts, and by consul" in made.warning("services")
        (made.folder / "a.yaml").unlink()
        await until("Consul's again", lambda: made.shown()["from"] == "consul")
        await until("no conflict", lambda: not made.warning("services"))
        await made.consul.deregister_service("_nomad-task-web")
        await until("gone", lambda: made.fronted == set())


async def test_a_certificate_that_grants_more_lets_more_be_fronted(pki: Pki, tmp_path: Path) -> None:
    async with place(pki, tmp_path) as made:
        put(made.folder / "a.yaml", route(), route("pay"))
        await until("fronted", lambda: made.fronted == {"web"})
        assert made.shown("pay")["problem"] == "pay needs connector.pay.ztna in connector.tls.certificate"
        made.discovery.use_identity(Credentials.load(pki.connector("c1", [WEB, PAY])).identity)
        assert made.fronted == {"web", "pay"} and not made.warning("services")
        made.discovery.use_identity(Credentials.load(pki.connector("c1", [PAY])).identity)
        assert made.fronted == {"pay"} and "connector.web.ztna" in str(made.shown()["problem"])


async def test_own_routes_are_those_of_one_moment(pki: Pki, tmp_path: Path) -> None:
    """A thread that renews certificates asks for them, while the loop may settle anew."""
    async with place(pki, tmp_path, own()) as made:
        discovery, settled = made.discovery, made.discovery._settled

        class Settling(dict[ServiceName, ServiceRoutes]):
            def items(self) -> Any:
                discovery._settled = Settled({}, RouteTable.of({}))
                return super().items()

        table = RouteTable.of(Settling(settled.table.services))
        discovery._settled = Settled(settled.entries, table)
        assert set(discovery.own_table.services) == {"web"}


async def test_a_certificate_has_to_grant_what_the_configuration_itself_names(
    pki: Pki, tmp_path: Path
) -> None:
    async with place(pki, tmp_path, own(DB)) as made:
        put(made.folder / "a.yaml", route())
        await until("fronted", lambda: made.fronted == {"db", "web"})
        assert set(made.discovery.own_table.services) == {DB}


@pytest.mark.parametrize(
    ("routes", "keys", "said"),
    [
        ((own(PAY),), {}, r"connector\.routes: pay needs connector\.pay\.ztna"),
        ((own(), own()), {}, "tcp port 80 is routed twice"),
        ((), {"routes_dir": "/nonexistent"}, r"connector\.routes_dir: /nonexistent: expected a directory"),
        ((), {"api": "x", "api_state": "/dev"}, "api_state: /dev: Is a directory"),
    ],
)
async def test_what_cannot_be_begun_with(
    pki: Pki, routes: tuple[RouteConfig, ...], keys: dict[str, Any], said: str
) -> None:
    tls = pki.connector("c1", [WEB, DB])
    config = ConnectorConfig(id=ConnectorId("c1"), tls=tls, routes=routes, **keys)
    async with ConsulClient(ConsulConfig()) as client, asyncio.TaskGroup() as tasks:
        with pytest.raises(ConfigError, match=said):
            Discovery(
                Daemon("test", Config(connector=config), tasks),
                Credentials.load(tls),
                client,
                check=BackendTls().check,
                tasks=tasks,
            )


# The local API


class Api:
    """Asks the API at its socket."""

    def __init__(self, http: aiohttp.ClientSession, made: Place, state: Path) -> None:
        self.http = http
        self.made = made
        self.state = state

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        async with self.http.request(method, f"http://connector{path}", data=data) as response:
            return response.status, json.loads(await response.read())

    async def put(self, service: str = "web", *routes: dict[str, Any]) -> tuple[int, Any]:
        return await self.ask("PUT", f"/v1/services/{service}", {"routes": routes or [without_service()]})


def without_service(**more: Any) -> dict[str, Any]:
    return {key: value for key, value in route(**more).items() if key != "service"}


@asynccontextmanager
async def api(pki: Pki, folder: Path) -> AsyncIterator[Api]:
    path, state = folder / "api.sock", folder / "services.json"
    async with place(pki, folder, api=str(path), api_state=str(state)) as made:
        pushes = Pushes()
        async with (
            local_api.serving(made.discovery, pushes, str(path)),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http,
        ):
            assert path.stat().st_mode & 0o777 == 0o600
            yield Api(http, made, state)


async def test_a_service_is_added_seen_changed_and_removed(pki: Pki, tmp_path: Path) -> None:
    async with api(pki, tmp_path) as local:
        status, shown = await local.put()
        assert status == 200, shown
        assert (shown["from"], shown["fronted"]) == ("api", True)
        assert shown["routes"][0]["backend"] == "127.0.0.1:8080" and local.made.fronted == {"web"}
        assert (await local.put("web", route(backend="127.0.0.1:9")))[0] == 200
        assert local.made.backends() == [("127.0.0.1:9", 1, 0)]
        assert (await local.put("db", without_service(backend=NAMED)))[1]["problem"].startswith(NAMED)
        status, every = await local.ask("GET", "/v1/services")
        assert (status, [each["service"] for each in every["services"]]) == (200, ["db", "web"])
        assert (await local.ask("GET", "/v1/services/web"))[1]["ports"] == ["tcp:80"]
        assert await local.ask("DELETE", "/v1/services/web") == (200, {"removed": "web"})
        assert local.made.fronted == set()
    async with api(pki, tmp_path) as local:
        assert [each["service"] for each in local.made.discovery.shown()] == ["db"], "kept over a restart"
        assert local.state.stat().st_mode & 0o777 == 0o600


async def test_what_is_refused_says_why_and_changes_nothing(pki: Pki, tmp_path: Path) -> None:
    async with api(pki, tmp_path) as local:
        put(local.made.folder / "a.yaml", route("db"))
        await until("fronted", lambda: local.made.fronted == {"db"})
        asked = [
            (await local.put("pay"), 403, "no_grant", "connector.pay.ztna"),
            (await local.put("Web"), 400, "malformed", "Web"),
            (await local.put("web", without_service(port=0)), 400, "malformed", "routes[0].port"),
            (
                await local.put("web", route("db")),
                400,
                "malformed",
                "routes[0].service: expected web, got 'db'",
            ),
            (await local.put("web", without_service(), without_service()), 400, "malformed", "routed twice"),
            (await local.ask("PUT", "/v1/services/web", {}), 400, "malformed", "routes: expected a list"),
            (await local.ask("PUT", "/v1/services/web", {"routes": [3]}), 400, "malformed", "routes[0]"),
            (await local.ask("PUT", "/v1/services/web", b"{"), 400, "malformed", "bad JSON"),
            (
                await local.ask("PUT", "/v1/services/web", b"x" * 300_000),
                413,
                "limit_reached",
                "262144 bytes",
            ),
            (await local.ask("GET", "/v1/services/web"), 404, "no_such_service", "web is defined nowhere"),
            (await local.ask("DELETE", "/v1/services/web"), 404, "no_such_service", "web is defined nowhere"),
            (
                await local.ask("DELETE", "/v1/services/db"),
                409,
                None,
                "db comes from a.yaml: remove it there",
            ),
            (await local.ask("GET", "/v1/nothing"), 404, "malformed", "not found"),
            (
                await local.ask("PUT", "/v1/services/db/check", {"status": "passing"}),
                409,
                None,
                "no check of kind ttl",
            ),
            (await local.ask("PUT", "/v1/services/db/check", {"status": "fine"}), 400, "malformed", "fine"),
        ]
        for (status, said), expected, reason, text in asked:
            assert (status, said["reason"]) == (expected, reason), said
            assert text in said["error"]
        assert not local.state.exists() and local.made.fronted == {"db"}


async def test_a_name_from_two_places_is_shown_with_both(pki: Pki, tmp_path: Path) -> None:
    async with api(pki, tmp_path) as local:
        put(local.made.folder / "a.yaml", route())
        await until("fronted", lambda: local.made.fronted == {"web"})
        _, shown = await local.put("web", without_service(backend="127.0.0.1:9"))
        assert (shown["from"], shown["shadowed"]) == ("a.yaml", ["api"])
        (local.made.folder / "a.yaml").unlink()
        await until("the other takes its place", lambda: local.made.backends() == [("127.0.0.1:9", 1, 0)])


async def test_there_is_a_bound(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "API_SERVICES_MAX", 1)
    async with api(pki, tmp_path) as local:
        assert (await local.put())[0] == 200
        assert (await local.put())[0] == 200, "the same one again is no other one"
        status, said = await local.put("db")
        assert (status, said["reason"]) == (429, "limit_reached")


async def test_a_slow_disk_holds_up_nothing_else_and_changes_keep_their_order(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_sync, syncing = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        syncing.set()
        assert may_sync.wait(WAIT_SECONDS)
        fsync(descriptor)

    async with api(pki, tmp_path) as local, asyncio.TaskGroup() as tasks:
        monkeypatch.setattr(api_state.os, "fsync", slow)
        first = tasks.create_task(local.put("web", without_service(backend="127.0.0.1:1")))
        await until("it waits for the disk", syncing.is_set)
        second = tasks.create_task(local.put("web", without_service(backend="127.0.0.1:2")))
        third = tasks.create_task(local.put("db"))
        status, every = await local.ask("GET", "/v1/services")
        assert (status, every["services"]) == (200, []), "the loop runs, and nothing counts that is not kept"
        assert not first.done() and not local.state.exists()
        may_sync.set()
        for each in (first, second, third):
            assert (await each)[0] == 200
        assert local.made.backends() == [("127.0.0.1:2", 1, 0)] and local.made.fronted == {"db", "web"}
        kept = api_state.read(local.state)
        assert kept.keys() == {"web", "db"} and kept[WEB].routes[0].backend == Backend("127.0.0.1", 2)


async def test_a_state_file_grows_no_larger_than_is_read(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api(pki, tmp_path) as local:
        assert (await local.put())[0] == 200
        kept = local.state.read_bytes()
        monkeypatch.setattr(api_state, "STATE_BYTES_MAX", len(kept))
        status, said = await local.put("db")
        assert status == 507 and f"over {len(kept)} bytes" in said["error"]
        assert local.made.fronted == {"web"} and local.state.read_bytes() == kept
        assert api_state.read(local.state).keys() == {"web"}


async def test_a_state_file_that_cannot_be_written_changes_nothing(pki: Pki, tmp_path: Path) -> None:
    async with api(pki, tmp_path) as local:
        assert (await local.put())[0] == 200
        kept = local.state.read_bytes()
        (tmp_path / ".services.json.new").symlink_to("/dev/full")
        status, said = await local.put("db")
        assert status == 507 and "No space left on device" in said["error"]
        assert local.made.fronted == {"web"} and local.state.read_bytes() == kept
        assert not (tmp_path / ".services.json.new").is_symlink(), "what was begun keeps no room"
        assert (await local.put("db"))[0] == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "recursion depth exceeded.*move it away"),
        ("{", r"services\.json: .*move it away to begin with no services"),
        ("[]", "move it away"),
        ('{"schema": 1}', "expected a key routes; mend it"),
        ('{"schema": 1, "routes": [{"service": "web"}], "x": 1}', None),
        ('{"schema": 1, "routes": [{"service": "Web"}]}', "move it away"),
        ('{"schema": 2, "routes": {}}', "expected schema 1, got 2; a newer version wrote it"),
    ],
)
async def test_a_state_file_that_cannot_be_used_is_not_written_over(
    pki: Pki, tmp_path: Path, text: str, said: str | None
) -> None:
    state = tmp_path / "services.json"
    state.write_text(text)
    if said is None:
        async with api(pki, tmp_path) as local:
            assert "expected the port on the virtual address" in str(local.made.shown()["problem"])
        return
    with pytest.raises(ExceptionGroup) as caught:
        async with api(pki, tmp_path):
            pass
    assert caught.group_contains(ConfigError, match=said)
    assert state.read_text() == text
