"""One relay's sessions with a clock that stands, and what each connection of it was sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeVar

from relay.commands import (
    AdmitAgent,
    AdmitConnector,
    Command,
    Refusal,
    Send,
    SendHealth,
    Told,
)
from relay.policy import Route, SrvEntry, SrvTable
from relay.rules import Rules
from relay.sessions import Sessions
from tests.support.identities import identity
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address

WEB, DB = ServiceName("web"), ServiceName("db")
ALICE, BOB, X, Y = 1, 2, 3, 4
HERE = Address("192.0.2.10", 4434)
CANDIDATE = Address("192.0.2.77", 7)
HOLD_S = 60.0
RULES = Rules(per_identity=10, per_service=50, total=100)
T = TypeVar("T")


class World:
    """Sessions with a clock, and what each connection was sent."""

    def __init__(self, rules: Rules = RULES, software: str = "") -> None:
        numbers = itertools.count(1)
        self.sessions = Sessions(rules, lambda n: next(numbers).to_bytes(n), software)
        self.now = 100.0
        self.requests = itertools.count(1)
        self.inbox: dict[int, list[control.AnyMessage]] = {}
        self.commands: list[Command] = []
        self.routes: dict[ServiceName, tuple[Route, ...]] = {}

    def do(self, commands: Iterable[Command]) -> list[Command]:
        commands = list(commands)
        while self.sessions.has_news:
            commands += self.sessions.tell(self.now)
        self.commands += commands
        for command in commands:
            if isinstance(command, Send | AdmitAgent | AdmitConnector):
                self.inbox.setdefault(command.to, []).append(command.message)
            if isinstance(command, SendHealth):
                self.inbox.setdefault(command.to, []).extend(command.news)
        return commands

    def join(
        self, key: int, hello: bool = True, v1: bool = False, tls: bool = False, **grants: object
    ) -> None:
        name, forwarder = grants.pop("name", f"peer-{key}"), None if v1 else HERE
        who = identity(str(name), **grants)  # type: ignore[arg-type]
        self.do(self.sessions.connected(key, who, forwarder, datagrams=not tls))
        if hello:
            self.say(key, control.Hello())

    def agent(self, key: int = ALICE, *services: str, **more: object) -> None:
        self.join(key, agent=services or ("web", "db"), **more)

    def connector(self, key: int = X, id_name: str = "con-x", *services: str, **more: object) -> None:
        self.join(key, connector=services or ("web",), id_name=id_name, **more)
        self.register(key, id_name, *services)

    def register(self, key: int, connector_id: str, *services: str) -> list[Command]:
        offerings = tuple(control.Offering(ServiceName(each)) for each in services or ("web",))
        return self.say(key, control.Register(ConnectorId(connector_id), offerings, CANDIDATE))

    def srv(self, service: ServiceName, *connectors: str, fresh_s_ago: float = 0.0) -> list[Command]:
        """Let DNS name these connectors, the first with the lowest priority."""
        self.routes[service] = tuple(Route(n, 1, ConnectorId(each)) for n, each in enumerate(connectors))
        return self.table(fresh_s_ago)

    def table(self, fresh_s_ago: float = 0.0) -> list[Command]:
        entries = {service: SrvEntry(routes, self.now) for service, routes in self.routes.items()}
        return self.do(
            self.sessions.policy_changed(SrvTable(entries, {"": self.now - fresh_s_ago}, HOLD_S), self.now)
        )

    def say(self, key: int, message: control.AnyMessage) -> list[Command]:
        return self.do(self.sessions.message(key, message, self.now))

    def tick(self, later: float = 0.0) -> list[Command]:
        self.now += later
        return self.do(self.sessions.tick(self.now))

    def take(self, key: int, kind: type[T]) -> T:
        """Take the oldest message of the type that a connection was sent."""
        found = [each for each in self.inbox.get(key, []) if isinstance(each, kind)]
        assert found, f"{key} was sent no {kind.__name__}: {self.inbox.get(key)}"
        self.inbox[key].remove(found[0])  # type: ignore[arg-type]
        return found[0]

    def quiet(self, *keys: int) -> bool:
        return not [
            each for key in keys for each in self.inbox.get(key, []) if not isinstance(each, control.Health)
        ]

    def open(self, key: int = ALICE, service: ServiceName = WEB, wanted: str | None = None) -> int:
        request = next(self.requests)
        connector_id = ConnectorId(wanted) if wanted else None
        self.say(key, control.Open(request, service, connector_id=connector_id))
        return request

    def opened(self, agent: int = ALICE, connector: int = X) -> SessionId:
        """Open a session all the way."""
        self.open(agent)
        offered = self.take(connector, control.Offered)
        self.say(connector, control.Accepted(offered.session))
        assert self.take(agent, control.Opened).session == offered.session
        return offered.session

    def denied(self, key: int = ALICE) -> Reason:
        return self.take(key, control.Denied).reason

    def refusals(self) -> list[Reason]:
        found = [each.reason for each in self.commands if isinstance(each, Refusal)]
        self.commands.clear()
        return found

    def settle(self) -> None:
        """Forget what was said so far."""
        self.inbox.clear()
        self.commands.clear()


def met() -> World:
    """Alice and Bob may use web; con-x and con-y serve it, con-x by preference."""
    world = World()
    world.agent(ALICE)
    world.agent(BOB)
    world.connector(X, "con-x")
    world.connector(Y, "con-y")
    world.srv(WEB, "con-x", "con-y")
    world.settle()
    return world


def told(world: World) -> list[Told]:
    return [each for each in world.commands if isinstance(each, Told)]
