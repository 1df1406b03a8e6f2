"""The nftables table as text; that a kernel takes it is tests/faults/test_forwarding.py's."""

from __future__ import annotations

import json

import pytest

from relay.links import Limits
from relay.ruleset import Count, Ruleset, Way
from ztna.wire.control import Address

A, C = Address("192.0.2.1", 1001), Address("192.0.2.2", 1002)
WAY = Way(A, C, "192.0.2.9")
RULES = Ruleset("ip", 4434, Limits())
PACED = Ruleset("ip", 4434, Limits(rate_bytes_per_s=50_000))


def test_the_table_belongs_to_its_maker_and_tracks_nothing() -> None:
    text = RULES.create()
    assert "flags owner" in text and text.count("notrack") == 2
    assert "paced" not in text and "goto onward" in text


def test_a_rate_is_a_limit_of_each_element() -> None:
    text = PACED.create()
    assert "limit rate 50000 bytes/second burst 131072 bytes" in text
    assert "@paced goto onward\n        counter name over_rate drop" in text


def test_ip6_is_the_same_with_other_names() -> None:
    text = Ruleset("ip6", 4434, Limits()).create()
    assert "ip6 saddr . udp sport" in text and "ip saddr" not in text and "redirect" not in text


def test_a_way_is_added_refreshed_and_taken_out() -> None:
    name = "ip ztna_forwarder_4434"
    steering = [
        f"add element {name} onward_address {{ 192.0.2.1 . 1001 timeout 60s : 192.0.2.2 }}",
        f"add element {name} onward_port {{ 192.0.2.1 . 1001 timeout 65s : 1002 }}",
    ]
    kept = [
        f"add element {name} sides {{ 192.0.2.1 . 1001 }}",
        f"add element {name} sources {{ 192.0.2.1 . 1001 . 192.0.2.2 . 1002 : 192.0.2.9 }}",
    ]
    assert RULES.add([WAY]).splitlines() == [*steering, *kept]
    removed = [
        line.replace("add", "delete", 1).replace(" timeout 60s", "").replace(" timeout 65s", "")
        for line in (*steering, *kept)
    ]
    assert RULES.delete([WAY]).splitlines() == removed
    assert RULES.refresh([WAY]).splitlines() == [*removed[:2], *steering]
    assert PACED.add([WAY]).splitlines()[-1] == f"add element {name} paced {{ 192.0.2.1 . 1001 }}"


@pytest.mark.parametrize(("rules", "count"), [(RULES, 4), (PACED, 5)])
def test_clearing_names_every_set(rules: Ruleset, count: int) -> None:
    lines = rules.clear().splitlines()
    assert len(lines) == count and "flush map ip ztna_forwarder_4434 sources" in lines


def test_counts_are_of_udp_payload() -> None:
    element = {"val": {"concat": [A.ip, A.port, C.ip, C.port]}, "counter": {"packets": 2, "bytes": 256}}
    listed = {"nftables": [{"metainfo": {}}, {"map": {"elem": [[{"elem": element}, "192.0.2.9"]]}}]}
    assert RULES.counts(json.dumps(listed)) == [Count(A, C, 2, 200)]
    assert RULES.counts(json.dumps({"nftables": [{"map": {}}]})) == []
    assert RULES.list_counts() == "list map ip ztna_forwarder_4434 sources"


def test_totals_by_name() -> None:
    listed = {"nftables": [{"counter": {"name": "left", "packets": 3, "bytes": 9}}]}
    assert RULES.totals(json.dumps(listed)) == {"left": 3}
    assert RULES.list_totals() == "list counters table ip ztna_forwarder_4434"
