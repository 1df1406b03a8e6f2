"""ztna.stall: when a carrier is asked after, when it is dead, and what is no death."""

from __future__ import annotations

from ztna.stall import LOOK_SECONDS, QUIET_SECONDS, STALL_SECONDS, Stall, Verdict

RTT = 0.05


def looks(
    stall: Stall, start: float, seconds: float, received: int, unacknowledged: int, rtt_s: float = RTT
) -> list[Verdict]:
    """Look on while nothing comes at all."""
    count = int(seconds / LOOK_SECONDS)
    return [
        stall.look(start + n * LOOK_SECONDS, received, unacknowledged, start + n * LOOK_SECONDS, rtt_s)
        for n in range(1, count + 1)
    ]


def test_what_is_not_acknowledged_in_time_is_dead() -> None:
    stall = Stall(0.0)
    found = looks(stall, 0.0, STALL_SECONDS + LOOK_SECONDS, 0, 3)
    assert found[:-1] == [Verdict.LEAVE] * (len(found) - 1)
    assert found[-1] is Verdict.DEAD
    assert not stall.is_settled


def test_a_long_way_has_more_time() -> None:
    stall = Stall(0.0)
    assert set(looks(stall, 0.0, 2 * STALL_SECONDS, 0, 3, rtt_s=1.0)) == {Verdict.LEAVE}
    assert looks(stall, 2 * STALL_SECONDS, LOOK_SECONDS, 0, 3, rtt_s=1.0) == [Verdict.DEAD]


def test_an_acknowledgement_begins_the_time_anew() -> None:
    stall = Stall(0.0)
    assert set(looks(stall, 0.0, STALL_SECONDS, 0, 3)) == {Verdict.LEAVE}
    now = STALL_SECONDS + LOOK_SECONDS
    assert stall.look(now, 0, 2, LOOK_SECONDS / 2, RTT) is Verdict.LEAVE
    assert set(looks(stall, now, STALL_SECONDS - LOOK_SECONDS, 0, 2)) == {Verdict.LEAVE}


def test_an_old_carrier_that_sends_again_has_all_its_time() -> None:
    """The last ACK is from long ago then, which says nothing."""
    stall = Stall(0.0)
    assert stall.look(100.0, 0, 1, 100.0, RTT) is Verdict.LEAVE
    assert stall.look(100.5, 0, 1, 100.5, RTT) is Verdict.LEAVE
    assert stall.look(101.0, 0, 0, 0.2, RTT) is Verdict.LEAVE
    assert stall.is_settled


def test_who_only_receives_asks_once_it_is_quiet_and_then_waits_for_the_answer() -> None:
    stall = Stall(0.0)
    assert stall.look(0.5, 1000, 0, 0.1, RTT) is Verdict.LEAVE
    assert not stall.is_settled
    assert stall.look(0.5 + QUIET_SECONDS, 1000, 0, 0.6, RTT) is Verdict.ASK
    assert not stall.is_settled
    found = looks(stall, 0.5 + QUIET_SECONDS, STALL_SECONDS, 1000, 1)
    assert found[-1] is Verdict.DEAD
    assert set(found[:-1]) == {Verdict.LEAVE}


def test_an_answered_question_is_not_asked_again_before_something_came() -> None:
    stall = Stall(0.0)
    stall.look(0.5, 1000, 0, 0.1, RTT)
    assert stall.look(1.0, 1000, 0, 0.6, RTT) is Verdict.ASK
    assert stall.look(1.5, 1000, 0, 0.4, RTT) is Verdict.LEAVE
    assert stall.is_settled
    assert stall.look(60.0, 1000, 0, 59.0, RTT) is Verdict.LEAVE
    assert stall.look(60.5, 2000, 0, 0.1, RTT) is Verdict.LEAVE
    assert stall.look(61.0, 2000, 0, 0.6, RTT) is Verdict.ASK
