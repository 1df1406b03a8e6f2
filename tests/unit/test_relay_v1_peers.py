"""The legs of v1 sessions while a relay closes: one end has gone, and what the other still sends is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from relay.state import Attempt, Session
from relay.v1_peers import Legs
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import build_udp
from ztna.telemetry import DROPS
from ztna.wire import control, datagram

ALICE, X = 1, 2
SERVICE = ServiceName("test-service")
ID = SessionId(f"{1:016x}")
PACKET = build_udp("192.0.2.1", 5000, "10.100.0.1", 7, b"hello")


def test_a_packet_for_an_end_that_is_closed_already_is_dropped() -> None:
    session = Session(ID, SERVICE, ALICE, X, ConnectorId("con-x"), "alice", Attempt(control.Open(1, SERVICE)))
    session.opened_at = 0.0
    sessions: Any = SimpleNamespace(sessions={ID: session})
    legs = Legs(sessions, {})
    before = DROPS.labels("relay", "peer_gone")._value.get()
    legs.to_connector(ALICE, ID, PACKET)
    legs.to_agent(X, datagram.encode(datagram.SessionPacket(ID, PACKET)))
    assert DROPS.labels("relay", "peer_gone")._value.get() == before + 2
    assert session.v1_bytes == 0
