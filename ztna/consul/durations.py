"""Go's duration texts, as Consul's JSON has them. Pure; reads what Consul writes and what clients send."""

from __future__ import annotations

import re

NANOSECONDS = 1_000_000_000

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def duration_s(given: str | int | float) -> float:
    """Return seconds of a text like `1m30s`, or of a number, which Go takes for nanoseconds.

    Raises ValueError with Go's words.
    """
    if isinstance(given, int | float):
        return given / NANOSECONDS
    if given == "0":
        return 0.0
    if not given or not re.fullmatch(rf"(?:{_PART.pattern})+", given):
        raise ValueError(f'time: invalid duration "{given}"')
    return sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(given))
