"""Which flows a connector has seen, so that none is dialled twice and an old one can be answered (Link: Once only).

    (none) --OPEN--> live --ended--> remembered --REMEMBER_SECONDS--> (none)

Pure. Flows are keyed by (agent's verified name, flow id): another agent's flow is one that was never heard of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

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

REMEMBER_SECONDS = 60.0
REMEMBERED_FLOWS_MAX = 100_000

Live = TypeVar("Live")
FlowKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """Its OPEN was answered with this status, never 00."""

    status: OpenStatus


@dataclass(frozen=True, slots=True)
class Complete:
    """Both ends had everything; the positions after both FINs."""

    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class WasReset:
    """It was reset, and this is what RESET says."""

    code: int


Ending = Refused | Complete | WasReset


def answer(ending: Ending, resume: ResumeFrame) -> tuple[Frame, ...]:
    """Return what a RESUME of a flow that has ended is answered with; after that the carrier is closed."""
    match ending:
        case Refused(status):
            return (OpenedFrame(status, 0),)
        case Complete(sent, received) if resume.received == sent:
            return (ResumedFrame(received, WINDOW_BYTES_MIN), Ack(received))
        case WasReset(code):
            return (ResetFrame(code),)
        case _:  # it acknowledged all and now says otherwise
            return (ResetFrame(0),)


class KnownFlows(Generic[Live]):
    """The live flows, whatever they are to the caller, and how others ended.

    Ended ones are remembered for at least REMEMBER_SECONDS in two generations; when a generation is full the
    older goes early, which `forgotten_early` counts.
    """

    def __init__(self, limit: int = REMEMBERED_FLOWS_MAX) -> None:
        self._limit = limit
        self._live: dict[FlowKey, Live] = {}
        self._newer: dict[FlowKey, Ending] = {}
        self._older: dict[FlowKey, Ending] = {}
        self._turned_at = 0.0
        self.forgotten_early = 0

    def begin(self, key: FlowKey, live: Live, now: float) -> bool:
        """Note a new flow; False when it is known already."""
        if self.live(key) is not None or self.ended(key, now) is not None:
            return False
        self._live[key] = live
        return True

    def live(self, key: FlowKey) -> Live | None:
        """Return a flow that has not ended."""
        return self._live.get(key)

    def all_live(self) -> tuple[Live, ...]:
        """Return the flows that have not ended."""
        return tuple(self._live.values())

    def ended(self, key: FlowKey, now: float) -> Ending | None:
        """Return how a flow ended, while that is remembered."""
        self._turn(now)
        return self._newer.get(key) or self._older.get(key)

    def finish(self, key: FlowKey, ending: Ending, now: float) -> None:
        """Note that a live flow has ended; it is remembered from now on."""
        self._turn(now)
        del self._live[key]
        if len(self._newer) >= self._limit:
            self.forgotten_early += len(self._older)
            self._older, self._newer, self._turned_at = self._newer, {}, now
        self._newer[key] = ending

    def _turn(self, now: float) -> None:
        age = now - self._turned_at
        if age < REMEMBER_SECONDS:
            return
        self._older = self._newer if age < 2 * REMEMBER_SECONDS else {}
        self._newer = {}
        self._turned_at = now
