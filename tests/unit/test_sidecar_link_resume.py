"""sidecar.link.resume: positions, windows, what is kept, completion, known flows."""

import random

import pytest

from sidecar.link.resume import (
    REMEMBER_SECONDS,
    SMALL_PIECE_BYTES,
    FlowState,
    KnownFlows,
)
from ztna.errors import ProtocolError

WINDOW = 64 * 1024
BIG = SMALL_PIECE_BYTES


def state(window: int = WINDOW) -> FlowState:
    return FlowState(send_window=window, receive_window=window)


def piece(size: int) -> memoryview:
    return memoryview(bytes(size))


def test_credit_shrinks_with_what_is_sent_and_grows_with_acks() -> None:
    flow = state()
    flow.sent(piece(BIG))
    assert flow.send_credit == WINDOW - BIG
    flow.acknowledged(BIG)
    assert flow.send_credit == WINDOW
    flow.fin_sent()
    assert flow.send_credit == 0


def test_big_pieces_are_kept_whole_and_returned_when_wholly_acknowledged() -> None:
    flow = state()
    first, second = piece(BIG), piece(BIG)
    assert flow.sent(first)
    assert flow.sent(second)
    assert flow.kept_bytes == 2 * BIG
    assert flow.acknowledged(BIG + 1) == [first]
    assert flow.kept_bytes == BIG
    assert flow.acknowledged(2 * BIG) == [second]
    assert flow.kept_bytes == 0


def test_small_pieces_are_copied_together() -> None:
    flow = state()
    for _ in range(SMALL_PIECE_BYTES + 10):
        assert not flow.sent(piece(1))
    assert len(flow._kept) == 2
    assert flow.acknowledged(SMALL_PIECE_BYTES + 10) == []
    assert flow.kept_bytes == 0


def test_a_small_piece_after_a_big_one_is_kept_beside_it() -> None:
    flow = state()
    flow.sent(piece(BIG))
    flow.sent(piece(1))
    assert flow.kept_bytes == BIG + 1


def test_what_a_reset_flow_kept_is_returned() -> None:
    flow = state()
    kept = piece(BIG)
    flow.sent(kept)
    flow.sent(piece(3))
    flow.fin_sent()
    assert flow.forget() == [kept]
    assert flow.kept_bytes == 0


@pytest.mark.parametrize("position", [11, 4])
def test_an_ack_of_what_was_never_sent_or_goes_back_is_refused(position: int) -> None:
    flow = state()
    flow.sent(piece(10))
    flow.acknowledged(5)
    with pytest.raises(ProtocolError, match="ACK of position"):
        flow.acknowledged(position)


def test_more_than_the_window_is_refused() -> None:
    flow = state()
    flow.received(WINDOW)
    flow.delivered(1)
    flow.received(1)
    with pytest.raises(ProtocolError, match="window"):
        flow.received(1)


def test_data_or_fin_after_fin_is_refused() -> None:
    flow = state()
    flow.fin_received()
    with pytest.raises(ProtocolError, match="after FIN"):
        flow.received(1)
    with pytest.raises(ProtocolError, match="second FIN"):
        flow.fin_received()


def test_an_ack_is_wanted_with_anything_new_and_due_at_a_quarter_of_the_window() -> None:
    flow = state()
    assert not flow.ack_is_wanted
    flow.received(WINDOW)
    flow.delivered(WINDOW // 4 - 1)
    assert flow.ack_is_wanted
    assert not flow.ack_is_due
    flow.delivered(1)
    assert flow.ack_is_due
    assert flow.take_ack() == WINDOW // 4
    assert not flow.ack_is_wanted


def test_an_ack_of_a_fin_is_due_at_once() -> None:
    flow = state()
    flow.received(3)
    flow.fin_received()
    assert not flow.fin_is_due
    flow.delivered(3)
    assert flow.fin_is_due
    assert not flow.ack_is_due
    flow.fin_delivered()
    assert not flow.fin_is_due
    assert flow.ack_is_due
    assert flow.take_ack() == 4
    assert not flow.ack_is_due


def test_complete_only_when_both_fins_are_acknowledged() -> None:
    flow = state()
    flow.fin_received()
    flow.fin_delivered()
    assert not flow.is_complete
    flow.fin_sent()
    assert not flow.is_complete
    flow.acknowledged(1)
    assert not flow.is_complete
    flow.take_ack()
    assert flow.is_complete


def test_not_complete_while_the_other_direction_is_open() -> None:
    flow = state()
    flow.fin_sent()
    flow.acknowledged(1)
    assert not flow.is_complete


def test_two_ends_agree_whatever_the_pace() -> None:
    chance = random.Random(6)
    for _ in range(50):
        near, far = state(), state()
        left, wire, held = 300_000, 0, 0
        while not near.fin_is_sent or held or wire:
            if size := min(near.send_credit, left, chance.choice((1, 700, 9000, 60_000))):
                near.sent(piece(size))
                left, wire = left - size, wire + size
            if not left and not near.fin_is_sent:
                near.fin_sent()
            if size := chance.randint(0, wire):
                far.received(size)
                wire, held = wire - size, held + size
            if size := chance.randint(0, held):
                far.delivered(size)
                held -= size
            if far.ack_is_due or (far.ack_is_wanted and chance.random() < 0.1):
                near.acknowledged(far.take_ack())
            assert near.kept_bytes <= WINDOW + 60_000
        far.fin_received()
        far.fin_delivered()
        near.acknowledged(far.take_ack())
        assert near.acknowledged_position == 300_001
        assert near.kept_bytes == 0


def test_a_flow_is_begun_once() -> None:
    known = KnownFlows()
    assert known.begin("a", "f", 1000.0)
    assert not known.begin("a", "f", 1000.0)
    assert known.begin("b", "f", 1000.0)


def test_a_finished_flow_is_remembered_and_later_forgotten() -> None:
    known = KnownFlows()
    known.begin("a", "f", 1000.0)
    known.finish("a", "f", 1050.0)
    assert not known.begin("a", "f", 1050.0 + REMEMBER_SECONDS)
    assert known.begin("a", "f", 1051.0 + 2 * REMEMBER_SECONDS)


def test_long_silence_forgets_all_at_once() -> None:
    known = KnownFlows()
    known.begin("a", "f", 1000.0)
    known.finish("a", "f", 1000.0)
    assert known.begin("a", "f", 1000.0 + 2 * REMEMBER_SECONDS)


def test_the_memory_is_bounded_and_says_what_went_early() -> None:
    known = KnownFlows(limit=2)
    for number in range(7):
        known.begin("a", str(number), 1000.0)
        known.finish("a", str(number), 1000.0)
    assert known.forgotten_early == 4
    assert known.begin("a", "0", 1000.0)
    assert not known.begin("a", "6", 1000.0)
