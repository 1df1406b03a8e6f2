"""A clock that goes from event to event, and what connects two places under it. All chance comes from one seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

DELAY_SECONDS_MAX = 0.2
NOTICED_SECONDS_MAX = 3.0
"""How long an end may take to notice that its connection was cut."""
PIECES_MAX = 3

Act = Callable[[], object]


class World:
    """The clock, in seconds, and what is going to happen."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.chance = random.Random(seed)
        self._due: list[tuple[float, int, Act]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, act: Act) -> None:
        """Have something happen so many seconds from now."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), act))

    def every(self, seconds: float, act: Act) -> None:
        """Have something happen again and again."""

        def again() -> None:
            act()
            self.after(seconds, again)

        self.after(seconds, again)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, but not beyond the moment when `until` holds."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end and not until():
            self.now, _, act = heapq.heappop(self._due)
            act()
        if not until():
            self.now = end

    def delay(self) -> float:
        """Draw how long something is on its way."""
        return self.chance.uniform(0.001, DELAY_SECONDS_MAX)


class End:
    """One end of a connection that brings bytes whole and in order, until it is cut or closed."""

    def __init__(self, connection: Connection, side: int) -> None:
        self._connection, self._side = connection, side
        self.heard: Callable[[bytes], object] = lambda data: None
        self.lost: Act = lambda: None

    def send(self, data: bytes) -> None:
        """Send bytes; they come in pieces that are nobody's frames."""
        self._connection.carry(self._side, data)

    def close(self) -> None:
        """Close it: the other end gets what was sent and then loses it; this one hears nothing more."""
        self._connection.close(self._side)


class Connection:
    """Two ends; of a cut both hear in their own time, and what was on its way is lost."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.ends = End(self, 0), End(self, 1)
        self.is_cut = False
        self._is_over = [False, False]
        self._arrives_at = [0.0, 0.0]

    @property
    def is_over(self) -> bool:
        """Whether nothing can be broken any more."""
        return self.is_cut or any(self._is_over)

    def carry(self, side: int, data: bytes) -> None:
        """Bring bytes from a side to the other."""
        at = [0, len(data)]
        at += [
            self._world.chance.randint(0, len(data)) for _ in range(self._world.chance.randrange(PIECES_MAX))
        ]
        for start, stop in itertools.pairwise(sorted(at)):
            if stop > start:
                self._later(side, lambda piece=data[start:stop]: self._arrive(1 - side, piece))  # type: ignore[misc]

    def cut(self) -> None:
        """Break it."""
        if not self.is_cut:
            self.is_cut = True
            for side in (0, 1):
                noticed = self._world.chance.uniform(0.0, NOTICED_SECONDS_MAX)
                self._world.after(noticed, lambda side=side: self._lose(side))  # type: ignore[misc]

    def close(self, side: int) -> None:
        """Let one side close it."""
        self._is_over[side] = True
        self._later(side, lambda: self.is_cut or self._lose(1 - side))

    def _later(self, side: int, act: Act) -> None:
        at = max(self._arrives_at[side], self._world.now + self._world.delay())
        self._arrives_at[side] = at
        self._world.after(at - self._world.now, act)

    def _arrive(self, side: int, data: bytes) -> None:
        if not self.is_cut and not self._is_over[side]:
            self.ends[side].heard(data)

    def _lose(self, side: int) -> None:
        if not self._is_over[side]:
            self._is_over[side] = True
            self.ends[side].lost()


def drizzle(world: World, deliver: Act) -> None:
    """Bring a datagram: late, or not at all, or twice, and never in order."""
    for _ in range(world.chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 2))):
        world.after(world.delay(), deliver)
