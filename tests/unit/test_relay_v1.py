"""A v1 agent's datagrams in, what they come to out; the vectors of protocol.md byte for byte."""

from __future__ import annotations

import itertools

import pytest

from relay import v1
from relay.commands import Refusal
from relay.state import Attempt, Session
from relay.v1 import (
    ASKS_PER_SECOND_MAX,
    SERVICES_PER_AGENT_MAX,
    Agent,
    Answer,
    Ask,
    Command,
    Drop,
    Leave,
    PassOn,
)
from tests.support.identities import identity
from ztna.errors import Refused
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import build_udp
from ztna.reasons import Reason
from ztna.wire import control

ALICE, X = 1, 2
SERVICE = ServiceName("test-service")
REGISTER = bytes.fromhex("100c746573742d73657276696365")
ACK = bytes.fromhex("12000c746573742d73657276696365")
PACKET = build_udp("192.0.2.1", 5000, "10.100.0.1", 7, b"hello")
FIRST, SECOND = SessionId(f"{1:016x}"), SessionId(f"{2:016x}")


class World:
    """One agent, a clock, and what relay.sessions was asked."""

    def __init__(self, *services: str) -> None:
        self.agent = Agent(ALICE, identity("alice", agent=services or ("test-service", "other")))
        self.now = 100.0

    def send(self, data: bytes) -> list[Command]:
        return self.agent.datagram(data, self.now)

    def told(self, message: control.AnyMessage) -> list[Command]:
        return self.agent.told(message, self.now)

    def opened(self, request: int = 1, session: SessionId = FIRST) -> list[Command]:
        return self.told(control.Opened(request, session, SERVICE, ConnectorId("con-x"), "f" * 64))

    def denied(self, reason: Reason, request: int = 1) -> list[Command]:
        return self.told(control.Denied(request, SERVICE, reason))

    def registered(self) -> None:
        self.send(REGISTER)
        self.opened()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def registered(world: World) -> World:
    world.registered()
    return world


def nacked(commands: list[Command]) -> bytes:
    """Return the NACK; that it is counted goes with it."""
    answer, *rest = commands
    assert isinstance(answer, Answer) and answer.data[0] == 0x13
    assert all(isinstance(each, Refusal) for each in rest)
    return answer.data


def service_packet(service: bytes, packet: bytes = PACKET) -> bytes:
    return bytes((0x2F, len(service))) + service + packet


# Registering


def test_a_registration_opens_a_session_and_is_acked_when_it_is_open(world: World) -> None:
    assert world.send(REGISTER) == [Ask(control.Open(1, SERVICE))]
    assert world.opened() == [Answer(ACK)]


def test_repeats_are_acked_again_and_trailing_bytes_ignored(registered: World) -> None:
    assert registered.send(REGISTER) == [Answer(ACK)]
    assert registered.send(REGISTER + b"more") == [Answer(ACK)]


def test_a_repeat_while_it_is_asked_about_waits_for_the_same_answer(world: World) -> None:
    world.send(REGISTER)
    assert world.send(REGISTER) == []
    assert world.opened() == [Answer(ACK)]


def test_several_services_on_one_connection(registered: World) -> None:
    assert registered.send(b"\x10\x05other") == [Ask(control.Open(2, ServiceName("other")))]
    assert registered.opened(2, SECOND) == [Answer(b"\x12\x00\x05other")]
    assert registered.send(service_packet(b"other")) == [PassOn(SECOND, PACKET)]
    assert registered.send(service_packet(SERVICE.encode())) == [PassOn(FIRST, PACKET)]


@pytest.mark.parametrize("raw", [b"\x10\x00", b"\x10\x01\xff", b"\x11\x00", b"\x11\x02\xc3("])
def test_status_01_is_not_utf8_or_empty(world: World, raw: bytes) -> None:
    assert nacked(world.send(raw)) == b"\x13\x01\x00"


@pytest.mark.parametrize(
    ("reason", "status"),
    [(Reason.NO_GRANT, b"\x02"), (Reason.NO_SUCH_SERVICE, b"\x04"), (Reason.LIMIT_REACHED, b"\x05")],
)
def test_statuses_02_04_05_are_the_sessions_own_refusals(world: World, reason: Reason, status: bytes) -> None:
    world.send(REGISTER)
    assert world.denied(reason) == [Answer(b"\x13" + status + REGISTER[1:])]
    # It was forgotten: its packets go nowhere, and registering asks anew.
    assert world.send(service_packet(SERVICE.encode())) == [Drop("not_registered")]
    assert world.send(REGISTER) == [Ask(control.Open(2, SERVICE))]


def test_status_03_is_for_v1_connectors(world: World) -> None:
    [answer, refusal] = world.send(b"\x11" + REGISTER[1:])
    assert answer == Answer(b"\x13\x03" + REGISTER[1:])
    assert refusal == Refusal(ALICE, "alice", "v1 registration", Reason.NO_GRANT, "test-service")


def test_what_no_service_is_called_is_refused_like_any_other_name() -> None:
    upper = b"\x10\x03Web"
    assert nacked(World("web").send(upper)) == b"\x13\x02\x03Web"
    assert nacked(World("*").send(upper)) == b"\x13\x04\x03Web"


def test_status_05_at_the_limit_of_services(world: World) -> None:
    for number in range(SERVICES_PER_AGENT_MAX):
        world.now += 1
        assert isinstance(world.send(b"\x10\x05s%04d" % number)[0], Ask)
    world.now += 1
    assert nacked(world.send(REGISTER)) == b"\x13\x05" + REGISTER[1:]


def test_a_flood_of_registrations_costs_no_more_than_so_many_a_second(world: World) -> None:
    for _ in range(ASKS_PER_SECOND_MAX):
        assert nacked(world.send(b"\x10\x00"))
    assert world.send(b"\x10\x00") == [Drop("registrations_per_second")]
    assert world.send(b"\x11\x01a") == [Drop("registrations_per_second")]
    assert world.send(REGISTER) == [Drop("registrations_per_second")]
    world.now += 1
    assert world.send(REGISTER) == [Ask(control.Open(1, SERVICE))]


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x10", b"\x10\x05abcd", b"\x11", b"\x11\x02a", b"\x2f", b"\x2f\x03abc", b"\x2f\x00x", b"\x99"],
)
def test_short_and_truncated_ones_are_dropped(world: World, raw: bytes) -> None:
    assert world.send(raw) == [Drop("malformed_datagram")]


def test_what_only_others_send_is_dropped(registered: World) -> None:
    assert registered.send(b"\x2e" + FIRST.to_bytes() + PACKET) == [Drop("unexpected_datagram")]
    assert registered.send(ACK) == [Drop("unexpected_datagram")]


# Packets


def test_a_packet_for_a_service_that_is_not_registered_goes_nowhere(world: World) -> None:
    assert world.send(service_packet(b"other")) == [Drop("not_registered")]
    world.send(REGISTER)
    assert world.send(service_packet(SERVICE.encode())) == [Drop("not_registered")]


def test_a_raw_packet_is_for_the_only_service(registered: World) -> None:
    assert registered.send(PACKET) == [PassOn(FIRST, PACKET)]
    registered.send(b"\x10\x05other")
    assert registered.send(PACKET) == [Drop("not_registered")]


def test_a_raw_packet_without_any_service_goes_nowhere(world: World) -> None:
    assert world.send(PACKET) == [Drop("not_registered")]


# What becomes of sessions


def test_a_refusal_that_passes_leaves_the_registration_standing(world: World) -> None:
    world.send(REGISTER)
    assert world.denied(Reason.NO_HEALTHY_CONNECTOR) == [Answer(ACK)]
    assert world.send(service_packet(SERVICE.encode())) == [Drop("no_session")]
    world.now += 1
    assert world.send(service_packet(SERVICE.encode())) == [Drop("no_session"), Ask(control.Open(2, SERVICE))]
    assert world.send(service_packet(SERVICE.encode())) == [Drop("no_session")]
    assert world.opened(2) == []
    assert world.send(service_packet(SERVICE.encode())) == [PassOn(FIRST, PACKET)]


def test_a_session_that_ended_is_asked_for_again_at_once(registered: World) -> None:
    registered.now += 1
    assert registered.told(control.Closed(FIRST, Reason.PEER_GONE)) == [Ask(control.Open(2, SERVICE))]


def test_a_session_that_was_idle_begins_anew_with_the_next_packet(registered: World) -> None:
    registered.now += 1
    assert registered.told(control.Closed(FIRST, Reason.CLOSED_BY_PEER)) == []
    assert Ask(control.Open(2, SERVICE)) in registered.send(PACKET)
    assert registered.opened(2, SECOND) == []
    assert registered.send(PACKET) == [PassOn(SECOND, PACKET)]


def test_no_registration_that_stands_is_taken_back(registered: World) -> None:
    registered.now += 1
    registered.told(control.Closed(FIRST, Reason.NO_GRANT))
    assert registered.denied(Reason.NO_GRANT, request=2) == []
    assert registered.send(REGISTER) == [Answer(ACK)]


def test_who_stays_refused_asks_ever_more_rarely(world: World) -> None:
    world.send(REGISTER)
    world.denied(Reason.POLICY_UNKNOWN)
    asked = []
    for second in range(100):
        world.now += 1
        for command in world.send(PACKET):
            if isinstance(command, Ask):
                asked.append(second)
                world.denied(Reason.POLICY_UNKNOWN, command.message.request)
    assert [later - earlier for earlier, later in itertools.pairwise(asked)] == [
        2,
        4,
        8,
        16,
        30,
        30,
    ]


def test_health_that_returns_opens_the_session(world: World) -> None:
    world.send(REGISTER)
    world.denied(Reason.NO_HEALTHY_CONNECTOR)
    world.now += 1
    assert world.told(control.Health(SERVICE, "critical")) == []
    assert world.told(control.Health(ServiceName("other"), "passing")) == []
    assert world.told(control.Health(SERVICE, "passing")) == [Ask(control.Open(2, SERVICE))]
    world.opened(2)
    assert world.told(control.Health(SERVICE, "passing")) == []


def test_health_opens_nothing_that_was_not_asked_for_or_is_not_answered(world: World) -> None:
    assert world.told(control.Health(SERVICE, "passing")) == []
    world.send(REGISTER)
    world.now += 1
    assert world.told(control.Health(SERVICE, "passing")) == []


def test_a_relay_that_drains_ends_the_connection(world: World) -> None:
    assert world.told(control.Drain(25.0)) == [Leave()]


def test_other_messages_mean_nothing_here(world: World) -> None:
    assert world.told(control.Hello()) == []


# Whose packets


def session(open_: bool = True) -> Session:
    attempt = Attempt(control.Open(1, SERVICE))
    return Session(FIRST, SERVICE, ALICE, X, ConnectorId("con-x"), "alice", attempt, 1.0 if open_ else None)


def test_packets_pass_between_the_two_ends_of_an_open_session_only() -> None:
    assert v1.connector_of(session(), ALICE) == X
    assert v1.agent_of(session(), X) == ALICE
    for asked in (
        lambda: v1.connector_of(session(), 9),
        lambda: v1.connector_of(None, ALICE),
        lambda: v1.connector_of(session(open_=False), ALICE),
        lambda: v1.agent_of(session(), ALICE),
        lambda: v1.agent_of(session(), 9),
        lambda: v1.agent_of(None, X),
        lambda: v1.agent_of(session(open_=False), X),
    ):
        with pytest.raises(Refused) as caught:
            asked()
        assert caught.value.reason is Reason.NOT_YOUR_SESSION
