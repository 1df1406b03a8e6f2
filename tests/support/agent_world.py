"""An agent's sessions with a clock in the hand, and the commands that one expects of them."""

from __future__ import annotations

from ipaddress import IPv4Address

from sidecar.agent.commands import (
    Command,
    Event,
    LeaseIs,
    Proceed,
    Received,
    RelayUp,
    Send,
    Session,
    Tick,
    Want,
)
from sidecar.agent.sessions import (
    Sessions,
)
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import (
    AnyMessage,
    Closed,
    Denied,
    LeaseRef,
    Open,
    Opened,
)

WEB = ServiceName("web-app")
DB = ServiceName("db")
LEASE = LeaseRef(IPv4Address("127.100.0.2"), 7)
NEWER = LeaseRef(IPv4Address("127.100.0.3"), 8)
PRINT = "ab" * 32


def sid(number: int) -> SessionId:
    return SessionId(f"{number:016x}")


class Agent:
    """The state machine with a clock in the hand and the commands of the last event."""

    def __init__(self, *relays: str, flows_max: int = 1000) -> None:
        self.sessions = Sessions(relays or ("r1",), flows_max)
        self.now = 100.0
        self.drawn = 0

    def __call__(self, event: Event) -> list[Command]:
        return self.sessions.handle(event, self.now)

    def says(self, message: AnyMessage, relay: str = "r1") -> list[Command]:
        return self(Received(relay, message))

    def opened(
        self, request: int, number: int, service: ServiceName = WEB, relay: str = "r1"
    ) -> list[Command]:
        return self.says(Opened(request, sid(number), service, ConnectorId("c1"), PRINT), relay)

    def denied(self, request: int, reason: Reason, relay: str = "r1") -> list[Command]:
        return self.says(Denied(request, WEB, reason), relay)

    def after(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self(Tick())

    def state(self, service: ServiceName = WEB) -> str:
        return next(view.state for view in self.sessions.views() if view.service == service)


def ready(*relays: str, flows_max: int = 1000) -> Agent:
    """An agent whose relays are up and which knows the lease of `web-app`."""
    agent = Agent(*relays, flows_max=flows_max)
    for relay in relays or ("r1",):
        assert agent(RelayUp(relay)) == []
    assert agent(LeaseIs(WEB, LEASE)) == []
    return agent


def carrying(number: int = 1) -> tuple[Agent, Session]:
    """An agent with one flow, 1, on an open session."""
    agent = ready()
    agent(Want(1, WEB))
    (proceed,) = agent.opened(1, number)
    assert isinstance(proceed, Proceed)
    return agent, proceed.session


def ask(request: int, relay: str = "r1", lease: LeaseRef = LEASE) -> Send:
    return Send(relay, Open(request, WEB, lease))


C1, OTHER = ConnectorId("c1"), ConnectorId("c2")


def pinned(request: int, relay: str = "r1", connector: ConnectorId = C1) -> Send:
    return Send(relay, Open(request, WEB, LEASE, connector))


def close(number: int, reason: Reason, relay: str = "r1") -> Send:
    return Send(relay, Closed(sid(number), reason))
