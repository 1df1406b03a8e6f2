"""Relays that are killed, restarted or drained under downloads and idle flows: every byte arrives, nothing is reset."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.support.consul import note_version
from tests.support.lab import http_get, until
from tests.support.relayed import Mesh, killed, relayed_mesh, swallowed
from tests.support.traffic import PATIENCE_SECONDS, ROUTES, traffic

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

DRAIN_SECONDS = 3.0
"""How long a relay that has no other beside it waits in vain to be left."""
pytestmark.append(pytest.mark.timeout(PATIENCE_SECONDS + 120))


@contextmanager
def mesh_of(request: pytest.FixtureRequest, relays: Sequence[str], drain_s: float) -> Iterator[Mesh]:
    note_version(request, "newest")
    with relayed_mesh("newest", ROUTES, relays, drain_s=drain_s) as made:
        yield made


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with mesh_of(request, ("east", "west"), PATIENCE_SECONDS) as made:
        yield made


@pytest.fixture
def one(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with mesh_of(request, ("east",), DRAIN_SECONDS) as made:
        yield made


def used(mesh: Mesh) -> str:
    """Return the relay that the sessions are at."""
    return str(mesh.status()["sessions"][0]["relay"])


@pytest.mark.parametrize("lose", [killed, swallowed])
def test_one_of_two_is_lost(two: Mesh, lose: Callable[[Mesh, str], AbstractContextManager[None]]) -> None:
    with traffic(two) as running:
        running.wait_for(0.25)
        doomed = used(two)
        with lose(two, doomed):
            running.check()
        assert doomed not in {session["relay"] for session in two.status()["sessions"]}


def kill_and_start(mesh: Mesh, relay: str) -> None:
    mesh.relays[relay].kill()
    mesh.relays[relay].start()


def stop_and_start(mesh: Mesh, relay: str) -> None:
    assert mesh.relays[relay].stop(60) == 0
    mesh.relays[relay].start()


@pytest.mark.parametrize("restart", [kill_and_start, stop_and_start])
def test_the_only_one_is_restarted(one: Mesh, restart: Callable[[Mesh, str], None]) -> None:
    with traffic(one) as running:
        running.wait_for(0.25)
        restart(one, "east")
        running.check()


def test_a_drained_relay_fails_nothing(two: Mesh) -> None:
    """A held flow, requests all the time, and downloads, while one of two relays drains and goes."""
    with traffic(two) as running:
        web = two.address("web-app")
        over, answers = threading.Event(), list[int]()

        def ask() -> None:
            while not over.is_set():
                answers.append(http_get(two.laptop, f"http://{web}:8080/")[0])

        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(ask)
            try:
                running.wait_for(0.1)
                until("it is answered", lambda: len(answers) > 3)
                doomed = used(two)
                begun = time.monotonic()
                assert two.relays[doomed].stop(60) == 0
                print(f"{doomed} had drained after {time.monotonic() - begun:.2f} s")
                before = len(answers)
                until("and it still is", lambda: len(answers) > before + 3)
            finally:
                over.set()
            asking.result(PATIENCE_SECONDS)
        assert set(answers) == {200}
        running.check()


def test_a_second_signal_ends_a_relay_at_once(one: Mesh) -> None:
    with traffic(one) as running:
        running.wait_for(0.1)
        relay = one.relays["east"]
        relay.signal(signal.SIGTERM)
        until("it drains", lambda: relay.events("draining"), every=0.01)
        begun = time.monotonic()
        assert relay.stop(10) != 0, "it was cut short"
        assert time.monotonic() - begun < DRAIN_SECONDS - 1
        relay.start()
        running.check()
