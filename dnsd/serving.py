"""What becomes of answers as the names age: as they are, as stale ones, or not at all (design.md 2.8).

Pure: the time is passed in. dnsd and its workers decide by this alike.
"""

from __future__ import annotations

import msgspec

from dnsd.answer import EDE_NO_REACHABLE_AUTHORITY, EDE_NOT_READY, Answers, Options
from dnsd.zone import ZoneData

STALE_AFTER_SECONDS = 60.0
"""Names not confirmed for so long are marked as stale (EDE 3); an idle watch confirms about every 21 s."""
STALE_SECONDS_MAX = 86_400.0
"""Names not confirmed for so long are not served any more (SERVFAIL), whatever `stale_max_s` says."""


class Age(msgspec.Struct, frozen=True):
    """When Consul last confirmed the names, Unix seconds (0: never), and whether it has in this run."""

    confirmed_at: float
    is_live: bool
    stale_max_s: float

    def is_stale(self, now: float) -> bool:
        """Say whether names are marked as stale at `now`."""
        return not self.is_live or now - self.confirmed_at > STALE_AFTER_SECONDS

    def is_served(self, now: float) -> bool:
        """Say whether names are served at all at `now`."""
        return now - self.confirmed_at <= min(self.stale_max_s, STALE_SECONDS_MAX)


def renewed(previous: Answers, zone: ZoneData, age: Age, options: Options, now: float) -> Answers:
    """Return answers from the zone as old as it is; what did not change since `previous` keeps its ready answers."""
    answers = Answers(
        zone if age.is_served(now) else None,
        confirmed_at=age.confirmed_at,
        is_stale=age.is_stale(now),
        why_not=EDE_NO_REACHABLE_AUTHORITY if age.confirmed_at else EDE_NOT_READY,
        options=options,
        now=now,
    )
    answers.take_over(previous)
    return answers


def aged(answers: Answers, age: Age, now: float) -> bool:
    """Let answers age; say whether they are to be renewed."""
    answers.confirmed_at, answers.now = age.confirmed_at, now
    return age.is_served(now) != (answers.zone is not None) or age.is_stale(now) != answers.is_stale
