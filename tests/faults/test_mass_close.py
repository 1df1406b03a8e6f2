"""Two thousand connections end at once: the relay's loop never stands still meanwhile."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.blocking import Blocking
from tests.support.relay import RunningRelay, running_relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

CONNECTIONS = 2000
BLOCKED_SECONDS_MAX = 0.050
"""Of CPU time: what the machine gives to other processes says nothing about this one."""
READY_SECONDS = 200.0
GONE_SECONDS = 30.0


@asynccontextmanager
async def crowd(mesh: RunningRelay, count: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """So many agents of the relay, in a process of their own."""
    tls = mesh.pki.agent("agent-crowd")
    argv = [*map(str, mesh.address), tls.certificate, tls.key, str(count)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.crowd",
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(READY_SECONDS):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(autouse=True)
def own_garbage_only() -> Iterator[None]:
    """What earlier tests of this process have left is not this relay's to sweep."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("how", "count"), [("peers", CONNECTIONS), ("relay", 300)])
async def test_all_at_once(tmp_path: Path, how: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.admission.CONNECTIONS_PER_IDENTITY_MAX", CONNECTIONS)
    async with running_relay(tmp_path) as mesh, crowd(mesh, count) as process:
        server = mesh.relay.server
        assert len(server.connections) == count
        blocking = Blocking()
        if how == "peers":
            assert process.stdin is not None
            process.stdin.write(b"close\n")
        else:
            closing = asyncio.ensure_future(server.close_all())
        async with asyncio.timeout(GONE_SECONDS):
            while server.connections:
                await asyncio.sleep(0.01)
        blocking.stop()
        if how == "relay":
            await closing
        assert mesh.relay.sessions.peers == {}
        assert blocking.longest_cpu_s < BLOCKED_SECONDS_MAX
