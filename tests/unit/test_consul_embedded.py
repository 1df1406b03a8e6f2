"""The embedded Consul where real ones are too slow to be asked: time passing, reaping, its data file, its command.

What it answers is held to real Consuls by tests/contract.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ztna.catalog import CheckDefinition, Registration
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.consul.durations import duration_s
from ztna.consul.embedded import EmbeddedConsul
from ztna.consul.registry import Registry
from ztna.consul.store import TOMBSTONES_MAX, Clock, Refusal, Store
from ztna.errors import ConfigError

KEY = "k"


def store(**session: str) -> tuple[Store, str]:
    made = Store()
    return made, made.create_session("s1", {"TTL": "10s", **session}, "n", 100.0)


def test_a_session_lives_twice_its_ttl() -> None:
    kept, session = store()
    assert kept.acquire(KEY, b"", 0, session, 100.0)
    kept.expire(119.9)
    assert kept.entries[KEY].session == session
    kept.expire(120.0)
    assert kept.entries[KEY].session == ""
    assert session not in kept.sessions


def test_renewing_a_session_extends_it() -> None:
    kept, session = store()
    kept.renew_session(session, 115.0)
    kept.expire(134.9)
    assert session in kept.sessions
    kept.expire(135.0)
    assert session not in kept.sessions


def test_an_ended_session_deletes_its_keys_when_it_was_made_so() -> None:
    kept, session = store(Behavior="delete")
    kept.acquire(KEY, b"", 0, session, 100.0)
    kept.expire(120.0)
    assert kept.entries == {}
    assert kept.tombstones == {KEY: kept.kv_index}


@pytest.mark.parametrize(
    ("delay", "seconds"), [(None, 15.0), ("5s", 5.0), (7, 7.0), (2e9, 2.0), ("2m", 60.0)]
)
def test_the_lock_delay_runs_from_the_end_of_the_session(delay: str | float | None, seconds: float) -> None:
    kept = Store()
    fields = {} if delay is None else {"LockDelay": delay}
    old, new = (kept.create_session(name, fields, "n", 0.0) for name in ("old", "new"))
    kept.acquire(KEY, b"", 0, old, 0.0)
    kept.end_session(old, 100.0)
    assert not kept.acquire(KEY, b"", 0, new, 100.0 + seconds - 0.1)
    assert kept.acquire(KEY, b"", 0, new, 100.0 + seconds)
    kept.expire(1000.0)
    assert kept.lock_delays == {}


def test_a_lock_delay_that_is_none() -> None:
    with pytest.raises(Refusal, match='invalid duration "soon"'):
        Store().create_session("s", {"LockDelay": "soon"}, "n", 0.0)


def test_tombstones_are_bounded() -> None:
    kept = Store()
    for number in range(TOMBSTONES_MAX + 5):
        kept.put(f"{number}", b"")
        kept.delete(f"{number}")
    assert len(kept.tombstones) == TOMBSTONES_MAX


def service(**check: object) -> dict[str, object]:
    return {"ID": "web-1", "Name": "web", "Check": {"CheckID": "c", "TTL": "15s", **check}}


def test_a_ttl_expires_and_a_report_renews_it() -> None:
    registry = Registry(Clock())
    registry.register(service(Status="passing"), 100.0)
    registry.expire(114.9)
    assert registry.checks["c"].status == "passing"
    registry.report("c", "passing", "", 114.9)
    registry.expire(129.8)
    assert registry.checks["c"].status == "passing"
    registry.expire(129.9)
    assert (registry.checks["c"].status, registry.checks["c"].output) == ("critical", "TTL expired")


def test_a_critical_service_is_reaped_after_its_time_and_not_before() -> None:
    registry = Registry(Clock())
    registry.register(service(Status="passing", DeregisterCriticalServiceAfter="90s"), 100.0)
    registry.expire(120.0)
    registry.reap(210.0)
    assert "web-1" in registry.services
    registry.report("c", "passing", "", 205.0)
    registry.reap(300.0)
    assert "web-1" in registry.services
    registry.expire(300.0)
    registry.reap(391.0)
    assert registry.services == {}
    assert registry.checks == {}
    with pytest.raises(Refusal, match="Unknown check ID"):
        registry.report("c", "passing", "", 392.0)


def test_reaping_waits_a_minute_at_least() -> None:
    registry = Registry(Clock())
    registry.register(service(DeregisterCriticalServiceAfter="1s"), 100.0)
    registry.reap(159.0)
    assert "web-1" in registry.services
    registry.reap(161.0)
    assert registry.services == {}


def test_a_service_may_take_another_name() -> None:
    registry = Registry(Clock())
    registry.register(service(), 0.0)
    registry.register({"ID": "web-1", "Name": "other"}, 0.0)
    assert [each.name for each in registry.services.values()] == ["other"]
    assert registry.named("web") == []


def test_checks_it_cannot_run_are_refused() -> None:
    registry = Registry(Clock())
    with pytest.raises(Refusal, match="runs TTL checks only, not HTTP"):
        registry.register({"Name": "web", "Check": {"HTTP": "http://127.0.0.1/", "Interval": "5s"}}, 0.0)
    with pytest.raises(Refusal, match="Status for checks must"):
        registry.register(service(Status="fine"), 0.0)
    assert registry.services == {}


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("1m30s", 90), ("300ms", 0.3), ("1.5h", 5400), ("0", 0), (5e9, 5)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "-5s", "5x"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration"):
        duration_s(text)


async def test_its_data_file_keeps_everything(tmp_path: Path) -> None:
    data = tmp_path / "state"
    first = await EmbeddedConsul.start(data=data)
    check = CheckDefinition(check_id="c", name="c", ttl_s=60, status="passing")
    registration = Registration(
        service="web", instance_id="web-1", address="127.0.0.1", port=1, checks=(check,)
    )
    async with ConsulClient(ConsulConfig(address=first.address)) as client:
        session = await client.session_create("keeper", ttl_s=10)
        assert await client.kv_put("k", b"\xff", acquire=session)
        await client.register_service(registration)
        before = await client.kv_get("k"), await client.service_instances("web")
    await first.stop()
    second = await EmbeddedConsul.start(data=data)
    async with ConsulClient(ConsulConfig(address=second.address)) as client:
        assert (await client.kv_get("k"), await client.service_instances("web")) == before
        assert await client.session_renew(session)
        assert await client.update_check("c", "critical")
        assert (await client.service_instances("web"))[0].status == "critical"
    await second.stop()


async def test_a_data_file_that_is_none(tmp_path: Path) -> None:
    data = tmp_path / "state"
    data.write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        await EmbeddedConsul.start(data=data)


async def test_a_port_that_is_taken_is_named() -> None:
    server = await EmbeddedConsul.start()
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        await EmbeddedConsul.start(port=port)
    await server.stop()


async def test_its_own_timers_wake_blocking_queries() -> None:
    server = await EmbeddedConsul.start()
    check = CheckDefinition(check_id="c", name="c", ttl_s=0.3, status="passing")
    registration = Registration(service="web", instance_id="w", address="127.0.0.1", port=1, checks=(check,))
    async with ConsulClient(ConsulConfig(address=server.address)) as client:
        await client.register_service(registration)
        first = await client.read("/v1/health/service/web")
        async with asyncio.timeout(5):
            later = await client.read("/v1/health/service/web", index=first.index, wait_s=30)
        assert later.data[0]["Checks"][1]["Status"] == "critical"
    await server.stop()


def test_the_command_says_where_it_listens_and_what_it_is(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "ztna.consul.embedded", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        assert "Not for production" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    refused = subprocess.run([*argv[:4], "nowhere"], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 2
    assert "expected host:port" in refused.stderr
