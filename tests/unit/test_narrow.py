"""ztna.narrow: who is under suspicion, for how long, and how many at most."""

from __future__ import annotations

from ztna.narrow import NARROW_HOSTS_MAX, NARROW_SECONDS, NarrowHosts

HOST = "192.0.2.1"


def test_a_host_is_suspect_for_a_while() -> None:
    hosts = NarrowHosts()
    assert not hosts.is_suspect(HOST, 0.0)
    hosts.suspect(HOST, 10.0)
    assert hosts.is_suspect(HOST, 10.0 + NARROW_SECONDS - 1)
    assert not hosts.is_suspect("192.0.2.2", 11.0)
    hosts.suspect(HOST, 20.0)
    assert hosts.is_suspect(HOST, 15.0 + NARROW_SECONDS)
    assert not hosts.is_suspect(HOST, 20.0 + NARROW_SECONDS)
    assert not hosts.is_suspect(HOST, 0.0), "it was forgotten"


def test_the_oldest_makes_room() -> None:
    hosts = NarrowHosts()
    for number in range(NARROW_HOSTS_MAX + 1):
        hosts.suspect(str(number), 0.0)
    assert not hosts.is_suspect("0", 1.0)
    assert hosts.is_suspect("1", 1.0)
    assert hosts.is_suspect(str(NARROW_HOSTS_MAX), 1.0)
