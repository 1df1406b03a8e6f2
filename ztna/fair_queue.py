"""Datagrams that wait for one slow peer, a lane for each service: who floods one lane loses from that lane.

Pure. Has what aioquic asks of the deque it puts DATAGRAMs into (`append`, `[0]`, `popleft`), so that it can stand
in its place. Lanes take turns, a datagram each; within a lane the oldest goes first and is given up first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator


class FairQueue:
    """At most `limit` datagrams in all lanes together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lanes: OrderedDict[str, deque[bytes]] = OrderedDict()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[bytes]:
        for lane in self._lanes.values():
            yield from lane

    def __getitem__(self, index: int) -> bytes:
        """Return the next datagram, the only one that can be looked at."""
        if index:
            raise IndexError(index)
        return next(iter(self._lanes.values()))[0]

    def append(self, data: bytes) -> None:
        """Add to the lane without a name."""
        self.put("", data)

    def put(self, lane: str, data: bytes) -> bool:
        """Add to a lane. False when the queue was full, and the oldest of the fullest lane was given up for it."""
        room = self._waiting < self._limit
        if not room:
            self._give_up(lane)
        waiting = self._lanes.get(lane)
        if waiting is None:
            waiting = self._lanes[lane] = deque()
        waiting.append(data)
        self._waiting += 1
        return room

    def popleft(self) -> bytes:
        """Take the next datagram; its lane has had its turn."""
        lane, waiting = next(iter(self._lanes.items()))
        data = waiting.popleft()
        self._waiting -= 1
        if waiting:
            self._lanes.move_to_end(lane)
        else:
            del self._lanes[lane]
        return data

    def _give_up(self, lane: str) -> None:
        waiting = self._lanes.get(lane, ())
        if len(waiting) * len(self._lanes) < self._limit:
            # Below its share: then another lane is above, and only then all have to be looked at.
            lane = max(self._lanes, key=lambda each: len(self._lanes[each]))
        fullest = self._lanes[lane]
        fullest.popleft()
        self._waiting -= 1
        if not fullest:
            del self._lanes[lane]
