"""The nftables table as text; that a kernel takes it is tests/faults/test_forwarding.py's."""

from __future__ import annotations

import json

from relay.links import Limits
from relay.ruleset import Count, Ruleset, Way
from ztna.wire.control import Address

A, C = Address("192.0.2.1", 1001), Address("192.0.2.2", 1002)
WAY = Way(7, A, C, "192.0.2.9")
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
        f'add element {name} tallies {{ 192.0.2.1 . 1001 : "way7" }}',
        f"add element {name} sources {{ 192.0.2.1 . 1001 . 192.0.2.2 . 1002 : 192.0.2.9 }}",
    ]
    assert RULES.add([WAY]).splitlines() == [f"add counter {name} way7", *steering, *kept]
    removed = [
        line.replace("add", "delete", 1).replace(" timeout 60s", "").replace(" timeout 65s", "")
        for line in (*steering, *kept)
    ]
    assert RULES.delete([WAY]).splitlines() == [*removed, f"delete counter {name} way7"]
    assert RULES.refresh([WAY]).splitlines() == [*removed[:2], *steering]
    assert PACED.add([WAY]).splitlines()[-1] == f"add element {name} paced {{ 192.0.2.1 . 1001 }}"
    assert RULES.drop() == f"delete table {name}\n"


def test_counts_are_of_udp_payload() -> None:
    assert RULES.read(["way7", "left"]).splitlines() == [
        "reset counter ip ztna_forwarder_4434 way7",
        "reset counter ip ztna_forwarder_4434 left",
    ]
    printed = [
        json.dumps({"nftables": [{"metainfo": {}}, {"counter": {"name": name, "packets": 2, "bytes": 256}}]})
        for name in ("way7", "left")
    ]
    assert RULES.counts("\n".join(printed) + "\n") == {"way7": Count(2, 200), "left": Count(2, 200)}
