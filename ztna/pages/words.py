"""Figures in words and units that an operator reads at a glance. Pure.

Ages are told coarsely on purpose: a page that counts seconds changes all the time and says no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ztna.pages.markup import Element, el

NONE = "\N{EN DASH}"
"""Stands where there is nothing to say."""
GRAIN_SECONDS = 10
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"))
_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))

MARKS = {
    "passing": ("good", "\N{CHECK MARK}"),
    "ready": ("good", "\N{CHECK MARK}"),
    "up": ("good", "\N{CHECK MARK}"),
    "open": ("good", "\N{CHECK MARK}"),
    "live": ("good", "\N{CHECK MARK}"),
    "leased": ("good", "\N{CHECK MARK}"),
    "running": ("good", "\N{CHECK MARK}"),
    "warning": ("fair", "!"),
    "not ready": ("fair", "!"),
    "ejected": ("fair", "!"),
    "detached": ("fair", "!"),
    "critical": ("bad", "\N{MULTIPLICATION SIGN}"),
    "down": ("bad", "\N{MULTIPLICATION SIGN}"),
    "ended": ("bad", "\N{MULTIPLICATION SIGN}"),
    "no answer": ("bad", "\N{MULTIPLICATION SIGN}"),
}
"""How a state looks: its colour and its sign. The word stands beside it, so neither is needed to read it."""


def age(seconds: float | None) -> str:
    """Return how long ago, or for how long."""
    if seconds is None:
        return NONE
    for size, unit in _AGES:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    grains = int(seconds // GRAIN_SECONDS) * GRAIN_SECONDS
    return f"{grains} s" if grains > 0 else f"under {GRAIN_SECONDS} s"


def size(count: float) -> str:
    """Return a number of bytes in decimal units."""
    for unit, name in _SIZES:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def number(count: float) -> str:
    """Return a count with its thousands set apart."""
    return f"{count:,.0f}"


def rate(per_second: float | None) -> str:
    """Return how often a second."""
    if per_second is None:
        return NONE
    return f"{per_second:,.0f}/s" if per_second >= 10 or per_second == 0 else f"{per_second:.1f}/s"


def milliseconds(value: float | None) -> str:
    """Return a round trip."""
    if value is None:
        return NONE
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def days(left: float) -> str:
    """Return how long a certificate is good for."""
    if left < 0:
        return "expired"
    return f"{left * 24:.0f} h" if left < 2 else f"{left:.0f} days"


class HasPort(Protocol):
    """A virtual port."""

    @property
    def protocol(self) -> str:
        """Either tcp, udp or icmp."""

    @property
    def port(self) -> int:
        """The number."""


def ports(found: Iterable[HasPort]) -> str:
    """Return virtual ports in words."""
    return ", ".join(f"{port.protocol} {port.port}" for port in found) or NONE


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def mark(state: str, text: str | None = None) -> Element:
    """Return a state as a sign and a word."""
    look, sign = MARKS.get(state, ("dim", "\N{MIDDLE DOT}"))
    return el(
        "span", el("span", sign, aria_hidden="true", class_="sign"), text or state, class_=f"mark {look}"
    )
