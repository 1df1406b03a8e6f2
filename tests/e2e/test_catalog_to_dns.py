"""A change in Consul's catalog is in dnsd's answers within a second."""

from __future__ import annotations

import time

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import lab, until

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

FLIPS = 10
CHANGE_SECONDS = 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_each_flip_of_a_check_is_answered_within_a_second(request: pytest.FixtureRequest, kind: str) -> None:
    note_version(request, kind)
    with lab("core") as made:
        made.start_consul(kind)
        made.dnsd().wait_ready()
        definition = {
            "Name": "web-app",
            "ID": "web-app@box",
            "Tags": ["ztna"],
            "Address": "192.0.2.7",
            "Port": 4435,
            "Meta": {"ztna-connector": "box", "ztna-ports": "tcp:8080"},
            "Check": {"CheckID": "box", "TTL": "10m", "Status": "passing"},
        }
        made.consul_put("/v1/agent/service/register", definition)
        until("named", lambda: made.dig("core", "web-app.ztna.local", "SRV"))
        took = []
        for number in range(FLIPS):
            passing = number % 2 == 1
            made.consul_put("/v1/agent/check/update/box", {"Status": "passing" if passing else "critical"})
            changed = time.monotonic()
            until(
                f"flip {number}",
                lambda passing=passing: bool(made.dig("core", "web-app.ztna.local", "SRV")) == passing,
            )
            took.append(time.monotonic() - changed)
        assert max(took) < CHANGE_SECONDS, (
            f"seconds from change to answer: {[round(each, 2) for each in took]}"
        )
