"""ztna.wire.forwarder: layouts, macs and each way to be malformed."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from ztna.errors import ProtocolError
from ztna.wire.control import Address
from ztna.wire.forwarder import (
    NO_NONCE,
    Bind,
    Bound,
    Challenge,
    ForwarderPacket,
    Probe,
    ProbeAnswer,
    bind_mac,
    bound_bytes,
    decode,
    dial_in,
    encode,
    is_genuine,
    is_quic,
    parse_dial_in,
    probe,
    probe_answer,
    proves_bind,
)

ID = bytes(range(16))
MAC = bytes(range(16, 32))
NONCE = b"noncenon"
TRANSACTION = b"transaction!"
KEY = b"k" * 32

VECTORS: list[tuple[ForwarderPacket, bytes]] = [
    (Bind(ID, MAC), b"\0ZTB" + ID + MAC),
    (Challenge(NONCE), b"\0ZTC" + NONCE),
    (Bound(NONCE, Address("203.0.113.5", 54321)), b"\0ZTb" + NONCE + bytes.fromhex("04 cb007105 d431")),
    (Bound(NO_NONCE, Address("::1", 1)), b"\0ZTb" + bytes(8) + b"\x06" + bytes(15) + b"\x01\0\x01"),
    (Probe(TRANSACTION, MAC), b"\0ZTP" + TRANSACTION + MAC),
    (ProbeAnswer(TRANSACTION, MAC), b"\0ZTp" + TRANSACTION + MAC),
]


@pytest.mark.parametrize(("packet", "octets"), VECTORS, ids=lambda value: type(value).__name__)
def test_vectors(packet: ForwarderPacket, octets: bytes) -> None:
    assert encode(packet) == octets
    assert decode(octets) == packet
    assert not is_quic(octets[0])


@pytest.mark.parametrize(("packet", "octets"), VECTORS, ids=lambda value: type(value).__name__)
def test_one_byte_more_or_fewer_is_malformed(packet: ForwarderPacket, octets: bytes) -> None:
    for data in (octets[:-1], octets + b"\0", octets[:4], octets[:3]):
        with pytest.raises(ProtocolError):
            decode(data)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\0ZTD" + bytes(32), b"\0ZTX" + bytes(32), b"\x40ZTB" + bytes(32)]
)
def test_strangers_are_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize(
    "packet",
    [
        Bind(ID[1:], MAC), Bind(ID, MAC + b"x"), Challenge(b""), Bound(b"x", Address("::1", 1)),
        Probe(b"", MAC), Probe(TRANSACTION, b""), ProbeAnswer(b"", MAC), ProbeAnswer(TRANSACTION, b""),
    ],
)  # fmt: skip
def test_a_field_of_another_length_is_not_sent(packet: ForwarderPacket) -> None:
    with pytest.raises(ProtocolError):
        encode(packet)


def test_the_macs_are_those_of_the_protocol() -> None:
    assert bind_mac(KEY, NONCE) == hmac.new(KEY, NONCE, hashlib.sha256).digest()[:16]
    assert probe(KEY, TRANSACTION)[16:] == hmac.new(KEY, b"\0ZTP" + TRANSACTION, hashlib.sha256).digest()[:16]
    assert proves_bind(KEY, NONCE, bind_mac(KEY, NONCE))
    assert not proves_bind(KEY, b"othernon", bind_mac(KEY, NONCE))
    assert not proves_bind(b"other", NONCE, bind_mac(KEY, NONCE))


def test_a_probe_is_no_answer_and_needs_the_key() -> None:
    sent, answer = decode(probe(KEY, TRANSACTION)), decode(probe_answer(KEY, TRANSACTION))
    assert isinstance(sent, Probe)
    assert isinstance(answer, ProbeAnswer)
    assert is_genuine(KEY, sent)
    assert is_genuine(KEY, answer)
    assert not is_genuine(b"other", sent)
    assert not is_genuine(KEY, ProbeAnswer(sent.transaction, sent.mac))


def test_dial_in_is_36_bytes() -> None:
    token = bytes(range(32))
    assert dial_in(token) == b"\0ZTD" + token
    assert parse_dial_in(dial_in(token)) == token
    for data in (dial_in(token)[:-1], dial_in(token) + b"\0", b"\0ZTd" + token):
        with pytest.raises(ProtocolError):
            parse_dial_in(data)
    with pytest.raises(ProtocolError):
        dial_in(token[1:])


def test_a_reader_of_tcp_learns_how_long_a_bound_is() -> None:
    for address in (Address("203.0.113.5", 1), Address("::1", 1)):
        octets = encode(Bound(NO_NONCE, address))
        assert bound_bytes(octets[:13]) == len(octets)
    for data in (b"\0ZTb" + bytes(8), b"\0ZTb" + bytes(8) + b"\x05", b"\0ZTC" + bytes(8) + b"\x04"):
        with pytest.raises(ProtocolError):
            bound_bytes(data)


def test_quic_has_the_fixed_bit() -> None:
    assert is_quic(0x40)
    assert is_quic(0xC0)
    assert not is_quic(0x80)
