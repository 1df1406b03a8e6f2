"""Each daemon has its page; what is no daemon of ours has one too."""

from __future__ import annotations

from tests.support import statuses
from tests.support.statuses import own, shown
from ztna.pages import seen
from ztna.pages.views import view


def test_each_daemon_has_the_page_that_is_made_for_it() -> None:
    titles = [view(each).title for each in statuses.all_of_them()]
    assert titles == ["Relay north", "dnsd", "Connector alpha", "Agent ztna/agent"]


def test_rates_are_of_the_time_since_an_earlier_status() -> None:
    now, earlier = (
        seen.read(statuses.dnsd()),
        seen.read(statuses.dnsd(uptime_s=70.0, dns={"udp_received": 100})),
    )
    assert "10/s" in shown(view(now, earlier).sections["head"])
    assert "2.0/s" in shown(view(now, seen.read(statuses.relay())).sections["head"])


def test_another_daemon_has_a_header_and_its_refusals() -> None:
    assert list(view(seen.read(own("ztna-other"))).sections) == ["head", "refused"]
