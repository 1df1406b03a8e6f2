"""sidecar.link.resume: positions, windows, what is kept, what is owed on a new carrier, completion."""

import random

import pytest

from sidecar.link.resume import SMALL_PIECE_BYTES, FlowState
from ztna.errors import ProtocolError

WINDOW = 64 * 1024
BIG = SMALL_PIECE_BYTES


def state(window: int = WINDOW) -> FlowState:
    made = FlowState(receive_window=window)
    made.resumed(0, window)
    return made


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
    assert not flow.has_fin
    flow.fin_received()
    assert flow.has_fin
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


def owed(flow: FlowState, room: int = 10_000_000) -> bytes:
    buffer = memoryview(bytearray(room))
    return bytes(buffer[: flow.take_owed(buffer)])


def test_nothing_may_be_sent_before_the_other_ends_window_is_known() -> None:
    flow = FlowState(receive_window=WINDOW)
    assert flow.send_credit == 0
    flow.resumed(0, 100)
    assert flow.send_credit == 100
    assert not flow.is_owing
    assert not flow.ack_is_wanted


def test_what_the_other_end_did_not_get_is_owed_from_the_middle_of_a_piece_on() -> None:
    flow = state()
    content = bytes(range(256)) * 40
    flow.sent(memoryview(content))
    flow.sent(memoryview(b"tail"))
    flow.acknowledged(5)
    flow.resumed(7, WINDOW)
    assert flow.is_owing
    assert flow.kept_bytes == flow.owed_bytes == len(content) + 4 - 7
    assert flow.sent_position == 7
    assert flow.send_credit == WINDOW - 2
    assert owed(flow, 100) == content[7:107]
    flow.sent(memoryview(content)[7:107])
    assert flow.kept_bytes == len(content) + 4 - 7
    assert owed(flow) == content[107:] + b"tail"
    assert not flow.is_owing


def test_a_second_cut_owes_what_was_sent_again_before_what_was_not() -> None:
    flow = state()
    flow.sent(memoryview(b"abcdefgh"))
    flow.resumed(2, WINDOW)
    flow.sent(memoryview(owed(flow, 3)))
    flow.resumed(4, WINDOW)
    assert owed(flow) == b"efgh"


def test_what_was_wholly_received_is_kept_no_longer() -> None:
    flow = state()
    flow.sent(piece(BIG))
    flow.resumed(BIG, WINDOW)
    assert flow.kept_bytes == 0
    assert flow.send_credit == WINDOW - BIG
    flow.acknowledged(BIG)
    assert flow.send_credit == WINDOW


@pytest.mark.parametrize("expected", [4, 11])
def test_a_position_below_the_last_ack_or_above_what_was_sent_changes_nothing(expected: int) -> None:
    flow = state()
    flow.sent(piece(10))
    flow.acknowledged(5)
    with pytest.raises(ProtocolError, match="expected 5 to 10"):
        flow.resumed(expected, 1)
    assert flow.send_credit == WINDOW - 5
    assert not flow.is_owing


def test_what_was_received_cannot_be_lost_again() -> None:
    flow = state()
    flow.sent(piece(10))
    flow.resumed(8, WINDOW)
    with pytest.raises(ProtocolError, match="expected 8"):
        flow.resumed(7, WINDOW)


def test_a_fin_that_is_missing_is_owed_after_the_bytes() -> None:
    flow = state()
    flow.sent(memoryview(b"abc"))
    flow.fin_sent()
    flow.resumed(1, WINDOW)
    assert not flow.fin_is_sent
    assert owed(flow) == b"bc"
    assert flow.is_owing
    assert owed(flow) == b""
    flow.sent(memoryview(b"bc"))
    flow.fin_sent()
    assert not flow.is_owing
    assert flow.sent_position == 4
    flow.resumed(4, WINDOW)
    assert not flow.is_owing
    assert flow.kept_bytes == 0


def test_a_fin_stays_owed_through_a_second_cut() -> None:
    flow = state()
    flow.sent(memoryview(b"abc"))
    flow.fin_sent()
    flow.resumed(3, WINDOW)
    flow.resumed(3, WINDOW)
    assert flow.is_owing
    assert owed(flow) == b""


def test_the_last_ack_is_sent_again_on_each_new_carrier() -> None:
    flow = state()
    flow.received(10)
    flow.delivered(10)
    flow.resumed(0, WINDOW)
    assert not flow.ack_is_due  # none was sent, so none was lost
    flow.take_ack()
    assert not flow.ack_is_wanted
    flow.resumed(0, WINDOW)
    assert flow.ack_is_wanted and flow.ack_is_due
    assert flow.take_ack() == 10
    assert not flow.ack_is_wanted


def test_a_flow_is_not_complete_while_its_last_ack_may_be_lost() -> None:
    flow = state()
    flow.fin_received()
    flow.fin_delivered()
    flow.take_ack()
    flow.fin_sent()
    assert flow.is_delivered
    flow.resumed(0, WINDOW)
    assert flow.is_delivered  # it is owed, but the program has ended its side
    flow.fin_sent()
    flow.acknowledged(1)
    assert not flow.is_complete
    flow.take_ack()
    assert flow.is_complete


def test_what_a_reset_flow_owed_is_forgotten() -> None:
    flow = state()
    flow.sent(piece(BIG))
    flow.resumed(0, WINDOW)
    flow.forget()
    assert flow.kept_bytes == 0
    assert not flow.is_owing
