"""The agent's nftables table as text; that a kernel takes it is tests/e2e/test_modes.py's."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network

from sidecar.agent.ruleset import ELEMENTS_PER_COMMAND_MAX, Doors, Ruleset, Spot, table_name

FOUR, SIX = IPv4Network("10.100.0.0/16"), IPv6Network("fd12::/96")
TUN = Ruleset("own", Doors(tcp4=1001), None)
ANYIP = Ruleset("own", Doors(tcp4=1001, tcp6=1002, udp4=1003, udp6=1004), None)


def test_a_table_has_its_agents_name_and_goes_with_it() -> None:
    assert table_name(FOUR) == "ztna_agent_10_100_0_0_16"
    assert table_name(SIX) == "ztna_agent_fd12___96"
    for rules in (TUN, ANYIP):
        assert rules.create().startswith("table inet own {\n    flags owner\n")


def test_tcp_is_redirected_and_udp_left_to_the_device() -> None:
    text = TUN.create()
    assert "ip daddr . tcp dport @tcp4 redirect to :1001" in text
    assert "tproxy" not in text and "hook input" not in text and "@tcp6 redirect" not in text


def test_anyip_brings_udp_to_a_socket_and_refuses_the_rest() -> None:
    text = ANYIP.create()
    assert "ip6 daddr . tcp dport @tcp6 redirect to :1002" in text
    assert "ip daddr . udp dport @udp4 tproxy ip to 127.0.0.1:1003 accept" in text
    assert "ip6 daddr . udp dport @udp6 tproxy ip6 to [::1]:1004 accept" in text
    assert "tproxy ip6" not in Ruleset("own", Doors(tcp4=1001, udp4=1003), None).create()


def test_users_are_allowed_by_number_and_nobody_when_none_is() -> None:
    assert "skuid" not in TUN.create() and "goto published" in TUN.create()
    text = Ruleset("own", Doors(tcp4=1001), frozenset({1001, 0})).create()
    assert "meta skuid { 0, 1001 } goto published\n        counter name not_allowed" in text
    nobody = Ruleset("own", Doors(tcp4=1001), frozenset()).create()
    assert "goto published" not in nobody and "counter name not_allowed\n" in nobody


def test_spots_are_published_and_taken_back() -> None:
    new = [Spot("tcp", "10.100.0.1", 80), Spot("udp", "fd12::1", 53), Spot("tcp", "10.100.0.2", 80)]
    assert ANYIP.change(new, [Spot("tcp", "fd12::1", 80)]) == [
        "add element inet own tcp4 { 10.100.0.1 . 80, 10.100.0.2 . 80 }\n",
        "add element inet own udp6 { fd12::1 . 53 }\n",
        "delete element inet own tcp6 { fd12::1 . 80 }\n",
    ]
    many = [Spot("tcp", "10.100.0.1", port) for port in range(1, ELEMENTS_PER_COMMAND_MAX + 2)]
    assert [command.count(" . ") for command in TUN.change(many, [])] == [ELEMENTS_PER_COMMAND_MAX, 1]


def test_pools_come_and_go() -> None:
    assert TUN.pools([FOUR, SIX], [IPv4Network("10.101.0.0/24")]) == (
        "delete element inet own pools4 { 10.101.0.0/24 }\n"
        "add element inet own pools4 { 10.100.0.0/16 }\n"
        "add element inet own pools6 { fd12::/96 }\n"
    )


def test_what_was_refused_is_read() -> None:
    assert TUN.read_refused() == "reset counter inet own not_allowed\n"
    printed = json.dumps(
        {"nftables": [{"metainfo": {"version": "1"}}, {"counter": {"name": "not_allowed", "packets": 3}}]}
    )
    assert TUN.refused(printed + "\n") == 3
    assert TUN.refused("") == 0
