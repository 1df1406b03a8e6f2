"""ztna.leases: records read from KV, and the audit that proves a table."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from ztna.catalog import KvPair
from ztna.jsontypes import to_json
from ztna.leases import (
    EPOCH_MAX,
    SERVICE_PREFIX,
    WISH_PREFIX,
    Holding,
    Lease,
    Port,
    Table,
    Wish,
    address_key,
    amended,
    audit,
    beside,
    is_ula,
    read_table,
    service_key,
    went_back,
)
from ztna.names import ServiceName

WEB = ServiceName("web")
IP = IPv4Address("10.100.0.9")


def pairs(*records: tuple[str, object], index: int = 5) -> dict[str, KvPair]:
    return {
        key: KvPair(key=key, value=value if isinstance(value, bytes) else to_json(value), modify_index=index)
        for key, value in records
    }


def good() -> list[tuple[str, object]]:
    return [
        (service_key(WEB), Lease(IP, 4, (Port("tcp", 80),))),
        (address_key(IP), Holding(service="web", epoch=4, state="leased", leased_at=1.0)),
    ]


def test_records_come_back_as_they_were_written_with_their_index() -> None:
    table = read_table(pairs(*good(), ("ztna/vip/keeper", b"{}")))
    assert table.leases[WEB].record == Lease(IP, 4, (Port("tcp", 80),))
    assert table.leases[WEB].index == 5
    assert table.holdings[IP].record.service == "web"
    assert table.unreadable == {}
    assert audit(table) == ()


def test_another_record_at_the_same_index_is_read() -> None:
    """A Consul that was set up anew counts anew."""
    before = read_table(pairs(*good()))
    other = Lease(IPv4Address("10.100.0.10"), 7)
    assert read_table(pairs((service_key(WEB), other)), before).leases[WEB].record == other


def test_what_did_not_change_is_not_read_again() -> None:
    before = read_table(pairs(*good()))
    same = read_table(pairs(*good()), before)
    assert same.leases[WEB] is before.leases[WEB]
    newer = read_table(pairs(*good(), index=6), before)
    assert newer.leases[WEB].index == 6


def test_fields_of_the_next_release_are_ignored() -> None:
    newer = [(key, json.dumps(json.loads(to_json(value)) | {"since": 1}).encode()) for key, value in good()]
    table = read_table(pairs(*newer))
    assert {name: stored.record for name, stored in table.leases.items()} == {WEB: good()[0][1]}
    assert table.unreadable == {}


def test_unreadable_records_are_told_and_left_out() -> None:
    table = read_table(
        pairs(
            (service_key(WEB), b"not json"),
            ("ztna/vip/service/Not_A_Name", b"{}"),
            ("ztna/vip/ip/10.1", b"{}"),
            (address_key(IP), b'{"service": 3}'),
        )
    )
    assert (table.leases, table.holdings) == ({}, {})
    assert len(table.unreadable) == 4
    assert len(audit(table)) == 4


def test_records_that_no_agent_could_use_are_unreadable() -> None:
    for epoch, port in ((-1, 80), (EPOCH_MAX + 1, 80), (1, -1), (1, 65_536)):
        table = read_table(pairs((service_key(WEB), Lease(IP, epoch, (Port("tcp", port),)))))
        assert (table.leases, list(table.unreadable)) == ({}, [service_key(WEB)]), (epoch, port)
    assert read_table(pairs((service_key(WEB), Lease(IP, EPOCH_MAX, (Port("tcp", 65_535),))))).leases


def broken(*records: tuple[str, object]) -> str:
    (line,) = audit(read_table(pairs(*records)))
    return line


def test_the_audit_tells_each_way_in_which_records_disagree() -> None:
    lease, held = good()
    quarantined = Holding(service="web", epoch=4, state="quarantined", released_at=2.0)
    assert "no record of its own" in broken(lease)
    assert "quarantined by web" in broken(lease, (address_key(IP), quarantined))
    assert "epoch 4, but 3" in broken(
        lease, (address_key(IP), Holding(service="web", epoch=3, state="leased"))
    )
    assert "held by web, whose lease is not for it" in broken(held)
    stranger = Holding(service="Not A Name", epoch=1, state="leased")
    assert "held by Not A Name" in broken((address_key(IP), stranger))
    elsewhere = (address_key(IPv4Address("10.100.0.10")), Holding(service="web", epoch=4, state="leased"))
    assert broken(lease, held, elsewhere).startswith("10.100.0.10")


def test_the_audit_finds_an_address_with_two_owners() -> None:
    lease, held = good()
    lines = audit(read_table(pairs(lease, held, (service_key(ServiceName("db")), Lease(IP, 4)))))
    assert any("leased to 2 services: db, web" in line for line in lines)
    assert any(line.startswith("db: its address 10.100.0.9 is leased by web") for line in lines)


def test_an_empty_table_and_resting_addresses_are_fine() -> None:
    assert audit(Table()) == ()
    resting = Holding(service="gone", epoch=1, state="quarantined", released_at=2.0)
    assert audit(read_table(pairs((address_key(IP), resting)))) == ()


def test_addresses_beside_leases_are_in_a_network_of_our_own() -> None:
    assert is_ula(IPv6Network("fd12:3456:789a::/96"))
    assert not is_ula(IPv6Network("fd12:3456:789a::/64"))
    assert not is_ula(IPv6Network("2001:db8::/96"))
    assert beside(IPv6Network("fd12::/96"), IPv4Address("10.100.0.2")) == IPv6Address("fd12::a64:2")


def test_an_amended_table_is_the_one_that_would_be_read() -> None:
    known = pairs(*good(), (WISH_PREFIX + "web", Wish("pin", "1")), (SERVICE_PREFIX + "db", b"nonsense"))
    before = read_table(known)
    deleted = [WISH_PREFIX + "web", address_key(IP), "ztna/vip/service/unknown"]
    written = pairs(
        (service_key(WEB), Lease(IP, 9)),
        (SERVICE_PREFIX + "db", Lease(IP, 3)),
        (SERVICE_PREFIX + "ssh", b"{"),
        index=9,
    )
    after = amended(before, written, deleted)
    assert after == read_table({key: pair for key, pair in (known | written).items() if key not in deleted})
    assert list(after.unreadable) == [SERVICE_PREFIX + "ssh"]
    assert before == read_table(known), "the one before stays as it was"


def test_an_older_lease_in_a_table_read_afterwards_is_the_one_to_go_by() -> None:
    other = IPv4Address("10.100.0.10")
    older, newer = Lease(IP, 3), Lease(other, 9)

    def gone_by(known: Lease, *records: tuple[str, object]) -> dict[ServiceName, Lease | None]:
        return dict(went_back({WEB: known}, read_table(pairs(*records))))

    assert gone_by(newer, (service_key(WEB), older)) == {WEB: older}
    assert gone_by(newer, (service_key(WEB), Lease(IP, 9))) == {WEB: Lease(IP, 9)}
    # What the watch brings by itself, and what only has other ports.
    assert gone_by(older, (service_key(WEB), newer)) == {}
    assert gone_by(newer, (service_key(WEB), Lease(other, 9, (Port("tcp", 80),)))) == {}


def test_a_lease_that_is_gone_is_kept_but_not_at_an_address_of_another() -> None:
    known, db = {WEB: Lease(IP, 9)}, service_key(ServiceName("db"))
    assert went_back(known, Table()) == {}
    assert went_back(known, read_table(pairs((db, Lease(IPv4Address("10.100.0.10"), 3))))) == {}
    assert went_back(known, read_table(pairs((db, Lease(IP, 3))))) == {WEB: None}
