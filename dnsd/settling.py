"""Keeps the garbage collector away from names: a full collection among 100,000 of them takes 0.3 s of answering.

Names refer to nothing that refers to them, so they go without it.
"""

from __future__ import annotations

import gc

GROWTH_FACTOR = 2
SERVICES_MIN = 100


class Settled:
    """What was built by the time the names were last twice as many as the time before."""

    def __init__(self) -> None:
        self._services = 0

    def grow(self, services: int) -> None:
        """Take what there is out of the collector's sight when there are twice as many services as then."""
        if services >= max(SERVICES_MIN, GROWTH_FACTOR * self._services):
            self._services = services
            # What is garbage just now is never freed; that this happens so seldom bounds it.
            gc.freeze()
