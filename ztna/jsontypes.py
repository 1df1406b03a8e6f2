"""JSON for our own types: names, addresses and binary fields as msgspec hooks.

The control stream, the stream frames, the records in Consul's KV and the configuration share them.
Pure; knows no message and no file.
"""

from __future__ import annotations

import base64
import binascii
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeVar

import msgspec

from ztna.errors import BadName, ProtocolError

ERROR_TEXT_CHARACTERS = 200

_IP_TYPES = (IPv4Address, IPv4Network, IPv6Address, IPv6Network)

T = TypeVar("T")


class Binary(bytes):
    """Bytes that travel as base64url without padding."""

    __slots__ = ()


class Secret(Binary):
    """Binary that must never be seen in a log: its repr is `***`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


def to_json(value: object) -> bytes:
    """Return the value as JSON; sets come out sorted, so equal values are equal bytes."""
    return _ENCODER.encode(value)


def from_json(data: bytes | bytearray | memoryview, type_: type[T]) -> T:
    """Read one value of the type. Raises ProtocolError, whose text names the path, and nothing else."""
    return decoding(msgspec.json.Decoder(type_, dec_hook=decode_hook), data)


def decoding(decoder: msgspec.json.Decoder[T], data: bytes | bytearray | memoryview) -> T:
    """Read one value with a decoder that was made before. Raises ProtocolError and nothing else."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"bad JSON: {shortened(str(error))}") from None


def shortened(text: str) -> str:
    """Return at most ERROR_TEXT_CHARACTERS of a text that a peer may have had a hand in."""
    return text if len(text) <= ERROR_TEXT_CHARACTERS else text[:ERROR_TEXT_CHARACTERS] + "..."


def encode_hook(value: Any) -> str:
    """Give msgspec the text of a value it does not know (`enc_hook`)."""
    if isinstance(value, Binary):
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii")
    if isinstance(value, (str, *_IP_TYPES)):
        return str(value)
    raise NotImplementedError(f"no JSON for {type(value).__name__}")


def decode_hook(type_: Any, value: Any) -> Any:
    """Make a value of one of our types from JSON's text (`dec_hook`); ValueError says what was expected."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    if issubclass(type_, Binary):
        return type_(_base64url(value))
    try:
        return type_(value)
    except BadName as error:
        raise ValueError(str(error)) from None


def _base64url(text: str) -> bytes:
    """Decode strictly: only the alphabet of RFC 4648 5, no padding, no bits left over."""
    try:
        raw = base64.b64decode(text.translate(_URL_ALPHABET) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected base64url without padding") from None
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != text.encode():
        raise ValueError("expected base64url without padding")
    return raw


_URL_ALPHABET = str.maketrans("-_", "+/")
_ENCODER = msgspec.json.Encoder(enc_hook=encode_hook, order="deterministic")
