"""ztna.remedies: every reason has its advice."""

from __future__ import annotations

from ztna.reasons import Reason
from ztna.remedies import REMEDIES


def test_every_reason_says_what_to_do() -> None:
    assert set(REMEDIES) == set(Reason)
    assert len(set(REMEDIES.values())) == len(REMEDIES), "each its own"
    assert all(text and text == text.strip() and not text.endswith(".") for text in REMEDIES.values())
