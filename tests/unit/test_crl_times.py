"""A server may have a CRL asked for sooner than configured, never later, and never all at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ztna.crl_times import FETCH_SECONDS_MIN, RETRY_SECONDS_MAX, fresh_s, retry_s, wait_s

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
IN_AN_HOUR = "Thu, 01 Jan 2026 13:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "good_s"),
    [
        ({}, None),
        ({"Cache-Control": "max-age=90"}, 90.0),
        ({"Cache-Control": 'public, MAX-AGE="90"', "Age": "30", "Expires": IN_AN_HOUR}, 60.0),
        ({"Cache-Control": "max-age=90", "Age": "300"}, 0.0),
        ({"Cache-Control": "max-age=90", "Age": "old"}, 90.0),
        ({"Cache-Control": "max-age=soon"}, None),
        ({"Cache-Control": "max-age=" + "9" * 30}, None),
        ({"Cache-Control": "no-cache, max-age=90"}, None),
        ({"Cache-Control": "no-store", "Expires": IN_AN_HOUR}, None),
        ({"Expires": IN_AN_HOUR}, 3600.0),
        ({"Expires": IN_AN_HOUR, "Date": "Thu, 01 Jan 2026 12:59:00 GMT"}, 60.0),
        ({"Expires": IN_AN_HOUR, "Date": "yesterday"}, 3600.0),
        ({"Expires": "0"}, None),
        ({"Expires": "Thu, 01 Jan 2026 13:00:00 -0000"}, None),
        ({"Expires": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
    ],
)
def test_what_a_server_says(headers: dict[str, str], good_s: float | None) -> None:
    assert fresh_s(headers, NOW) == good_s


def test_the_configured_interval_is_the_longest() -> None:
    far = NOW + timedelta(days=7)
    assert wait_s(60.0, None, None, NOW, 0.0) == 60.0
    assert wait_s(60.0, 3600.0, far, NOW, 0.0) == 60.0
    assert wait_s(60.0, 20.0, far, NOW, 0.0) == 20.0
    assert wait_s(0.05, 20.0, far, NOW, 0.0) == 0.05
    assert wait_s(60.0, 0.0, None, NOW, 0.0) == 60.0
    assert wait_s(60.0, 0.1, None, NOW, 0.0) == FETCH_SECONDS_MIN


def test_the_successor_is_looked_for_before_the_list_is_out_of_date() -> None:
    day_s, at, asked = 86_400.0, NOW, 0
    until = NOW + timedelta(days=7)
    while (until - at).total_seconds() > 2 * FETCH_SECONDS_MIN:
        at += timedelta(seconds=wait_s(day_s, None, until, at, 0.5))
        asked += 1
    assert at < until and asked < 30
    assert wait_s(day_s, None, until, until + timedelta(days=1), 0.0) == FETCH_SECONDS_MIN


def test_chance_spreads_those_who_began_together() -> None:
    assert wait_s(60.0, None, None, NOW, 1.0) == pytest.approx(54.0)


def test_what_fails_is_tried_again_soon_then_less_often_and_within_the_interval() -> None:
    assert retry_s(60.0, 1, 0.0) == 0.5
    assert retry_s(60.0, 1, 1.0) == 2.0
    assert retry_s(60.0, 50, 1.0) == RETRY_SECONDS_MAX
    assert retry_s(0.1, 50, 1.0) == 0.1
