"""dnsd.settling: what was built is out of the collector's sight, again each time the names doubled."""

from __future__ import annotations

import gc

from dnsd.settling import SERVICES_MIN, Settled


def test_frozen_at_first_and_whenever_the_names_doubled() -> None:
    settled = Settled()
    try:
        counts = []
        for services in (1, SERVICES_MIN, 2 * SERVICES_MIN - 1, 2 * SERVICES_MIN, 150, 400):
            gc.unfreeze()
            settled.grow(services)
            counts.append(gc.get_freeze_count() > 0)
        assert counts == [False, True, False, True, False, True]
    finally:
        gc.unfreeze()
