"""What only Consul's own clocks can show: sessions that run out and services that are reaped.

The clocks are not ours, so this waits, a minute and a half, for all Consuls at once.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.consul import KINDS, ConsulUnderTest, shared_of_kind
from ztna.catalog import CheckDefinition, Registration
from ztna.consul.client import ConsulClient

pytestmark = [pytest.mark.real_consul, pytest.mark.slow]

SESSION_TTL_SECONDS = 10.0
SESSION_GONE_SECONDS = 40.0
DEREGISTER_SECONDS = 60.0
REAPED_SECONDS = 110.0
POLL_SECONDS = 0.2


async def session_runs_out(consul: ConsulUnderTest, key: str) -> None:
    """A lock outlives its session's TTL, and not for long."""
    async with ConsulClient(consul.config()) as client:
        session = await client.session_create(key, ttl_s=SESSION_TTL_SECONDS, lock_delay_s=0)
        assert await client.kv_put(key, b"", acquire=session)
        started = time.monotonic()
        while (pair := await client.kv_get(key)) is not None and pair.session is not None:
            await asyncio.sleep(POLL_SECONDS)
            assert time.monotonic() - started < SESSION_GONE_SECONDS, consul.version
        assert time.monotonic() - started >= SESSION_TTL_SECONDS
        assert not await client.session_renew(session)


async def service_is_reaped(consul: ConsulUnderTest, name: str) -> None:
    """A critical service goes after its time, and a late report finds no check."""
    check = CheckDefinition(
        check_id=f"{name}:ttl", name="b", ttl_s=2, status="passing", deregister_after_s=DEREGISTER_SECONDS
    )
    registration = Registration(
        service=name, instance_id=f"{name}@c1", address="127.0.0.1", port=1, checks=(check,)
    )
    async with ConsulClient(consul.config()) as client:
        await client.register_service(registration)
        started = time.monotonic()
        while not await client.service_instances(name):
            await asyncio.sleep(POLL_SECONDS)
        while await client.service_instances(name):
            await asyncio.sleep(POLL_SECONDS)
            assert time.monotonic() - started < REAPED_SECONDS, consul.version
        assert time.monotonic() - started >= DEREGISTER_SECONDS
        assert not await client.update_check(check.check_id, "passing")


async def test_sessions_run_out_and_critical_services_are_reaped(
    request: pytest.FixtureRequest, unique: str
) -> None:
    consuls = [shared_of_kind(request, kind) for kind in KINDS]
    async with asyncio.TaskGroup() as tasks:
        for consul in consuls:
            tasks.create_task(session_runs_out(consul, unique))
            tasks.create_task(service_is_reaped(consul, unique))
