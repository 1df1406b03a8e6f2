"""The values of the catalog."""

import pytest

from ztna.catalog import Instance, Status, TxnFailure, TxnOutcome


@pytest.mark.parametrize(("status", "weight"), [("passing", 7), ("warning", 2), ("critical", 0)])
def test_an_instance_weighs_by_its_status(status: Status, weight: int) -> None:
    instance = Instance(
        service="web",
        instance_id="web@a",
        node="n",
        address="127.0.0.1",
        port=1,
        weight_passing=7,
        weight_warning=2,
        status=status,
    )
    assert instance.weight == weight


def test_a_transaction_stands_when_nothing_failed() -> None:
    assert TxnOutcome().ok
    assert not TxnOutcome((TxnFailure(0, "index is stale"),)).ok
