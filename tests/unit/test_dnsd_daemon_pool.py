"""The pool of a running ztna-dnsd: how full it is, and what SIGHUP makes of a changed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

import dnsd.daemon
from tests.support.consul import ConsulUnderTest, free_ports
from tests.unit.test_dnsd_daemon import consul as consul
from tests.unit.test_dnsd_daemon import register, running, until
from ztna.config import PoolConfig
from ztna.errors import ConfigError
from ztna.telemetry import POOL, UNLEASED


async def test_a_pool_that_is_nearly_used_up_is_told_before_it_is(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dnsd.daemon, "TICK_SECONDS", 0.05)
    async with running(consul.config()) as here:

        def warnings() -> dict[str, str]:
            return here.daemon.readiness.report()["warnings"]  # type: ignore[no-any-return]

        def pool() -> object:
            return here.daemon.status_sources["pool"]()

        await register(consul, *(f"s{number}" for number in range(5)))
        await until("five", lambda: pool() == {"size": 6, "leased": 5, "resting": 0, "free": 1})
        assert "pool" not in warnings()
        await register(consul, "s5")
        await until("told", lambda: warnings().get("pool", "").startswith("6 of 6 addresses are in use"))
        assert "services" not in warnings()
        assert (POOL.labels("leased")._value.get(), UNLEASED._value.get()) == (6, 0)
        await register(consul, "s6")
        await until("exhausted", lambda: UNLEASED._value.get() == 1)


async def test_networks_that_overlap_are_refused(consul: ConsulUnderTest) -> None:
    networks = PoolConfig(cidr=IPv4Network("10.0.0.0/8"), more=(IPv4Network("10.9.0.0/16"),))
    with pytest.raises(ExceptionGroup) as refused:
        async with running(consul.config(), pool=networks):
            pass
    assert refused.group_contains(ConfigError, match=r"dnsd\.pool: 10\.0\.0\.0/8 and 10\.9\.0\.0/16 overlap")


class Process:
    """A ztna-dnsd of its own with a file that can be changed."""

    def __init__(self, folder: Path, consul: ConsulUnderTest) -> None:
        self._file = folder / "dnsd.yaml"
        self._consul = consul.address
        self.port, self._admin = free_ports(2)
        self.configure("pool: {cidr: 127.100.0.0/29}")
        script = str(Path(sys.executable).parent / "ztna-dnsd")
        self.process = subprocess.Popen(
            [script, "--config", str(self._file)], stderr=(folder / "log").open("wb")
        )
        self._log = folder / "log"

    def configure(self, keys: str) -> None:
        listen = f"listen: '127.0.0.1:{self.port}', admin: '127.0.0.1:{self._admin}'"
        self._file.write_text(f"consul: {{address: '{self._consul}'}}\ndnsd: {{{listen}, {keys}}}\n")

    def reload(self, keys: str) -> None:
        self.configure(keys)
        self.process.send_signal(signal.SIGHUP)

    def status(self) -> dict[str, Any]:
        asked = ["curl", "-sS", f"http://127.0.0.1:{self._admin}/status"]
        done = subprocess.run(asked, capture_output=True, timeout=10)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self._log.read_text().splitlines())
        return [line for line in lines if line["event"] == name]

    def wait(self, what: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while True:
            status = self.status()
            if status and condition(status):
                return status
            assert time.monotonic() < deadline, f"{what}: {status}\n{self._log.read_text()[-3000:]}"
            time.sleep(0.05)


@contextmanager
def process(folder: Path, consul: ConsulUnderTest) -> Iterator[Process]:
    made = Process(folder, consul)
    try:
        yield made
    finally:
        made.process.terminate()
        assert made.process.wait(10) == 0


async def test_sighup_grows_and_shrinks_the_pool_of_a_running_daemon(
    consul: ConsulUnderTest, tmp_path: Path
) -> None:
    names = [f"s{number}" for number in range(8)]
    await register(consul, *names)
    with process(tmp_path, consul) as here:
        full = here.wait("full", lambda found: len(found["keeper"]["problems"]) == 2)
        assert (
            "pool" in here.wait("told", lambda found: found["readiness"]["warnings"])["readiness"]["warnings"]
        )

        here.reload("pool: {cidr: 127.100.0.0/29, more: [127.101.0.0/29]}")
        grown = here.wait("grown", lambda found: found["dns"]["leases"] == 8 and found["pool"]["size"] == 12)
        assert grown["keeper"]["problems"] == {}
        assert grown["pid"] == full["pid"]

        here.reload("pool: {cidr: 127.101.0.0/29}, ttl_s: 7")
        shrunk = here.wait("six are outside", lambda found: len(found["keeper"]["problems"]) == 6)
        assert shrunk["dns"]["leases"] == 8, "they keep their addresses"
        assert all("is outside the pool" in what for what in shrunk["keeper"]["problems"].values())
        told = here.wait("told", lambda found: "reload" in found["readiness"]["warnings"])
        assert told["readiness"]["warnings"]["reload"] == "only a restart changes dnsd.ttl_s"

        here.reload("pool: {cidr: 127.101.0.0/29, more: [127.101.0.0/30]}")
        here.wait("refused", lambda _: here.events("reload_failed"))
        assert "overlap" in here.events("reload_failed")[0]["error"]
        assert here.status()["pool"]["size"] == 6, "and it goes on with what it had"
