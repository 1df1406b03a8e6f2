"""When to fetch a CRL again: what its server says, when the list is out of date, and never later than configured.

Pure: `now` and chance are passed in. Source: RFC 9111 4.2 (freshness), 5.2.2 (Cache-Control), 5.3 (Expires).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

FETCH_SECONDS_MIN = 5.0
"""Nothing that a server or a list says makes a daemon fetch more often."""
RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 30.0
JITTER_PART = 0.1
"""Of each wait: daemons that began together must not ask together for ever."""
REMAINING_PART = 0.5
"""Of the time to nextUpdate: the nearer it is, the more often its successor is looked for."""
AGE_SECONDS_MAX = 10**9


def fresh_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return for how long an answer says that it stays good, None when it does not say.

    `headers` finds names in any case. What may not be kept (no-cache, no-store) is asked for by the configured
    interval, and so is what says nothing that can be read: wrong headers must not stop anybody from fetching.
    """
    directives = {}
    for part in headers.get("Cache-Control", "").split(","):
        name, _, value = part.strip().partition("=")
        directives[name.lower()] = value.strip('" ')
    if "no-cache" in directives or "no-store" in directives:
        return None
    if "max-age" in directives:
        age, lifetime = _seconds(headers.get("Age", "0")), _seconds(directives["max-age"])
        return None if lifetime is None else max(0.0, lifetime - (age or 0.0))
    expires, date = _date(headers.get("Expires")), _date(headers.get("Date"))
    return None if expires is None else max(0.0, (expires - (date or now)).total_seconds())


def wait_s(
    longest_s: float, good_s: float | None, next_update: datetime | None, now: datetime, chance: float
) -> float:
    """Return how long to wait after a fetch that worked; `chance` is from 0 to 1.

    `longest_s` is the configured interval, which is also how long a revocation may stay unheard of: a server can
    have it asked sooner, not later. What has been out of date since before the fetch is asked for again by it.
    """
    waits = [longest_s]
    if good_s:
        waits.append(max(FETCH_SECONDS_MIN, good_s))
    if next_update is not None:
        remaining_s = (next_update - now).total_seconds()
        waits.append(max(FETCH_SECONDS_MIN, remaining_s * REMAINING_PART))
    return min(waits) * (1.0 - JITTER_PART * chance)


def retry_s(longest_s: float, failures: int, chance: float) -> float:
    """Return how long to wait after so many fetches that failed one after the other."""
    most_s = min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2.0 ** min(failures, 8))
    least_s = RETRY_SECONDS_MIN / 2
    return min(longest_s, least_s + (most_s - least_s) * chance)


def _seconds(text: str) -> float | None:
    return (
        float(min(int(text), AGE_SECONDS_MAX))
        if text.isascii() and text.isdigit() and len(text) < 20
        else None
    )


def _date(text: str | None) -> datetime | None:
    """Return an HTTP date; one that is none, or without a zone, says nothing."""
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.tzinfo is not None else None
