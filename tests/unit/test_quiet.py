"""One line a key and interval, and then how many were left out."""

from __future__ import annotations

import pytest

from ztna import quiet as module
from ztna.quiet import INTERVAL_SECONDS, Quiet


def test_one_line_then_a_count_then_one_line_again() -> None:
    quiet = Quiet()
    assert [quiet.allows(("mallory",), 0.0) for _ in range(3)] == [True, False, False]
    assert quiet.allows(("alice",), 1.0)
    assert quiet.over(INTERVAL_SECONDS - 0.1) == []
    assert quiet.over(INTERVAL_SECONDS) == [(("mallory",), 2)]
    assert quiet.allows(("mallory",), INTERVAL_SECONDS)
    assert quiet.over(INTERVAL_SECONDS + 1.0) == [], "alice had one line, and it was written"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_MAX", 2)
    quiet = Quiet()
    assert [quiet.allows((key,), 0.0) for key in "abc"] == [True, True, False]
    assert quiet.beyond == 1
