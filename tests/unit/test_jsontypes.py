"""ztna.jsontypes: our types in JSON, strictly."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest

from ztna.errors import ProtocolError
from ztna.jsontypes import (
    ERROR_TEXT_CHARACTERS,
    Binary,
    Secret,
    decode_hook,
    encode_hook,
    from_json,
    shortened,
    to_json,
)
from ztna.names import ServiceName


class Thing(msgspec.Struct, frozen=True):
    name: ServiceName
    ip: IPv4Address
    key: Secret = Secret()


def test_a_struct_of_our_types_round_trips() -> None:
    thing = Thing(ServiceName("web"), IPv4Address("10.0.0.1"), Secret(b"\xff\xfe"))
    assert to_json(thing) == b'{"name":"web","ip":"10.0.0.1","key":"__4"}'
    assert from_json(to_json(thing), Thing) == thing


def test_sets_come_out_sorted() -> None:
    assert to_json(frozenset("bca")) == b'["a","b","c"]'


@pytest.mark.parametrize("text", ["_-5", "__4=", "+/4", "a", "é", "__4\n", "_ _4"])
def test_base64url_is_strict(text: str) -> None:
    with pytest.raises(ValueError, match="base64url without padding"):
        decode_hook(Binary, text)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "truncated"),
        (b"[" * 100_000, "Expected `object`"),
        (b'{"x":' + b"[" * 100_000, "recursion"),
        (b'{"name":"\xff"}', "utf-8"),
        (b'{"name":1,"ip":"10.0.0.1"}', "expected text, got int - at `$.name`"),
        (b'{"name":"Web","ip":"10.0.0.1"}', "`$.name`"),
        (b'{"name":"web","ip":"10.0.0"}', "`$.ip`"),
    ],
)
def test_bad_json_is_a_protocol_error_that_says_where(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        from_json(data, Thing)
    assert said.lower() in str(caught.value).lower()  # msgspec 0.23 says UTF-8, earlier ones utf-8


def test_a_peers_text_is_cut_in_errors() -> None:
    with pytest.raises(ProtocolError) as caught:
        from_json(b'{"name":"%s","ip":"10.0.0.1"}' % (b"a" * 5000), Thing)
    assert len(str(caught.value)) < ERROR_TEXT_CHARACTERS + 50
    assert shortened("short") == "short"


def test_a_secret_never_shows() -> None:
    secret = Secret(b"hunter2")
    assert (
        "hunter2" not in f"{secret} {secret!r} {[secret]} {Thing(ServiceName('a'), IPv4Address(1), secret)}"
    )
    assert bytes(secret) == b"hunter2"


def test_networks_have_json_and_strangers_have_none() -> None:
    assert encode_hook(IPv4Network("10.0.0.0/8")) == "10.0.0.0/8"
    with pytest.raises(NotImplementedError, match="object"):
        encode_hook(object())
