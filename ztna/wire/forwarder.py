"""What peers and the forwarder say beside the QUIC packets that it copies (UDP and TCP).

    bind       00 'Z' 'T' 'B' | id(16) | mac(16)                  36 bytes   peer -> forwarder
    challenge  00 'Z' 'T' 'C' | nonce(8)                          12 bytes   forwarder -> peer
    bound      00 'Z' 'T' 'b' | nonce(8) | 04 or 06 | address | port(2)      forwarder -> peer
    probe      00 'Z' 'T' 'P' | transaction(12) | mac(16)         32 bytes   peer -> peer
    answer     00 'Z' 'T' 'p' | transaction(12) | mac(16)         32 bytes   peer -> peer
    dial-in    00 'Z' 'T' 'D' | token(32)                         36 bytes   TCP, peer -> forwarder
                                                                  source: protocol.md, Forwarder

A first bind, whose nonce is not known yet, carries NO_MAC; on TCP `bound` carries NO_NONCE. Byte 0 of
0x00 cannot be QUIC v1 (RFC 9000 17.2, 17.3: the fixed bit). Keeps no table and checks no rate.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from ztna.errors import ProtocolError
from ztna.wire.control import BIND_ID_BYTES as BIND_ID_BYTES
from ztna.wire.control import TOKEN_BYTES as TOKEN_BYTES
from ztna.wire.control import Address

QUIC_FIXED_BIT = 0x40
MAC_BYTES = 16
NONCE_BYTES = 8
TRANSACTION_BYTES = 12
DIAL_IN_BYTES = 36
HEAD_BYTES = 4
BIND_BYTES = HEAD_BYTES + BIND_ID_BYTES + MAC_BYTES
PROBE_BYTES = HEAD_BYTES + TRANSACTION_BYTES + MAC_BYTES
BOUND_V4_BYTES = HEAD_BYTES + NONCE_BYTES + 1 + 4 + 2
BOUND_V6_BYTES = HEAD_BYTES + NONCE_BYTES + 1 + 16 + 2

NO_MAC = bytes(MAC_BYTES)
NO_NONCE = bytes(NONCE_BYTES)

BIND = b"\0ZTB"
CHALLENGE = b"\0ZTC"
BOUND = b"\0ZTb"
PROBE = b"\0ZTP"
PROBE_ANSWER = b"\0ZTp"
DIAL_IN = b"\0ZTD"

_PORT = struct.Struct(">H")


class Bind(msgspec.Struct, frozen=True):
    """Peer -> forwarder: make this source address the bind id's side of its link."""

    bind_id: bytes
    mac: bytes


class Challenge(msgspec.Struct, frozen=True):
    """Forwarder -> peer: bind again with the mac over this nonce."""

    nonce: bytes


class Bound(msgspec.Struct, frozen=True):
    """Forwarder -> peer: bound; the address that the forwarder saw."""

    nonce: bytes
    address: Address


class Probe(msgspec.Struct, frozen=True):
    """Peer -> peer on a candidate path."""

    transaction: bytes
    mac: bytes


class ProbeAnswer(msgspec.Struct, frozen=True):
    """The answer, with the probe's transaction."""

    transaction: bytes
    mac: bytes


ForwarderPacket = Bind | Challenge | Bound | Probe | ProbeAnswer


def is_quic(first_byte: int) -> bool:
    """Say whether a UDP packet that begins so is QUIC of a link, to be copied unread."""
    return first_byte & QUIC_FIXED_BIT != 0


def bind_mac(secret: bytes, nonce: bytes) -> bytes:
    """Return the 16 bytes that prove a bind: HMAC-SHA256(secret, nonce)[:16]."""
    return hmac.digest(secret, nonce, hashlib.sha256)[:MAC_BYTES]


def probe_mac(key: bytes, head: bytes) -> bytes:
    """Return the 16 bytes that prove a probe or answer, over the 16 bytes before them."""
    return hmac.digest(key, head, hashlib.sha256)[:MAC_BYTES]


def probe(key: bytes, transaction: bytes) -> bytes:
    """Return a whole probe, 32 bytes."""
    head = PROBE + transaction
    return head + probe_mac(key, head)


def probe_answer(key: bytes, transaction: bytes) -> bytes:
    """Return the whole answer to a probe, 32 bytes."""
    head = PROBE_ANSWER + transaction
    return head + probe_mac(key, head)


def is_genuine(key: bytes, packet: Probe | ProbeAnswer) -> bool:
    """Say whether a probe or answer was made with the key (constant time)."""
    head = (PROBE if isinstance(packet, Probe) else PROBE_ANSWER) + packet.transaction
    return hmac.compare_digest(packet.mac, probe_mac(key, head))


def proves_bind(secret: bytes, nonce: bytes, mac: bytes) -> bool:
    """Say whether a bind's mac is the one over this nonce (constant time)."""
    return hmac.compare_digest(mac, bind_mac(secret, nonce))


def dial_in(token: bytes) -> bytes:
    """Return the 36 bytes that a TCP connection to the forwarder begins with."""
    if len(token) != TOKEN_BYTES:
        raise ProtocolError(f"token of {len(token)} bytes: {TOKEN_BYTES}")
    return DIAL_IN + token


def parse_dial_in(data: bytes) -> bytes:
    """Return the token of the 36 bytes. Raises ProtocolError for anything else."""
    if len(data) != DIAL_IN_BYTES or data[:HEAD_BYTES] != DIAL_IN:
        raise ProtocolError("no dial-in")
    return data[HEAD_BYTES:]


def encode(packet: ForwarderPacket) -> bytes:
    """Return the packet's bytes. Raises ProtocolError when a field has not its length."""
    match packet:
        case Bind(bind_id, mac):
            return BIND + _exactly(bind_id, BIND_ID_BYTES) + _exactly(mac, MAC_BYTES)
        case Challenge(nonce):
            return CHALLENGE + _exactly(nonce, NONCE_BYTES)
        case Bound(nonce, address):
            packed = ip_address(address.ip).packed
            family = b"\x04" if len(packed) == 4 else b"\x06"
            return BOUND + _exactly(nonce, NONCE_BYTES) + family + packed + _PORT.pack(address.port)
        case Probe(transaction, mac):
            return PROBE + _exactly(transaction, TRANSACTION_BYTES) + _exactly(mac, MAC_BYTES)
        case _:
            return (
                PROBE_ANSWER
                + _exactly(packet.transaction, TRANSACTION_BYTES)
                + _exactly(packet.mac, MAC_BYTES)
            )


def decode(data: bytes) -> ForwarderPacket:
    """Read one packet that is not QUIC. Raises ProtocolError for anything that is none, and nothing else."""
    reader = _READERS.get(data[:HEAD_BYTES])
    if reader is None:
        raise ProtocolError("no forwarder packet")
    return reader(data)


def bound_bytes(start: bytes) -> int:
    """Return how long a `bound` is that begins with these 13 bytes, for a reader of TCP.

    Raises ProtocolError when they begin no `bound`.
    """
    family = start[HEAD_BYTES + NONCE_BYTES : HEAD_BYTES + NONCE_BYTES + 1]
    if start[:HEAD_BYTES] != BOUND or family not in _BOUND_BYTES:
        raise ProtocolError("no bound")
    return _BOUND_BYTES[family]


def _exactly(field: bytes, length: int) -> bytes:
    if len(field) != length:
        raise ProtocolError(f"field of {len(field)} bytes: {length}")
    return field


def _expect_length(data: bytes, length: int) -> None:
    if len(data) != length:
        raise ProtocolError(f"forwarder packet of {len(data)} bytes: {length}")


def _read_bind(data: bytes) -> Bind:
    _expect_length(data, BIND_BYTES)
    return Bind(data[4:20], data[20:])


def _read_challenge(data: bytes) -> Challenge:
    _expect_length(data, HEAD_BYTES + NONCE_BYTES)
    return Challenge(data[4:])


def _read_bound(data: bytes) -> Bound:
    _expect_length(data, bound_bytes(data))
    packed = data[13:-2]
    ip = str(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))
    return Bound(data[4:12], Address(ip, _PORT.unpack_from(data, len(data) - 2)[0]))


def _read_probe(data: bytes) -> Probe:
    _expect_length(data, PROBE_BYTES)
    return Probe(data[4:16], data[16:])


def _read_probe_answer(data: bytes) -> ProbeAnswer:
    _expect_length(data, PROBE_BYTES)
    return ProbeAnswer(data[4:16], data[16:])


_BOUND_BYTES = {b"\x04": BOUND_V4_BYTES, b"\x06": BOUND_V6_BYTES}
_READERS: dict[bytes, Callable[[bytes], ForwarderPacket]] = {
    BIND: _read_bind,
    CHALLENGE: _read_challenge,
    BOUND: _read_bound,
    PROBE: _read_probe,
    PROBE_ANSWER: _read_probe_answer,
}
