"""A rate is each way of each link, with a burst for who was quiet."""

from __future__ import annotations

from relay.links import Limits
from relay.metering import Meter, Meters


def test_a_meter_fills_with_time_and_never_beyond_its_burst() -> None:
    meter = Meter(1_000, 500, now=10.0)
    assert meter.left == 500
    meter.left -= 500
    meter.refill(10.25)
    assert meter.left == 250
    meter.refill(60.0)
    assert meter.left == 500


def test_looking_often_costs_nothing() -> None:
    meter = Meter(1_000, 500, now=0.0)
    meter.left = 0
    for step in range(1, 4_001):
        meter.refill(step / 10_000)
    assert 399 <= meter.left <= 400


def test_both_ways_of_a_link_have_a_meter_as_long_as_the_link_lives() -> None:
    meters = Meters(Limits(rate_bytes_per_s=1_000_000))
    up, down = meters.of("link", 0.0)
    assert up is not None and down is not None and up is not down
    assert meters.of("link", 1.0) == (up, down)
    assert meters.of("other", 1.0)[0] is not up
    meters.forget("link")
    meters.forget("link")
    assert meters.of("link", 2.0)[0] is not up


def test_without_a_rate_nothing_is_metered() -> None:
    assert Meters(Limits()).of("link", 0.0) == (None, None)
