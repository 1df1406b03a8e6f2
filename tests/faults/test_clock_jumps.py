"""The wall clock of a host jumps an hour: certificates and freshness go by it, everything else by the monotonic one."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import pytest

from tests.support.clock import Clocks
from tests.support.consul import note_version
from tests.support.lab import Lab, http_get, until
from tests.support.load import ROUTES, load, serve
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HOUR_SECONDS = 3600
START_SECONDS = 2 * HOUR_SECONDS
"""How far ahead of this machine's the clocks are: the certificates are of now, and an hour back must be within them."""
LONG_SECONDS = 3 * 24 * HOUR_SECONDS
"""Longer than a certificate of a lab is valid."""
HELD_FLOWS = 3
"""More than the idle carriers that a jump finds: each jump has new ones made, with certificates judged by its time."""
DAEMONS = ("dnsd", "east", "alpha", "laptop")


@dataclass
class Ground:
    """A mesh, and the clocks of its daemons."""

    mesh: Mesh
    clocks: Clocks


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    clocks: list[Clocks] = []

    def give_clocks(made: Lab) -> None:
        clocks.append(Clocks(made.directory, DAEMONS, START_SECONDS))
        made.environment = clocks[0].environment

    with relayed_mesh("newest", ROUTES, ("east",), prepare=give_clocks) as mesh:
        serve(mesh)
        yield Ground(mesh, clocks[0])


def jump(ground: Ground, whose: tuple[str, ...], seconds: int) -> None:
    """Set their clocks, and see that they go by them as they read their certificates again."""
    for name in whose:
        ground.clocks.set(name, START_SECONDS + seconds)
    for daemon in ground.mesh.lab.daemons:
        if daemon.name in whose:
            before = len(daemon.events("reloading"))
            daemon.signal(signal.SIGHUP)
            until("it reads again", lambda d=daemon, n=before: len(d.events("reloading")) > n)
            said = datetime.fromisoformat(daemon.events("reloading")[-1]["time"])
            assert abs(said.timestamp() - time.time() - START_SECONDS - seconds) < HOUR_SECONDS / 2


@pytest.mark.parametrize("whose", [*((name,) for name in DAEMONS), DAEMONS], ids="+".join)
def test_an_hour_ahead_and_an_hour_behind_disturb_nothing(
    request: pytest.FixtureRequest, ground: Ground, whose: tuple[str, ...]
) -> None:
    note_version(request, "newest")
    mesh = ground.mesh
    with load(mesh) as running, contextlib.ExitStack() as flows:
        held = []
        for seconds in (HOUR_SECONDS, -HOUR_SECONDS, 0):
            jump(ground, whose, seconds)
            held += [flows.enter_context(running.upload_begun()) for _ in range(HELD_FLOWS)]
            running.passes()
        for sock in held:
            running.finish_upload(sock, b"held through it all")
    for daemon in mesh.lab.daemons:
        assert daemon.events("reload_failed") == []
    until("all are ready", lambda: all(daemon.ready() for daemon in mesh.lab.daemons))


@pytest.mark.parametrize("whose", DAEMONS[1:])
def test_a_clock_past_the_certificates_lets_nobody_in_until_it_is_right_again(
    request: pytest.FixtureRequest, ground: Ground, whose: str
) -> None:
    note_version(request, "newest")
    mesh = ground.mesh
    web = mesh.address("web-app")

    def is_served() -> bool:
        try:
            return http_get(mesh.laptop, f"http://{web}:8080/", 3.0)[0] == 200
        except OSError:
            return False

    ground.clocks.set(whose, LONG_SECONDS)
    until("nobody is served", lambda: not is_served())
    ground.clocks.set(whose, START_SECONDS)
    until("it is served", is_served, 40)
    with load(mesh) as running:
        running.passes()
    until("all are ready", lambda: all(daemon.ready() for daemon in mesh.lab.daemons))
