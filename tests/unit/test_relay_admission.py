"""Who is let in, and what may be registered."""

from __future__ import annotations

import pytest

from relay import admission
from relay.admission import Doorkeeper, registration_refusal
from tests.support.identities import identity
from ztna.errors import Refused
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason

AGENT = identity("alice", agent=["web"])
CONNECTOR = identity("con", connector=["web"], id_name="con-x")


def reason_of(doorkeeper: Doorkeeper, who: object = AGENT) -> Reason | None:
    try:
        doorkeeper.admit(who)  # type: ignore[arg-type]
    except Refused as error:
        return error.reason
    return None


@pytest.mark.parametrize("who", [AGENT, CONNECTOR])
def test_agents_and_connectors_come_in(who: object) -> None:
    assert reason_of(Doorkeeper(), who) is None


def test_a_relay_is_neither() -> None:
    assert reason_of(Doorkeeper(), identity("r", relay="edge")) is Reason.NO_GRANT


def test_nobody_comes_in_while_draining() -> None:
    assert reason_of(Doorkeeper(draining=True)) is Reason.DRAINING


def test_connections_of_one_identity_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "CONNECTIONS_PER_IDENTITY_MAX", 2)
    doorkeeper = Doorkeeper()
    doorkeeper.entered(AGENT)
    doorkeeper.entered(AGENT)
    assert reason_of(doorkeeper) is Reason.LIMIT_REACHED
    assert reason_of(doorkeeper, CONNECTOR) is None
    doorkeeper.left(AGENT)
    assert reason_of(doorkeeper) is None
    doorkeeper.left(AGENT)
    assert not doorkeeper._names


def test_connections_in_all_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "CONNECTIONS_MAX", 1)
    doorkeeper = Doorkeeper()
    doorkeeper.entered(AGENT)
    assert reason_of(doorkeeper, CONNECTOR) is Reason.LIMIT_REACHED


@pytest.mark.parametrize(
    ("connector_id", "service", "registered", "reason"),
    [
        ("con-x", "web", 0, None),
        ("con-x--replica", "web", 0, None),
        ("con-y", "web", 0, Reason.NO_GRANT),
        ("con-x", "db", 0, Reason.NO_GRANT),
        ("con-x", "web", admission.SERVICES_PER_CONNECTION_MAX, Reason.LIMIT_REACHED),
    ],
)
def test_what_may_be_registered(
    connector_id: str, service: str, registered: int, reason: Reason | None
) -> None:
    refusal = registration_refusal(CONNECTOR, ConnectorId(connector_id), ServiceName(service), registered)
    assert refusal is reason


def test_an_agent_registers_nothing() -> None:
    assert registration_refusal(AGENT, ConnectorId("con-x"), ServiceName("web"), 0) is Reason.NO_GRANT
