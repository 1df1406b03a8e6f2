"""dnsd.feed: a worker's copy of the zone follows dnsd's, by the least that leads there."""

from __future__ import annotations

from ipaddress import IPv4Network

import msgspec
import pytest

import dnsd.feed
from dnsd import feed
from dnsd.answer import Options
from dnsd.feed import Connection, Copy, Entries, Listen, Report, Setup, State
from dnsd.serving import Age
from dnsd.zone import ZoneData, rebuilt
from tests.support.dns import SETTINGS, catalog, instance, lease, zone
from ztna.config import DnsdConfig, Endpoint, LogConfig
from ztna.errors import ProtocolError
from ztna.tsig import Key

AGE = Age(1_700_000_000.0, True, 86_400.0)
SERVICES = catalog(instance("web"), instance("api", "c2"), instance("odd", ports="nonsense"))
LEASES = {"web": lease("10.100.1.2"), "old": lease("10.100.1.3")}
ZONE = zone(SERVICES, LEASES)


def told(copy: Copy, before: ZoneData | None, after: ZoneData) -> list[Entries | State]:
    """Lead the copy from one state to another; return what it was told."""
    messages = [feed.decode_to_worker(data) for data in feed.update(before, after, AGE)]
    for message in messages:
        if isinstance(message, Entries):
            copy.learn(message)
        else:
            assert isinstance(message, State)
            copy.follow(message)
    return messages  # type: ignore[return-value]


def same(copy: Copy, zone: ZoneData) -> bool:
    assert copy.zone is not None
    facts = ("settings", "services", "leases", "serial", "fresh_at")
    return all(getattr(copy.zone, fact) == getattr(zone, fact) for fact in facts)


def test_a_new_worker_is_told_everything() -> None:
    copy = Copy()
    (entries, state) = told(copy, None, ZONE)
    assert isinstance(entries, Entries) and [each.name for each in entries.entries] == [
        "api",
        "odd",
        "old",
        "web",
    ]
    assert state == State(7, 0, AGE, SETTINGS)
    assert same(copy, ZONE)


def test_then_only_of_what_changed() -> None:
    copy = Copy()
    told(copy, None, ZONE)
    services = dict(SERVICES) | catalog(instance("web", "c9")) | catalog(instance("new"))
    del services["api"]
    after = rebuilt(ZONE, services, {"web": LEASES["web"]}, 9.0)
    gone, entries, state = told(copy, ZONE, after)
    assert gone == Entries(gone=("api", "old"))
    assert isinstance(entries, Entries) and [each.name for each in entries.entries] == ["new", "web"]
    assert state == State(9, 0, AGE)
    assert same(copy, after)
    assert copy.zone is not None and (copy.zone.follows, copy.zone.changed) == (after.follows, after.changed)


def test_a_service_that_loses_its_instances_keeps_its_lease() -> None:
    copy = Copy()
    told(copy, None, ZONE)
    after = rebuilt(ZONE, {}, LEASES, 9.0)
    told(copy, ZONE, after)
    assert same(copy, after)


def test_nothing_new_is_the_same_zone_and_another_serial_the_same_names() -> None:
    copy = Copy()
    told(copy, None, ZONE)
    before = copy.zone
    assert told(copy, ZONE, ZONE) == [State(7, 0, AGE)] and copy.zone is before
    after = ZONE.renumbered(8, 1_700_000_000)
    assert told(copy, ZONE, after) == [State(8, 1_700_000_000, AGE)]
    assert same(copy, after)
    assert copy.zone is not None and (copy.zone.follows, copy.zone.changed) == (7, frozenset())


def test_a_change_under_the_same_serial_and_another_freshness() -> None:
    copy = Copy()
    told(copy, None, ZONE)
    after = rebuilt(ZONE, SERVICES, {"web": lease("10.100.1.9")}, 9.0).under(7, 5)
    told(copy, ZONE, after)
    assert same(copy, after)
    assert copy.zone is not None and copy.zone.follows == 7 and "web" in copy.zone.changed


def test_other_settings_begin_anew() -> None:
    copy = Copy()
    told(copy, None, ZONE)
    settings = msgspec.structs.replace(SETTINGS, pool=IPv4Network("10.101.0.0/16"))
    after = ZoneData(settings, catalog(instance("web")), {}, 8)
    told(copy, ZONE, after)
    assert same(copy, after)


def test_many_names_come_in_messages_of_about_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.feed, "ENTRIES_BYTES", 1)
    copy = Copy()
    *entries, _ = told(copy, None, ZONE)
    assert [len(each.entries) for each in entries if isinstance(each, Entries)] == [1, 1, 1, 1]
    assert same(copy, ZONE)


def test_the_first_state_needs_settings() -> None:
    with pytest.raises(ProtocolError, match="without settings"):
        Copy().follow(State(1, 0, AGE))


def test_messages_are_read_as_they_were_written() -> None:
    config = DnsdConfig(listen=Endpoint("127.0.0.1", 53), allow=(IPv4Network("10.0.0.0/8"),), nsid="x")
    key = Key("transfer.ztna", "hmac-sha256", b"\0\xff" * 16)
    for message in (
        Setup(config, LogConfig(), {key.name: key}, Options(b"v", b"n", b"\x80s", True)),
        Listen(),
    ):
        assert feed.decode_to_worker(feed.encode(message)) == message
    for said in (Report({"ztna_drops\ta\tb": 2.0}, {"pid": 7}), Connection("127.0.0.1", b"\0\xff")):
        assert feed.decode_from_worker(feed.encode(said)) == said
    with pytest.raises(ProtocolError):
        feed.decode_to_worker(feed.encode(said))
    with pytest.raises(ProtocolError):
        feed.decode_from_worker(b"{}")
