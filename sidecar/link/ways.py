"""Decide by which relay's forwarder, or past them all, a packet link sends.

A way is one relay's binding of a link, with the direct paths found over it (sidecar.link.paths). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Way:
    """One way of a link as it is now."""

    bind_id: bytes
    is_direct: bool
    is_usable: bool
    """Whether the other end was heard on it."""
    is_relay_up: bool
    is_preferred: bool
    """Whether its relay is the preferred one."""


def choose(ways: Sequence[Way], current: bytes) -> bytes:
    """Return the bind id of the way to send on; one that works is not left for another that is no better."""
    return max(ways, key=lambda way: (_merit(way), way.bind_id == current)).bind_id if ways else current


def _merit(way: Way) -> int:
    if way.is_direct:
        return 3
    if not (way.is_usable and way.is_relay_up):
        return 0
    return 2 if way.is_preferred else 1
