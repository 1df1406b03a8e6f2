"""ztna.cli.top, without a terminal: what it says of ports where no daemon of ours is, and of one whose state is odd."""

from __future__ import annotations

import json

import pytest

from tests.unit.test_cli_completing import answering
from ztna.cli.top import Watch

READINESS = {"ready": True, "awaiting": {}, "warnings": {}}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({}, "no daemon of ours"),
        ({"error": "only from this host"}, "only from this host"),
        ({"readiness": READINESS, "sessions": [{}]}, "not what this version"),
        ({"readiness": {}}, "not what this version"),
        ([1], "bad JSON"),
    ],
)
def test_what_is_no_state_of_ours_is_told_and_not_fatal(answer: object, told: str) -> None:
    with answering(json.dumps(answer).encode()) as address:
        snapshot = Watch([("relay", address)], only_running=False).look()
    assert snapshot.rows == [] and told in snapshot.errors["relay"]


def test_who_never_answered_is_left_out_unless_it_was_named() -> None:
    nowhere = [("relay", "127.0.0.1:1")]
    assert Watch(nowhere, only_running=True).look().errors == {}
    assert "refused" in Watch(nowhere, only_running=False).look().errors["relay"]


def test_rates_begin_with_the_second_look() -> None:
    session = {"service": "a", "connector_id": "c", "open": True, "path": "forwarded", "bytes": 5}
    with answering(json.dumps({"readiness": READINESS, "sessions": [session]}).encode()) as address:
        watch = Watch([("relay", address)], only_running=True)
        assert watch.look().rows[0].relayed_per_s is None
        assert watch.look().rows[0].relayed_per_s == 0
