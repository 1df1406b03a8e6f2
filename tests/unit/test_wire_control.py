"""ztna.wire.control: frames of every message, and each way to be malformed."""

from __future__ import annotations

import json
import struct
from ipaddress import IPv4Address
from typing import Any

import pytest

from ztna.errors import ProtocolError
from ztna.jsontypes import encode_hook
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import (
    CANDIDATES_MAX,
    DNS_QUERY_BYTES_MAX,
    DNS_RESPONSE_BYTES_MAX,
    FEATURES,
    MESSAGE_BYTES_MAX,
    Accepted,
    Address,
    AnyMessage,
    Binary,
    CandidateAnswer,
    CandidateOffer,
    Carry,
    Closed,
    Conflict,
    Denied,
    Dial,
    DialToken,
    DnsQuery,
    DnsResponse,
    Drain,
    ForwarderBind,
    FrameReader,
    Goodbye,
    Health,
    Hello,
    LeaseRef,
    Offered,
    Offering,
    Open,
    Opened,
    PeerIdentity,
    Ping,
    Pong,
    PunchingResult,
    Refused,
    Register,
    Registered,
    Retired,
    Secret,
    StartPunching,
    UnknownMessage,
    encode,
)

SESSION = SessionId("00010203040506ff")
WEB = ServiceName("web")
ADDRESS = Address("192.0.2.7", 4435)
LEASE = LeaseRef(IPv4Address("10.100.0.2"), 1_700_000_000_000)
BIND = ForwarderBind(Address("::1", 4434), Binary(bytes(16)), Secret(b"s" * 32))
FINGERPRINT = "ab" * 32
CONNECTOR = ConnectorId("rack-7--b")
PROBE_KEY = Secret(b"p" * 32)

MESSAGES: list[AnyMessage] = [
    Hello(),
    Register(CONNECTOR, (Offering(WEB, (Port("tcp", 80), Port("udp", 53))),), ADDRESS),
    Registered(WEB),
    Refused("WEB", Reason.NO_GRANT),
    Open(1, WEB, LEASE, CONNECTOR),
    Open(2, WEB),
    Offered(SESSION, WEB, PeerIdentity("alice", FINGERPRINT), LEASE, BIND, Secret(b"p" * 32), True),
    Accepted(SESSION),
    Opened(1, SESSION, WEB, CONNECTOR, FINGERPRINT, ADDRESS, BIND, Secret(b"p" * 32)),
    Denied(1, "web", Reason.NO_HEALTHY_CONNECTOR),
    Dial(SESSION),
    DialToken(SESSION, Secret(b"t" * 32)),
    Carry(SESSION, Secret(b"t" * 32)),
    Closed(SESSION, Reason.PEER_GONE),
    CandidateOffer(SESSION, (ADDRESS,) * CANDIDATES_MAX),
    CandidateAnswer(SESSION, ()),
    StartPunching(SESSION, (ADDRESS,)),
    PunchingResult(SESSION, True, ADDRESS),
    Health(WEB, "passing"),
    Conflict(cidr="10.100.0.0/16", with_="docker0", detail="route"),
    Drain(25.0, ("edge-2",)),
    Retired(SESSION),
    DnsQuery(1, Binary(bytes(12))),
    DnsResponse(1, Binary(bytes(DNS_RESPONSE_BYTES_MAX))),
]


def frame(body: Any) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack(">I", len(raw)) + raw


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_each_message_round_trips(message: AnyMessage) -> None:
    assert FrameReader().feed(encode(message)) == [message]


def test_the_features_are_the_messages() -> None:
    assert {json.loads(encode(message)[4:])["type"] for message in MESSAGES} == FEATURES | {"hello"}


def test_the_layout_is_that_of_the_protocol() -> None:
    assert encode(Dial(SESSION)) == b'\0\0\0\x2c{"type":"dial","session":"00010203040506ff"}'
    assert b'"with":"docker0"' in encode(MESSAGES[-5])
    assert b'"bind_id":"AAAAAAAAAAAAAAAAAAAAAA"' in encode(MESSAGES[6])


def test_frames_may_come_in_any_pieces() -> None:
    data = b"".join(map(encode, MESSAGES))
    reader = FrameReader()
    assert [message for byte in data for message in reader.feed(bytes((byte,)))] == MESSAGES
    assert FrameReader().feed(data) == MESSAGES


@pytest.mark.parametrize(
    ("kind", "size"),
    [("dns_query", 11), ("dns_query", DNS_QUERY_BYTES_MAX + 1), ("dns_response", DNS_RESPONSE_BYTES_MAX + 1)],
)
def test_dns_messages_are_neither_too_short_nor_too_long(kind: str, size: int) -> None:
    message = {"type": kind, "request": 1, "message": encode_hook(Binary(bytes(size)))}
    with pytest.raises(ProtocolError, match="expected 12 to"):
        FrameReader().feed(frame(message))


@pytest.mark.parametrize("size", [0, 15, 65])
def test_secrets_and_ids_have_their_sizes(size: int) -> None:
    """Also those of a relay that is not what it was: nothing later has to cope with another size."""
    wrong = "A" * (size * 4 // 3 + bool(size % 3))
    identity = {"name": "ann", "fingerprint": FINGERPRINT}
    offered: dict[str, Any] = json.loads(
        encode(Offered(SESSION, WEB, PeerIdentity(**identity), LEASE, BIND, PROBE_KEY))[4:]
    )
    opened = json.loads(encode(Opened(1, SESSION, WEB, CONNECTOR, FINGERPRINT, None, BIND, PROBE_KEY))[4:])
    for good in (offered, opened):
        assert len(FrameReader().feed(frame(good))) == 1
        for bad in (
            {"probe_key": wrong},
            {"forwarder": good["forwarder"] | {"bind_id": wrong}},
            {"forwarder": good["forwarder"] | {"bind_secret": wrong}},
        ):
            with pytest.raises(ProtocolError, match="expected"):
                FrameReader().feed(frame(good | bad))
    for kind in ("dial_token", "carry"):
        with pytest.raises(ProtocolError, match="token"):
            FrameReader().feed(frame({"type": kind, "session": SESSION, "token": wrong}))


def test_without_a_forwarder_no_probe_key_is_needed() -> None:
    ann = PeerIdentity("ann", FINGERPRINT)
    for message in (Offered(SESSION, WEB, ann), Opened(1, SESSION, WEB, CONNECTOR, FINGERPRINT)):
        assert FrameReader().feed(encode(message)) == [message]


def test_unknown_fields_are_ignored_and_counted() -> None:
    reader = FrameReader()
    assert reader.feed(frame({"type": "dial", "session": SESSION, "new": [1]})) == [Dial(SESSION)]
    assert (reader.take_unknown_fields(), reader.take_unknown_fields()) == (1, 0)


def test_unknown_fields_are_counted_wherever_they_lie() -> None:
    offering = {"name": "web", "ports": [{"protocol": "tcp", "port": 80, "since": 1}], "weight": {"of": 2}}
    address = {"ip": "192.0.2.7", "port": 1, "zone": "b"}
    register = {"type": "register", "connector_id": "con-1", "services": [offering], "link_address": address}
    reader = FrameReader()
    for feed in (reader.feed, reader.feed_tls):
        (message,) = feed(frame(register))
        assert isinstance(message, Register)
        assert reader.take_unknown_fields() == 3


@pytest.mark.parametrize("value", [b"1e999", b"1" * 5000, b'"\xff"'])
def test_an_unknown_field_may_hold_what_nobody_here_could_read(value: bytes) -> None:
    body = b'{"type":"dial","session":"%s","new":%s,"newer":[%s]}' % (SESSION.encode(), value, value)
    reader = FrameReader()
    for feed in (reader.feed, reader.feed_tls):
        assert feed(struct.pack(">I", len(body)) + body) == [Dial(SESSION)]
        assert reader.take_unknown_fields() == 2


def test_an_unknown_fields_name_may_be_no_text() -> None:
    body = b'{"type":"dial","session":"%s","\xff":1}' % SESSION.encode()
    reader = FrameReader()
    assert reader.feed(struct.pack(">I", len(body)) + body) == [Dial(SESSION)]
    assert reader.take_unknown_fields() == 1


def test_a_field_that_is_called_otherwise_here_is_known() -> None:
    reader = FrameReader()
    reader.feed(frame({"type": "conflict", "cidr": "10.0.0.0/8", "with": "10.1.0.0/16"}))
    reader.feed(frame({"type": "next_year", "new": 1}))
    assert reader.take_unknown_fields() == 0


def test_a_release_is_told_in_few_words() -> None:
    for kind, fields in (("hello", {}), ("register", {"connector_id": "con-1", "services": []})):
        (message,) = FrameReader().feed(frame({"type": kind, "software": "0.2.0", **fields}))
        assert isinstance(message, Hello | Register)
        assert message.software == "0.2.0"


def test_of_a_release_from_the_future_what_can_be_shown_is_kept() -> None:
    for kind, fields in (("hello", {}), ("register", {"connector_id": "con-1", "services": []})):
        for said, shown in (
            ("9" * 65, "9" * 64),
            ("9" * 60_000, "9" * 64),
            ("9.0\x1b[2J\n\u202e+caf\u00e9", "9.0?[2J??+caf\u00e9"),
            ("\n" * 65, "?" * 64),
        ):
            (message,) = FrameReader().feed(frame({"type": kind, "software": said, **fields}))
            assert isinstance(message, Hello | Register)
            assert message.software == shown
            assert FrameReader().feed(encode(message)) == [message]
        with pytest.raises(ProtocolError, match="software"):
            FrameReader().feed(frame({"type": kind, "software": 9, **fields}))


def test_unknown_types_are_told_apart_and_cut() -> None:
    assert FrameReader().feed(frame({"type": "next_year"})) == [UnknownMessage("next_year")]
    (message,) = FrameReader().feed(frame({"type": "x" * 1000}))
    assert isinstance(message, UnknownMessage)
    assert len(message.type) == 64


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"nonsense", b"\xff", b'{"type":1}', b'{"type":"dial"', b"[" * 60_000,
        b'{"x":' + b"[" * 60_000,
        {"type": "dial"}, {"type": "dial", "session": "xyz"}, {"type": "dial", "session": SESSION.upper()},
        {"type": "closed", "session": SESSION, "reason": "because"},
        {"type": "open", "request": -1, "service": "web"}, {"type": "open", "request": 2**63, "service": "web"},
        {"type": "open", "request": 1, "service": "Web"}, {"type": "open", "request": 1, "service": "relay"},
        {"type": "open", "request": 1, "service": "web", "lease": {"ip": "10.0.0.256", "epoch": 1}},
        {"type": "open", "request": 1, "service": "web", "lease": {"ip": "10.0.0.1", "epoch": -1}},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "192.0.2.7", "port": 1}] * 9},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "192.0.2.07", "port": 1}]},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "host", "port": 1}]},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "fe80::1%eth0", "port": 1}]},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "2001:DB8::1", "port": 1}]},
        {"type": "candidate_offer", "session": SESSION, "candidates": [{"ip": "192.0.2.7", "port": 65536}]},
        {"type": "carry", "session": SESSION, "token": "a b"},
        {"type": "start_punching", "session": SESSION, "candidates": [], "delay_ms": 10_001},
        {"type": "drain", "deadline_s": -1},
    ],
    ids=lambda body: str(body)[:60],
)  # fmt: skip
def test_malformed(body: Any) -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(frame(body))


def test_an_oversized_frame_is_refused_by_its_length() -> None:
    with pytest.raises(ProtocolError, match="65537"):
        FrameReader().feed(struct.pack(">I", MESSAGE_BYTES_MAX + 1))


def test_an_oversized_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        encode(Denied(1, "x" * MESSAGE_BYTES_MAX, Reason.NO_GRANT))


def test_secrets_do_not_show() -> None:
    assert "ssss" not in repr(BIND)
    assert "***" in repr(BIND)


def test_addresses_print_as_usual() -> None:
    assert str(ADDRESS) == "192.0.2.7:4435"
    assert str(Address("::1", 1)) == "[::1]:1"


LIFE = (Ping(), Pong(), Goodbye(0, "server shutting down"))


def test_over_tls_there_are_signs_of_life_and_an_end() -> None:
    said = b"".join(encode(each) for each in (*LIFE, Hello()))
    assert FrameReader().feed_tls(said) == [*LIFE, Hello()]
    assert FrameReader().feed_tls(_frame(b'{"type":"novel"}')) == [UnknownMessage("novel")]


@pytest.mark.parametrize("message", LIFE)
def test_over_quic_they_mean_nothing(message: Ping | Pong | Goodbye) -> None:
    (heard,) = FrameReader().feed(encode(message))
    assert isinstance(heard, UnknownMessage)


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"goodbye"}',
        b'{"type":"goodbye","code":-1}',
        b'{"type":"goodbye","code":0,"reason":"%s"}' % (b"x" * 257),
    ],
)
def test_a_goodbye_that_is_none(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed_tls(_frame(body))


def _frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body
