"""The forwarder's table, packet by packet."""

from __future__ import annotations

import pytest

from relay import links as module
from relay.links import (
    BURST_BYTES_MIN,
    CHALLENGES_PER_SECOND,
    LINK_IDLE_SECONDS,
    NONCE_SECONDS,
    QUOTA_GRANT_BYTES,
    Limits,
    LinkTable,
    Traffic,
    address_of,
)
from ztna.jsontypes import Secret
from ztna.udp import encode_address
from ztna.wire import forwarder as wire
from ztna.wire.control import Address

A, C, THIEF = (encode_address((f"192.0.2.{n}", 1000 + n)) for n in (1, 2, 3))
IDS = {A: b"a" * 16, C: b"c" * 16}
SECRETS = {A: Secret(b"s" * 32), C: Secret(b"t" * 32)}
NOW = 10_000.0
QUIC = b"\x40sealed"


def add(table: LinkTable, key: str = "link", peers: str = "ann and con-x", now: float = NOW) -> None:
    table.add(key, (IDS[A], SECRETS[A]), (IDS[C], SECRETS[C]), peers, now)


def both_bound(limits: Limits | None = None) -> LinkTable:
    table = LinkTable(Secret(b"n" * 32), limits or Limits())
    add(table)
    bound(table, A)
    bound(table, C)
    return table


@pytest.fixture
def table() -> LinkTable:
    table = LinkTable(Secret(b"n" * 32))
    add(table)
    return table


def bind(who: bytes, nonce: bytes | None = None, secret: bytes | None = None) -> bytes:
    mac = wire.NO_MAC if nonce is None else wire.bind_mac(secret or SECRETS[who], nonce)
    return wire.encode(wire.Bind(IDS[who], mac))


def challenge(table: LinkTable, who: bytes, source: bytes, now: float = NOW) -> bytes:
    ((data, to),) = table.handle([(bind(who), source)], now)
    answer = wire.decode(data)
    assert to == source and isinstance(answer, wire.Challenge) and len(data) < len(bind(who))
    return answer.nonce


def bound(table: LinkTable, who: bytes, source: bytes | None = None, now: float = NOW) -> bytes:
    """Bind, and return the packet that did it."""
    source = source or who
    packet = bind(who, challenge(table, who, source, now))
    ((data, to),) = table.handle([(packet, source)], now)
    answer = wire.decode(data)
    assert to == source and isinstance(answer, wire.Bound) and answer.address == address_of(source)
    return packet


def test_packets_go_to_the_other_side_once_both_are_bound(table: LinkTable) -> None:
    assert table.handle([(QUIC, A)], NOW) == []
    bound(table, A)
    assert table.handle([(QUIC, A)], NOW) == []
    bound(table, C)
    assert table.handle([(QUIC, A), (b"\xc0long", C), (QUIC, THIEF)], NOW) == [(QUIC, C), (b"\xc0long", A)]
    assert table.drops == {"unknown_source": 2, "unbound_peer": 1}
    assert table.links()["link"].agent.bytes == len(QUIC)
    assert (len(table), table.bound) == (1, 2)


def test_without_the_secret_nothing_is_bound(table: LinkTable) -> None:
    nonce = challenge(table, A, THIEF)
    ((data, _),) = table.handle([(bind(A, nonce, secret=bytes(32)), THIEF)], NOW)
    assert isinstance(wire.decode(data), wire.Challenge)
    assert table.bound == 0


def test_a_bind_counts_only_from_where_it_was_challenged(table: LinkTable) -> None:
    packet = bound(table, A)
    ((data, _),) = table.handle([(packet, THIEF)], NOW)
    assert isinstance(wire.decode(data), wire.Challenge)
    assert table.links()["link"].agent.address == A


def test_a_bind_is_void_after_two_periods(table: LinkTable) -> None:
    packet = bind(A, challenge(table, A, A))
    for later, kind in ((NONCE_SECONDS, wire.Bound), (3 * NONCE_SECONDS, wire.Challenge)):
        ((data, _),) = table.handle([(packet, A)], NOW + later)
        assert isinstance(wire.decode(data), kind)


def test_a_valid_bind_from_a_new_address_moves_the_side(table: LinkTable) -> None:
    first = bound(table, A)
    bound(table, C)
    moved = encode_address(("192.0.2.99", 9))
    bound(table, A, moved)
    assert table.handle([(QUIC, A), (QUIC, moved), (QUIC, C)], NOW) == [(QUIC, C), (QUIC, moved)]
    # Caught before the move and played back with a forged source, it does not move the side back.
    ((data, _),) = table.handle([(first, A)], NOW)
    assert isinstance(wire.decode(data), wire.Challenge)
    assert table.links()["link"].agent.address == moved


def test_repeats_from_where_it_is_bound_keep_the_binding(table: LinkTable) -> None:
    packet = bound(table, A)
    for _ in range(3):
        ((data, _),) = table.handle([(packet, A)], NOW)
        assert isinstance(wire.decode(data), wire.Bound)


def test_an_address_is_one_side_of_one_link(table: LinkTable) -> None:
    bound(table, A)
    bound(table, C, A)
    link = table.links()["link"]
    assert (link.agent.address, link.connector.address, table.bound) == (None, A, 1)
    assert table.handle([(QUIC, A)], NOW) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "unknown_source"),
        (b"\0", "unknown_source"),
        (wire.BIND + bytes(5), "malformed"),
        (wire.BIND + bytes(33), "malformed"),
        (wire.encode(wire.Bind(bytes(16), wire.NO_MAC)), "unknown_bind"),
        (wire.probe(b"k", bytes(12)), "unknown_source"),
    ],
)
def test_whatever_else_an_unknown_source_sends_is_not_answered(
    table: LinkTable, data: bytes, why: str
) -> None:
    assert table.handle([(data, THIEF)], NOW) == []
    assert table.drops == {why: 1}


@pytest.mark.parametrize("data", [b"", b"\0", wire.encode(wire.Challenge(bytes(8)))])
def test_garbage_from_a_bound_source_is_dropped(table: LinkTable, data: bytes) -> None:
    bound(table, A)
    assert table.handle([(data, A)], NOW) == []
    assert table.drops == {"malformed": 1}


def test_challenges_are_limited_for_each_bind_id(table: LinkTable) -> None:
    flood = [(bind(A), THIEF)] * (CHALLENGES_PER_SECOND + 5)
    assert len(table.handle(flood, NOW)) == CHALLENGES_PER_SECOND
    assert table.drops == {"challenge_rate": 5}
    assert len(table.handle([(bind(C), THIEF)], NOW)) == 1
    assert len(table.handle(flood, NOW + 1)) == CHALLENGES_PER_SECOND


def test_a_removed_link_passes_nothing_on(table: LinkTable) -> None:
    packet = bound(table, A)
    bound(table, C)
    table.remove("link")
    table.remove("link")
    assert table.handle([(QUIC, A), (QUIC, C), (packet, A)], NOW) == []
    assert (len(table), table.bound) == (0, 0)


def test_an_idle_link_is_unbound_and_may_bind_again(table: LinkTable) -> None:
    bound(table, A)
    bound(table, C)
    table.handle([(QUIC, A)], NOW)
    table.sweep(NOW + 50)
    table.sweep(NOW + 50 + LINK_IDLE_SECONDS - 1)
    assert table.bound == 2, "one side's packets keep the link"
    table.sweep(NOW + 50 + LINK_IDLE_SECONDS)
    assert table.bound == 0
    bound(table, A, now=NOW + 200)
    assert table.bound == 1


@pytest.mark.parametrize("address", [Address("192.0.2.1", 53), Address("2001:db8::1", 65535)])
def test_addresses_are_read_from_kernel_bytes(address: Address) -> None:
    assert address_of(encode_address((address.ip, address.port))) == address


def passed(table: LinkTable, source: bytes, count: int, now: float = NOW, size: int = 1000) -> int:
    return len(table.handle([(b"\x40" * size, source)] * count, now))


def test_what_was_passed_on_is_told_by_link() -> None:
    table = both_bound()
    passed(table, A, 3)
    passed(table, C, 2, size=10)
    side = table.side_at(A)
    assert side is not None and table.side_at(THIEF) is None
    table.counted(side, 4, 400)
    assert table.traffic("link") == Traffic(7, 3400, 2, 20)
    assert table.traffic("another") is None


def test_a_rate_allows_a_burst_and_then_so_much_a_second() -> None:
    table = both_bound(Limits(rate_bytes_per_s=100_000))
    burst = BURST_BYTES_MIN // 1000
    assert passed(table, A, 1000) == burst
    assert passed(table, C, 1) == 1, "each way has its own"
    assert table.drops == {"link_rate": 1000 - burst}
    assert table.links()["link"].agent.dropped == 1000 - burst
    assert abs(passed(table, A, 1000, NOW + 0.5) - 50) <= 1
    assert passed(table, A, 1000, NOW + 3600) == burst, "time does not save up"


def test_a_fast_link_may_burst_a_share_of_its_rate() -> None:
    assert Limits(rate_bytes_per_s=100_000_000).burst_bytes == 25_000_000
    assert Limits().burst_bytes == BURST_BYTES_MIN


def test_a_quota_is_one_for_both_ways_and_all_links_of_a_pair() -> None:
    table = both_bound(Limits(quota_bytes=500_000, quota_period_s=1000.0))
    there, back = passed(table, A, 100), passed(table, C, 1000)
    assert (
        there == 100 and there * 1000 + back * 1000 + QUOTA_GRANT_BYTES > 500_000 > there * 1000 + back * 1000
    )
    assert set(table.drops) == {"link_quota"}
    rest = passed(table, A, 1000)
    assert 499 <= there + back + rest <= 500
    table.remove("link")
    add(table, "again")
    bound(table, A)
    bound(table, C)
    assert there + back + rest + passed(table, A, 5) == 500, "to the last byte"
    table.sweep(NOW + 1)
    assert passed(table, A, 5, NOW + 1) == 0
    table.sweep(NOW + 1000)
    bound(table, A, now=NOW + 1000)
    bound(table, C, now=NOW + 1000)
    assert passed(table, A, 5, NOW + 1000) == 5


def test_what_a_link_left_over_is_the_pairs_again_and_a_gone_pair_is_forgotten() -> None:
    table = both_bound(Limits(quota_bytes=10_000, quota_period_s=1000.0))
    assert passed(table, A, 3) == 3
    table.remove("link")
    add(table)
    bound(table, A)
    bound(table, C)
    assert passed(table, C, 100) == 7
    table.remove("link")
    table.sweep(NOW + 1000)
    assert not table._allowances


def test_rate_and_quota_together() -> None:
    table = both_bound(Limits(rate_bytes_per_s=100_000, quota_bytes=150_000))
    assert passed(table, A, 200) == BURST_BYTES_MIN // 1000
    assert table.drops.keys() == {"link_rate"}
    assert passed(table, A, 200, NOW + 1) == 150 - BURST_BYTES_MIN // 1000
    assert table.drops.keys() == {"link_rate", "link_quota"}


def test_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALLOWANCES_MAX", 1)
    table = both_bound(Limits(quota_bytes=10_000))
    table.remove("link")
    add(table, peers="bob and con-x")
    assert list(table._allowances) == ["bob and con-x"]
    add(table, peers="bob and con-x")
    assert len(table._allowances) == 1


def test_each_change_of_a_way_is_told_once() -> None:
    table = both_bound()
    assert table.has_changed
    assert table.take_changed() == {A: C, C: A}
    assert not table.has_changed and table.take_changed() == {}
    passed(table, A, 1)
    bound(table, A)
    assert table.take_changed() == {}, "a repeat from where it is bound changes nothing"
    bound(table, A, THIEF)
    assert table.take_changed() == {A: None, THIEF: C, C: THIEF}
    table.remove("link")
    assert table.take_changed() == {THIEF: None, C: None}


def test_a_link_that_the_kernel_used_up_goes_nowhere_until_the_next_period() -> None:
    table = both_bound(Limits(quota_bytes=1000, quota_period_s=1000.0))
    assert table.take_changed() == {A: C, C: A}
    link = table.links()["link"]
    table.counted(link.agent, 1, 400)
    assert table.take_changed() == {}
    table.counted(link.connector, 1, 600)
    assert table.take_changed() == {A: None, C: None}
    table.add("other", (b"x" * 16, SECRETS[A]), (b"y" * 16, SECRETS[C]), "ann and con-x", NOW)
    table.sweep(NOW + 1000)
    assert table.take_changed() == {A: C, C: A}


def test_what_the_kernel_counted_last_is_the_pairs_though_its_link_has_ended() -> None:
    table = both_bound(Limits(quota_bytes=10_000))
    side = table.links()["link"].agent
    table.remove("link")
    table.counted(side, 10, 10_000)
    add(table)
    bound(table, A)
    bound(table, C)
    assert passed(table, A, 1) == 0


def test_what_goes_over_tcp_costs_the_same_quota() -> None:
    table = both_bound(Limits(quota_bytes=1_000_000, quota_period_s=1000.0))
    table.take_changed()
    assert table.charge("link", 0)
    assert table.charge("link", 999_999)
    assert not table.take_changed()
    assert not table.charge("link", 1)
    assert not table.charge("link", 0)
    assert passed(table, A, 5) == 0 and table.drops == {"link_quota": 5}
    # The kernel must stop too.
    assert table.take_changed() == {A: None, C: None}
    table.sweep(NOW + 1000)
    assert table.charge("link", 10)


def test_a_link_without_a_quota_or_end_is_charged_nothing() -> None:
    table = both_bound()
    assert table.charge("link", 1 << 50)
    assert table.charge("never there", 1)
