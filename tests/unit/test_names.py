"""ztna.names: an object that exists is valid."""

from __future__ import annotations

import pytest

from ztna.errors import BadName
from ztna.names import ConnectorId, RelayName, ServiceName, SessionId, Zone, is_label


@pytest.mark.parametrize("text", ["a", "web-app", "0", "a" * 62, "x--y"])
def test_good_service_names(text: str) -> None:
    assert ServiceName(text) == text


@pytest.mark.parametrize(
    "text", ["", "A", "a" * 63, "-a", "a-", "_a", "a.b", "a b", "connector", "relay", "ns", "é", "a\n"]
)
def test_bad_service_names(text: str) -> None:
    with pytest.raises(BadName):
        ServiceName(text)


def test_connector_id_may_have_63_characters_and_names_its_certificate() -> None:
    assert ConnectorId("rack-7--b").name == "rack-7"
    assert ConnectorId("rack-7").name == "rack-7"
    assert ConnectorId("a" * 63) == "a" * 63
    with pytest.raises(BadName):
        ConnectorId("a" * 64)


@pytest.mark.parametrize("text", ["a", "edge-1", "0", "a" * 63])
def test_good_relay_names(text: str) -> None:
    assert RelayName(text) == text


@pytest.mark.parametrize(
    "text", ["", "Edge-1", "a" * 64, "-a", "edge--1", "relay.edge-1.ztna", "a b", "a_b", "a\n"]
)
def test_bad_relay_names(text: str) -> None:
    with pytest.raises(BadName, match=r"expected the <name> of relay\.<name>\.ztna in its certificate"):
        RelayName(text)


def test_zone_is_lower_case_without_trailing_dot() -> None:
    assert Zone("ZTNA.Local.") == "ztna.local"


@pytest.mark.parametrize("text", ["", ".", "a..b", "a_b.c", ".".join(["a" * 60] * 4)])
def test_bad_zones(text: str) -> None:
    with pytest.raises(BadName):
        Zone(text)


def test_session_ids_are_eight_bytes_in_hex() -> None:
    session = SessionId.from_bytes(bytes(range(8)))
    assert session == "0001020304050607"
    assert session.to_bytes() == bytes(range(8))


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "A" * 16, "g" * 16, "0" * 16 + "\n"])
def test_bad_session_ids(text: str) -> None:
    with pytest.raises(BadName):
        SessionId(text)


def test_is_label_takes_63_characters() -> None:
    assert is_label("a" * 63)
    assert not is_label("a" * 64)
