"""sidecar.link.pulse: when a relay is asked for a sign of life, and what its silence means."""

from __future__ import annotations

import pytest

from sidecar.link.pulse import (
    BUSY_PING_SECONDS,
    GONE_SECONDS,
    PING_AGAIN_SECONDS,
    PING_SECONDS,
    VERDICT_SECONDS,
    Life,
    Pulse,
)

STEP = 0.05


def follow(
    pulse: Pulse, start: float, seconds: float, *, heard: float, busy: bool
) -> list[tuple[float, Life]]:
    """Step for a while with nothing heard since `heard`; return when life changed, from the start."""
    changes: list[tuple[float, Life]] = []
    life = pulse.life
    for number in range(round(seconds / STEP) + 1):
        now = start + number * STEP
        pulse.step(heard, now, busy=busy)
        if pulse.life is not life:
            life = pulse.life
            changes.append((now - start, life))
    return changes


@pytest.mark.parametrize(("busy", "interval"), [(True, BUSY_PING_SECONDS), (False, PING_SECONDS)])
def test_pings_more_often_while_flows_depend_on_it(busy: bool, interval: float) -> None:
    pulse = Pulse(0.0)
    assert pulse.next_timer(busy=busy) == interval
    assert not pulse.step(0.0, interval - 0.01, busy=busy)
    assert pulse.step(0.0, interval, busy=busy)
    assert pulse.next_timer(busy=busy) == interval + PING_AGAIN_SECONDS
    assert not pulse.step(interval + 0.01, interval + 0.02, busy=busy), "it was answered"
    assert pulse.next_timer(busy=busy) == 2 * interval


@pytest.mark.parametrize(("busy", "interval"), [(True, BUSY_PING_SECONDS), (False, PING_SECONDS)])
def test_silence_is_a_suspicion_and_then_the_end(busy: bool, interval: float) -> None:
    changes = follow(Pulse(0.0), 0.0, 10.0, heard=0.0, busy=busy)
    assert [life for _, life in changes] == [Life.SILENT, Life.GONE]
    assert changes[0][0] == pytest.approx(interval + VERDICT_SECONDS, abs=STEP)
    assert changes[1][0] == pytest.approx(interval + GONE_SECONDS, abs=STEP)


def test_a_ping_that_got_lost_is_sent_again_before_the_verdict() -> None:
    pulse = Pulse(0.0)
    sent = sum(pulse.step(0.0, number * STEP, busy=True) for number in range(round(1.2 / STEP)))
    assert sent == 3
    assert pulse.life is Life.UP


def test_whatever_is_heard_takes_the_suspicion_back() -> None:
    pulse = Pulse(0.0)
    follow(pulse, 0.0, 2.0, heard=0.0, busy=True)
    assert pulse.life is Life.SILENT
    pulse.step(2.05, 2.1, busy=True)
    assert pulse.life is Life.UP


def test_time_in_which_we_did_not_run_is_nobodys_silence() -> None:
    pulse = Pulse(0.0)
    assert pulse.step(0.0, BUSY_PING_SECONDS, busy=True)
    pulse.step(0.0, BUSY_PING_SECONDS + 20.0, busy=True)
    assert pulse.life is Life.UP
    assert follow(pulse, BUSY_PING_SECONDS + 20.0, 2.0, heard=0.0, busy=True)[0][1] is Life.SILENT
