"""dnsd.election: when to take the lock, wait, or unseat its holder."""

from __future__ import annotations

from dnsd.election import SILENCE_SECONDS, Rival, Step
from ztna.catalog import KvPair


def held(index: int, session: str | None = "s1") -> KvPair:
    return KvPair(key="ztna/vip/keeper", value=b"{}", modify_index=index, session=session)


def test_a_lock_nobody_holds_is_taken() -> None:
    rival = Rival()
    assert rival.look(None, 0.0) is Step.ACQUIRE
    assert rival.look(held(3, None), 1.0) is Step.ACQUIRE


def test_a_holder_that_writes_is_waited_for() -> None:
    rival = Rival()
    steps = {rival.look(held(index), index * (SILENCE_SECONDS - 0.1)) for index in range(20)}
    assert steps == {Step.WAIT}


def test_a_silent_holder_is_unseated_after_a_while() -> None:
    rival = Rival()
    assert rival.look(held(1), 100.0) is Step.WAIT
    assert rival.look(held(1), 100.0 + SILENCE_SECONDS - 0.1) is Step.WAIT
    assert rival.look(held(1), 100.0 + SILENCE_SECONDS) is Step.UNSEAT


def test_another_session_on_the_same_index_starts_the_time_anew() -> None:
    rival = Rival()
    rival.look(held(1), 0.0)
    assert rival.look(held(1, "s2"), SILENCE_SECONDS) is Step.WAIT


def test_while_consul_cannot_be_read_no_silence_is_counted() -> None:
    rival = Rival()
    rival.look(held(1), 0.0)
    rival.lose_sight()
    assert rival.look(held(1), SILENCE_SECONDS) is Step.WAIT
    assert rival.look(held(1), 2 * SILENCE_SECONDS) is Step.UNSEAT
