"""What one connection may ask: a burst, then so much a second."""

from __future__ import annotations

from relay.pace import Kind, Pace


def test_a_burst_is_allowed_and_then_so_much_a_second() -> None:
    pace = Pace()
    assert all(pace.allows(Kind.OPEN, 10.0) for _ in range(int(Kind.OPEN.burst)))
    assert not pace.allows(Kind.OPEN, 10.0)
    assert pace.allows(Kind.SIGNALING, 10.0), "each kind has its own bucket"
    second = sum(pace.allows(Kind.OPEN, 11.0) for _ in range(1_000))
    assert second == Kind.OPEN.per_second


def test_a_bucket_never_holds_more_than_its_burst_and_too_much_at_once_takes_nothing() -> None:
    pace = Pace()
    burst = int(Kind.CONFLICT.burst)
    assert pace.allows(Kind.CONFLICT, 0.0)
    assert not pace.allows(Kind.CONFLICT, 1e9, burst + 1)
    assert pace.allows(Kind.CONFLICT, 1e9, burst)
