"""dnsd.limits: so many answers a second for each source."""

from __future__ import annotations

import pytest

import dnsd.limits
from dnsd.limits import BURST_SECONDS, Limiter


def test_a_burst_then_the_rate_and_each_source_for_itself() -> None:
    limiter = Limiter(10)
    burst = int(10 * BURST_SECONDS)
    assert [limiter.takes(b"a", 100.0) for _ in range(burst + 1)] == [True] * burst + [False]
    assert limiter.takes(b"b", 100.0)
    assert not limiter.takes(b"a", 100.05)
    assert [limiter.takes(b"a", 100.35) for _ in range(4)] == [True, True, True, False]
    assert sum(limiter.takes(b"a", 1e6) for _ in range(2 * burst)) == burst


def test_every_other_refusal_slips() -> None:
    limiter = Limiter(1)
    assert [limiter.slips() for _ in range(4)] == [True, False, True, False]


def test_only_so_many_sources_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.limits, "SOURCES_MAX", 2)
    limiter = Limiter(1)
    for source in (b"a", b"b", b"b", b"c"):
        assert limiter.takes(source, 1.0)
    assert len(limiter._buckets) == 1
