"""dnsd.plans: how changes are packed, and when a pool is scarce."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from dnsd.plans import Change, PoolUse, transactions
from ztna.catalog import TXN_OPERATIONS_MAX, KvCheckSession, KvSet

GUARD = KvCheckSession("ztna/vip/keeper", "me")


def change(number: int, operations: int) -> Change:
    written = tuple(KvSet(f"k{number}-{each}", b"", 0) for each in range(operations))
    return Change("granted", f"s{number}", IPv4Address(number), written)


@pytest.mark.parametrize(
    ("leased", "resting", "scarce"), [(89, 0, False), (80, 9, False), (80, 10, True), (90, 0, True)]
)
def test_a_pool_is_scarce_from_ninety_percent(leased: int, resting: int, scarce: bool) -> None:
    assert PoolUse(100, leased, resting).is_scarce is scarce


def test_a_change_is_never_torn_apart_and_each_transaction_is_guarded() -> None:
    changes = [change(number, 4) for number in range(40)]
    packed = [each.operations for each in transactions(changes, "me")]
    assert [each for transaction in transactions(changes, "me") for each in transaction.changes] == changes
    assert [len(operations) for operations in packed] == [61, 61, 41]
    for operations in packed:
        assert operations[0] == GUARD
        assert len(operations) <= TXN_OPERATIONS_MAX
        keys = [operation.key.partition("-")[0] for operation in operations[1:]]
        assert all(keys.count(key) == 4 for key in keys)
    assert transactions((), "me") == ()


def test_a_change_that_fills_a_transaction_stands_alone() -> None:
    packed = transactions([change(1, TXN_OPERATIONS_MAX - 1), change(2, 1)], "me")
    assert [len(each.operations) for each in packed] == [TXN_OPERATIONS_MAX, 2]
