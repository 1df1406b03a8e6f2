"""ztna.sd_notify: what a manager hears, over a real socket of the test's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service_manager import Manager
from ztna.sd_notify import STATUS_CHARACTERS_MAX, ServiceManager


@pytest.fixture(params=["path", "abstract"])
def heard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager.in_folder(tmp_path) if request.param == "path" else Manager.abstract()
    yield manager
    manager.close()


def test_ready_is_said_once_and_each_new_status(heard: Manager) -> None:
    told = ServiceManager.from_environment(heard.environment(), 1)
    told.changed(ready=False, status="waiting for consul (no\nleader)")
    told.changed(ready=False, status="waiting for consul (no leader)")
    told.changed(ready=True, status="ready")
    told.changed(ready=False, status="waiting for relay")
    told.changed(ready=True, status="ready")
    told.stopping("draining")
    heard.until_said("STOPPING=1")
    assert heard.heard == [
        "STATUS=waiting for consul (no leader)",
        "STATUS=ready",
        "READY=1",
        "STATUS=waiting for relay",
        "STATUS=ready",
        "STATUS=draining",
        "STOPPING=1",
    ]
    told.close()


def test_a_reload_begins_with_its_time_and_ends(heard: Manager) -> None:
    told = ServiceManager.from_environment(heard.environment(), 1)
    told.reloading(17)
    told.reloaded()
    told.changed(ready=True, status="ready")
    told.reloading(18)
    told.reloaded()
    heard.until(lambda lines: lines.count("READY=1") == 2)
    assert heard.heard == [
        "RELOADING=1", "MONOTONIC_USEC=17", "STATUS=ready", "READY=1",
        "RELOADING=1", "MONOTONIC_USEC=18", "READY=1",
    ]  # fmt: skip
    told.close()


def test_the_environment_is_taken_so_that_children_do_not_speak() -> None:
    given = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "7", "HOME": "/"}
    assert ServiceManager.from_environment(given, 7).listens
    assert given == {"HOME": "/"}
    assert not ServiceManager.from_environment(given, 7).listens


async def test_the_loop_proves_that_it_lives(tmp_path: Path) -> None:
    heard = Manager.in_folder(tmp_path)
    told = ServiceManager.from_environment(heard.environment(watchdog_s=0.02), 1)
    keeping = asyncio.create_task(told.keep())
    await asyncio.to_thread(heard.until, lambda lines: lines.count("WATCHDOG=1") >= 3)
    told.close()
    async with asyncio.timeout(10):
        await keeping
    heard.close()


@pytest.mark.parametrize(
    "watchdog",
    [{"WATCHDOG_USEC": "20", "WATCHDOG_PID": "8"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
)
async def test_a_watchdog_that_is_anothers_or_none_is_not_fed(
    tmp_path: Path, watchdog: dict[str, str]
) -> None:
    heard = Manager.in_folder(tmp_path)
    told = ServiceManager.from_environment(heard.environment() | watchdog, 7)
    keeping = asyncio.create_task(told.keep())
    await asyncio.sleep(0)
    told.stopping("ended")
    heard.until_said("STOPPING=1")
    assert heard.heard == ["STATUS=ended", "STOPPING=1"]
    keeping.cancel()
    told.close()
    heard.close()


def test_a_manager_that_is_away_or_full_costs_nothing_and_hears_the_last_later(tmp_path: Path) -> None:
    told = ServiceManager(str(tmp_path / "notify"))
    told.changed(ready=False, status="waiting for a")
    heard = Manager.in_folder(tmp_path)
    told.changed(ready=False, status="waiting for b")
    told.changed(ready=True, status="ready")
    heard.until_said("READY=1")
    assert heard.heard == ["STATUS=waiting for b", "STATUS=ready", "READY=1"]
    for number in range(5000):
        told.changed(ready=True, status=f"waiting for {number}")
    told.stopping("x" * 9999)
    heard.read(1.0)
    told.reloaded()
    told.stopping("end")
    heard.until_said("STATUS=end")
    assert "STATUS=waiting for 4999" not in heard.heard, "a status that is over is not said again"
    assert f"STATUS={'x' * STATUS_CHARACTERS_MAX}" in heard.heard
    assert "STOPPING=1" in heard.heard
    told.close()
    heard.close()


def test_nobody_listens_and_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    told = ServiceManager(None)
    told.changed(ready=True, status="ready")
    told.reloading(1)
    told.stopping("ended")
    told.close()
