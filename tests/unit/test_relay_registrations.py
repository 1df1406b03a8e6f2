"""Who serves what: the newest connection of a connector id is the one to use."""

from __future__ import annotations

from relay.registrations import Registrations
from ztna.names import ConnectorId, ServiceName

WEB = ServiceName("web")
RACK = ConnectorId("rack-7")


def test_the_newest_connection_of_a_connector_serves_until_it_goes() -> None:
    serving = Registrations()
    assert not serving.add(1, RACK, WEB)
    assert serving.add(2, RACK, WEB)
    assert not serving.add(1, RACK, WEB), "it was there already, and stays the older one"
    assert serving.live(WEB) == {RACK: 2}
    serving.remove(2, RACK, WEB)
    assert serving.live(WEB) == {RACK: 1}
    serving.add(3, ConnectorId("rack-8"), WEB)
    serving.remove(1, RACK, WEB)
    assert WEB in serving
    serving.remove(3, ConnectorId("rack-8"), WEB)
    assert WEB not in serving
    assert (serving.live(WEB), serving.services) == ({}, frozenset())
