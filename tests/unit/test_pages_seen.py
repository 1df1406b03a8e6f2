"""A status is read by what it is; what is not there is empty, what is unreadable is named."""

from __future__ import annotations

import pytest

from tests.support import statuses
from ztna.errors import ProtocolError
from ztna.pages import seen


def test_each_daemon_is_read_as_itself() -> None:
    assert [type(each) for each in statuses.all_of_them()] == [
        seen.Relay,
        seen.Dnsd,
        seen.Connector,
        seen.Agent,
    ]


def test_what_another_version_does_not_say_is_empty_and_what_it_says_more_is_passed_over() -> None:
    read = seen.read({"daemon": "ztna-relay", "news": 1, "connections": [{"peer": "p", "mood": "good"}]})
    assert isinstance(read, seen.Relay) and read.connections[0].transport == "" and read.sessions == ()
    assert type(seen.read({"daemon": "ztna-other"})) is seen.Daemon


def test_what_cannot_be_read_is_named() -> None:
    read = seen.read({"daemon": "ztna-relay", "pid": 5, "sessions": [{"session": None}]})
    assert type(read) is seen.Daemon and read.pid == 5 and "$.sessions[0].session" in read.unreadable
    with pytest.raises(ProtocolError, match=r"pid"):
        seen.read({"daemon": "ztna-relay", "pid": "x"})
    with pytest.raises(ProtocolError, match="status"):
        seen.read(["daemon"])
