"""Every daemon tells its service manager how it is, as systemd's Type=notify and WatchdogSec= want it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.lab import Daemon, Lab, lab, tcp_route
from tests.support.service_manager import Manager
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

WATCHDOG_SECONDS = 1.0
DAEMONS = ("dnsd", "relay", "connector", "agent")


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    with lab("core") as made:
        made.start_consul("embedded")
        made.dnsd()
        made.relay()
        made.connector("alpha", routes=[tcp_route("web-app", Endpoint("127.0.0.1", 9), kind="none")])
        made.agent("agent", services=["web-app"])
        yield made


@pytest.fixture(params=DAEMONS)
def managed(request: pytest.FixtureRequest, made: Lab) -> Iterator[tuple[Daemon, Manager]]:
    """One of the daemons, started again by a manager that watches it."""
    names = {"connector": "alpha"}
    daemon = next(one for one in made.daemons if one.name == names.get(request.param, request.param))
    daemon.stop()
    manager = Manager(str(made.directory / f"{request.param}.notify"))
    daemon.environment = manager.environment(WATCHDOG_SECONDS)
    daemon.start()
    yield daemon, manager
    daemon.environment = {}
    daemon.restart()
    manager.close()


def test_ready_when_ready_alive_through_a_reload_and_consuls_absence_then_stopping(
    made: Lab, managed: tuple[Daemon, Manager]
) -> None:
    daemon, manager = managed
    manager.until_said("READY=1")
    assert daemon.ready()
    statuses = [line for line in manager.heard if line.startswith("STATUS=")]
    assert statuses[0].startswith("STATUS=waiting for ")
    assert statuses[-1] == "STATUS=ready"

    daemon.signal(signal.SIGHUP)
    manager.until(lambda heard: heard.count("READY=1") == 2)
    reload = manager.heard.index("RELOADING=1")
    assert manager.heard[reload + 1].startswith("MONOTONIC_USEC=")
    assert "READY=1" in manager.heard[reload:]

    consul = next(one for one in made.running if one.name == "consul")
    consul.kill()
    try:
        before = manager.heard.count("WATCHDOG=1")
        manager.until(lambda heard: heard.count("WATCHDOG=1") >= before + 4)
    finally:
        consul.start()

    daemon.signal(signal.SIGTERM)
    manager.until_said("STOPPING=1")
    assert daemon.process is not None
    assert daemon.process.wait(20.0) == 0, "a second SIGTERM would end it at once"
    assert "SIGTERM" in next(line for line in reversed(manager.heard) if "draining" in line)


def test_a_loop_that_stands_still_says_nothing(made: Lab) -> None:
    daemon = next(one for one in made.daemons if one.name == "dnsd")
    daemon.stop()
    manager = Manager(str(made.directory / "still.notify"))
    daemon.environment = manager.environment(WATCHDOG_SECONDS)
    daemon.start()
    manager.until_said("WATCHDOG=1")
    daemon.signal(signal.SIGSTOP)
    manager.read(0.0)
    heard = len(manager.heard)
    manager.read(2 * WATCHDOG_SECONDS)
    assert manager.heard[heard:] == []
    daemon.signal(signal.SIGCONT)
    manager.until(lambda lines: "WATCHDOG=1" in lines[heard:])
    daemon.environment = {}
    daemon.restart()
    manager.close()
