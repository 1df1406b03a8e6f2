"""relay.kernel without a kernel that takes part; with one: tests/faults/test_forwarding.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from relay import kernel as module
from relay.forwarder import Forwarder
from relay.kernel import KernelForwarder, KernelRefused
from relay.links import Limits
from ztna.nft import NftError
from ztna.udp_bulk import BulkSocket
from ztna.udp_kernel import encode_address

A, C, D = (encode_address((f"192.0.2.{n}", 1000 + n)) for n in (1, 2, 3))
NOW = 1000.0


class FakeNft:
    """Remembers what it was told; `counters` are what is read, and `failing` how often it says no."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.counters: Counter[str] = Counter()
        self.failing = 0
        self.closed = False

    def run(self, commands: str) -> str:
        if self.failing:
            self.failing -= 1
            raise NftError("nft: no")
        self.told.append(commands)
        names = [line.split()[-1] for line in commands.splitlines() if line.startswith("reset")]
        read = [
            {"counter": {"name": name, "packets": count, "bytes": 128 * count}}
            for name in names
            for count in (self.counters.pop(name, 0),)
        ]
        return "\n".join(json.dumps({"nftables": [each]}) for each in read)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNft:
    made = FakeNft()
    on = tmp_path / "ip_forward"
    on.write_text("1\n")
    monkeypatch.setattr(module, "Nft", lambda: made)
    monkeypatch.setattr(module, "_FORWARDING", {"ip": str(on), "ip6": str(tmp_path / "absent")})
    monkeypatch.setattr(module, "local_address_towards", lambda peer: "198.51.100.1")
    return made


@pytest.fixture
def forwards(fake: FakeNft) -> KernelForwarder:
    made = KernelForwarder(("0.0.0.0", 4434), Limits())
    made.change({A: C, C: A}, NOW)
    return made


def test_a_way_in_is_one_transaction_and_so_is_its_end(fake: FakeNft, forwards: KernelForwarder) -> None:
    assert forwards.ways == 2 and forwards.forwards(A) and not forwards.forwards(D)
    assert len(fake.told) == 2 and "192.0.2.1 . 1001 timeout 60s : 192.0.2.2" in fake.told[1]
    fake.counters["way0"] = 3
    assert forwards.change({A: None}, NOW) == [(A, 3, 300)]
    assert forwards.ways == 1 and fake.told[-1].startswith("delete element")
    told = len(fake.told)
    assert forwards.change({D: None}, NOW) == [] and len(fake.told) == told


def test_counters_are_read_a_part_at_a_time(
    fake: FakeNft, forwards: KernelForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNTERS_PER_READ_MAX", 1)
    fake.counters.update(way0=1, way1=2)
    assert sorted([*forwards.count(), *forwards.count()]) == sorted([(A, 1, 100), (C, 2, 200)])
    assert forwards.count() == []
    forwards.change({A: None, C: None}, NOW)
    assert forwards.count() == []


def test_the_oldest_are_refreshed_when_it_is_time(
    fake: FakeNft, forwards: KernelForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESHES_PER_TRANSACTION_MAX", 1)
    told = len(fake.told)
    forwards.refresh(NOW + 1)
    assert len(fake.told) == told
    for source in ("192.0.2.1", "192.0.2.2"):
        forwards.refresh(NOW + module.REFRESH_SECONDS)
        assert f"onward_address {{ {source} " in fake.told[-1] and "sides" not in fake.told[-1]
    told = len(fake.told)
    forwards.refresh(NOW + module.REFRESH_SECONDS)
    assert len(fake.told) == told


def test_a_table_that_is_not_as_thought_is_made_anew_or_given_up(
    fake: FakeNft, forwards: KernelForwarder
) -> None:
    fake.failing = 1
    forwards.change({D: A}, NOW)
    assert fake.told[-2].startswith("delete table") and fake.told[-1].count("add counter") == 3
    fake.failing = 2
    with pytest.raises(KernelRefused, match="no"):
        forwards.change({D: None}, NOW)
    forwards.close()
    assert fake.closed and forwards.ways == 0


def test_what_is_translated_and_does_not_leave_is_a_firewalls_doing(
    fake: FakeNft, forwards: KernelForwarder
) -> None:
    fake.counters.update(translated=module.BLOCKED_PACKETS, left=1, over_rate=5)
    assert forwards.watch() == 5
    fake.counters.update(translated=module.BLOCKED_PACKETS - 1)
    assert forwards.watch() == 0
    fake.counters.update(translated=module.BLOCKED_PACKETS)
    with pytest.raises(KernelRefused, match="firewall"):
        forwards.watch()


def test_beyond_the_bound_and_on_this_host_user_space_forwards(
    fake: FakeNft, forwards: KernelForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, loopback = encode_address(("198.51.100.1", 5)), encode_address(("127.0.0.1", 5))
    forwards.change({here: A, D: here, loopback: D}, NOW)
    assert forwards.ways == 2
    monkeypatch.setattr(module, "WAYS_MAX", 2)
    forwards.change({D: A}, NOW)
    assert forwards.ways == 2

    def nowhere(peer: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(module, "WAYS_MAX", 3)
    monkeypatch.setattr(module, "local_address_towards", nowhere)
    forwards.change({D: A}, NOW)
    assert forwards.ways == 2


@pytest.mark.parametrize(
    ("host", "why"), [("127.0.0.1", "loopback"), ("::1", "loopback"), ("::", "absent is not 1")]
)
def test_where_it_cannot_be_is_said(fake: FakeNft, host: str, why: str) -> None:
    with pytest.raises(KernelRefused, match=why):
        KernelForwarder((host, 4434), Limits())


def test_a_table_that_nft_does_not_take_is_no_table(fake: FakeNft) -> None:
    fake.failing = 1
    with pytest.raises(KernelRefused, match="no"):
        KernelForwarder(("192.0.2.9", 4434), Limits())


async def test_a_forwarder_that_wants_the_kernel_and_has_it_not_says_why() -> None:
    forwarder = Forwarder(BulkSocket.open(("127.0.0.1", 0)), forwarding="kernel")
    assert forwarder.problem is not None and "loopback" in forwarder.problem
    forwarder.close()
    forwarder = Forwarder(BulkSocket.open(("127.0.0.1", 0)), forwarding="auto")
    assert forwarder.problem is None
    forwarder.close()
