"""sidecar.link.known: no flow is begun twice, ended ones are remembered for a while and answered."""

import pytest

from sidecar.link.known import (
    REMEMBER_SECONDS,
    Complete,
    Ending,
    KnownFlows,
    Refused,
    WasReset,
    answer,
)
from ztna.names import SessionId
from ztna.wire.stream import (
    WINDOW_BYTES_MIN,
    Ack,
    Frame,
    OpenedFrame,
    OpenStatus,
    ResetFrame,
    ResumedFrame,
    ResumeFrame,
)

KEY = ("a", "f")
ENDING = Complete(1, 1)


def test_a_flow_is_begun_once() -> None:
    known = KnownFlows[str]()
    assert known.begin(KEY, "first", 1000.0)
    assert not known.begin(KEY, "second", 1000.0)
    assert known.begin(("b", "f"), "another agent's", 1000.0)
    assert known.live(KEY) == "first"
    assert known.all_live() == ("first", "another agent's")
    assert known.ended(KEY, 1000.0) is None


def test_a_finished_flow_is_remembered_and_later_forgotten() -> None:
    known = KnownFlows[str]()
    known.begin(KEY, "it", 1000.0)
    known.finish(KEY, ENDING, 1050.0)
    assert known.live(KEY) is None
    assert known.ended(KEY, 1050.0 + REMEMBER_SECONDS) == ENDING
    assert not known.begin(KEY, "again", 1050.0 + REMEMBER_SECONDS)
    assert known.begin(KEY, "again", 1051.0 + 2 * REMEMBER_SECONDS)


def test_long_silence_forgets_all_at_once() -> None:
    known = KnownFlows[str]()
    known.begin(KEY, "it", 1000.0)
    known.finish(KEY, ENDING, 1000.0)
    assert known.ended(KEY, 1000.0 + 2 * REMEMBER_SECONDS) is None


def test_the_memory_is_bounded_and_says_what_went_early() -> None:
    known = KnownFlows[str](limit=2)
    for number in range(7):
        known.begin(("a", str(number)), "it", 1000.0)
        known.finish(("a", str(number)), ENDING, 1000.0)
    assert known.forgotten_early == 4
    assert known.begin(("a", "0"), "again", 1000.0)
    assert not known.begin(("a", "6"), "again", 1000.0)


@pytest.mark.parametrize(
    ("ending", "received", "answers"),
    [
        (Refused(OpenStatus.UNREACHABLE), 0, (OpenedFrame(OpenStatus.UNREACHABLE, 0),)),
        (Complete(8, 5), 8, (ResumedFrame(5, WINDOW_BYTES_MIN), Ack(5))),
        (Complete(8, 5), 7, (ResetFrame(0),)),
        (WasReset(4), 7, (ResetFrame(4),)),
    ],
)
def test_a_resume_of_what_has_ended_is_answered(
    ending: Ending, received: int, answers: tuple[Frame, ...]
) -> None:
    resume = ResumeFrame(SessionId("0" * 16), "0" * 32, 1, received, WINDOW_BYTES_MIN)
    assert answer(ending, resume) == answers
