"""What happens in a soak: load, churn and disturbances, then a quiet stretch, then an end that must leave nothing.

In the first part Consul is paused and the relay killed or restarted, in turn; afterwards agents and connectors still
come and go, and memory must stay where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from tests.soak.mesh import (
    PATIENCE_SECONDS,
    PORT,
    Client,
    Server,
    Size,
    SoakMesh,
    descriptors,
    processes,
    resident,
)
from tests.soak.witness import Conversation, ask_udp

DISTURBED_SHARE = 0.6
DISTURBANCE_SECONDS = 9.0
OUTAGE_SECONDS = 4.0
CHURN_SECONDS = 1.0
CONNECTOR_EVERY = 8
"""One in so many that go and come back is a connector."""
ASK_SECONDS = (1.0, 4.0)
QUESTIONS_OF_A_FLOW = 5
SAMPLE_SECONDS = 1.0
GROWTH_BYTES_MAX = 12 * 1024 * 1024
GROWTH_SHARE_MAX = 0.10
SPARE = {"relay": 4, "driver": 4, "dnsd": 20}
"""Descriptors and tasks that may differ: a connection of ours to an admin page, and dnsd's kept ones to Consul, which
are as many as it reads and writes at once."""
MIB = 1024 * 1024


@dataclass
class Verdict:
    """Figures for people, and what was wrong."""

    told: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    descriptors: int
    tasks: int


async def soak(directory: Path, size: Size, seconds: float) -> Verdict:
    """Run it all and judge it."""
    verdict = Verdict()
    async with processes(directory, size) as mesh:
        before = {"relay": await _held(mesh.relay), "dnsd": await _held(mesh.dnsd), "driver": _own()}
        await mesh.start()
        memory = _Memory(mesh)
        async with asyncio.TaskGroup() as tasks:
            load = [tasks.create_task(_talk(mesh, client)) for client in mesh.clients]
            load += [tasks.create_task(_churn(mesh)), tasks.create_task(memory.run())]
            disturbing = tasks.create_task(_disturb(mesh, seconds * DISTURBED_SHARE, verdict))
            await disturbing
            # Memory is compared from when everybody is served again: a relay that was killed begins small.
            verdict.wrong += await _settle(mesh)
            memory.mark()
            mesh.ledger.amid = "churn alone"
            await asyncio.sleep(seconds * (1 - DISTURBED_SHARE))
            for task in load:
                task.cancel()
        await asyncio.gather(*(_wait_up(each) for each in (*mesh.clients, *mesh.servers)))
        verdict.wrong += await _settle(mesh)
        verdict.told += memory.told(verdict.wrong)
        await mesh.stop_all()
        await _judge_leaks(mesh, before, verdict)
    ledger = mesh.ledger
    verdict.told.append(
        f"answered: {dict(ledger.answered)}; refused or lost amid disturbances: {dict(ledger.failed)}"
    )
    verdict.wrong += [f"misdelivered: {each}" for each in ledger.misdelivered[:10]]
    verdict.told.append(f"misdelivered: {len(ledger.misdelivered)}")
    return verdict


# Load


async def _talk(mesh: SoakMesh, client: Client) -> None:
    """Be the programs of one host: ask by UDP and on TCP flows, again and again."""
    services, ledger = client.services, mesh.ledger
    while True:
        flow = Conversation(client.name, services["tcp"], ledger)
        try:
            talking = await flow.connect(client.address("tcp"), PORT)
            for _ in range(QUESTIONS_OF_A_FLOW):
                await ask_udp(client.name, services["udp"], client.address("udp"), PORT, ledger)
                talking = talking and await flow.ask()
                await asyncio.sleep(random.uniform(*ASK_SECONDS))
        finally:
            await flow.close()


async def _churn(mesh: SoakMesh) -> None:
    """Let agents and connectors leave and come back, one after the other."""
    turn = 0
    while True:
        await asyncio.sleep(CHURN_SECONDS)
        turn += 1
        # Shielded: one that is cancelled amid its start or end would be left half done.
        if turn % CONNECTOR_EVERY == 0:
            await asyncio.shield(_again(mesh, random.choice(mesh.servers), mesh.start_server))
        else:
            await asyncio.shield(_again(mesh, random.choice(mesh.clients), mesh.start_client))


async def _again(mesh: SoakMesh, one: Client | Server, start: Callable[..., object]) -> None:
    await mesh.stop(one)
    await start(one)  # type: ignore[misc]


async def _disturb(mesh: SoakMesh, seconds: float, verdict: Verdict) -> None:
    """Pause Consul, kill the relay, restart the relay, and so on."""
    end = time.monotonic() + seconds
    kinds = {
        "Consul paused": _consul_outage,
        "relay killed": _relay_killed,
        "relay restarted": _relay_restarted,
    }
    turns = itertools.cycle(kinds.items())
    done = 0
    while time.monotonic() + DISTURBANCE_SECONDS < end:
        await asyncio.sleep(DISTURBANCE_SECONDS)
        mesh.ledger.amid, disturb = next(turns)
        await disturb(mesh)
        done += 1
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    verdict.told.append(f"disturbances: {done} (Consul paused, relay killed, relay restarted, in turn)")


async def _consul_outage(mesh: SoakMesh) -> None:
    mesh.consul.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(OUTAGE_SECONDS)
    finally:
        mesh.consul.signal(signal.SIGCONT)


async def _relay_killed(mesh: SoakMesh) -> None:
    mesh.relay.kill()
    mesh.relay.start()


async def _relay_restarted(mesh: SoakMesh) -> None:
    await asyncio.to_thread(mesh.relay.restart)


# The end


async def _wait_up(one: Client | Server) -> None:
    if one.running is not None:
        await one.running.ready(PATIENCE_SECONDS)


async def _settle(mesh: SoakMesh) -> list[str]:
    """Ask until everybody is answered again; return who never is."""

    async def answered(client: Client) -> str | None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            flow = Conversation(client.name, client.services["tcp"], mesh.ledger)
            try:
                tcp = await flow.connect(client.address("tcp"), PORT) and await flow.ask()
            finally:
                await flow.close()
            udp = await ask_udp(client.name, client.services["udp"], client.address("udp"), PORT, mesh.ledger)
            if tcp and udp:
                return None
            await asyncio.sleep(1.0)
        return f"{client.name} is not served any more"

    return [why for why in await asyncio.gather(*map(answered, mesh.clients)) if why]


async def _judge_leaks(mesh: SoakMesh, before: dict[str, Held], verdict: Verdict) -> None:
    """Wait until nothing of the clients is left, and say what is after PATIENCE_SECONDS."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        gc.collect()
        now = {"relay": await _held(mesh.relay), "dnsd": await _held(mesh.dnsd), "driver": _own()}
        left = await asyncio.to_thread(_left_at_relay, mesh)
        for name, held in now.items():
            if (
                held.descriptors > before[name].descriptors + SPARE[name]
                or held.tasks > before[name].tasks + SPARE[name]
            ):
                left.append(f"{name} holds {held}, at the start {before[name]}")
        if not left or time.monotonic() > end:
            break
        await asyncio.sleep(1.0)
    verdict.wrong += [f"leaked: {each}" for each in left]
    verdict.told += [
        f"{name}: {was.descriptors} descriptors and {was.tasks} tasks at the start, "
        f"{now[name].descriptors} and {now[name].tasks} at the end"
        for name, was in before.items()
    ]


def _left_at_relay(mesh: SoakMesh) -> list[str]:
    status = mesh.relay.status()
    return [
        f"the relay still has {len(status[key])} {key}" for key in ("connections", "sessions") if status[key]
    ]


async def _held(process: object) -> Held:
    status = await asyncio.to_thread(process.status)  # type: ignore[attr-defined]
    return Held(descriptors(process.pid), status["tasks_running"])  # type: ignore[attr-defined]


def _own() -> Held:
    return Held(descriptors(), len(asyncio.all_tasks()))


class _Memory:
    """Resident sizes over time; `mark` says from when on they must not grow."""

    def __init__(self, mesh: SoakMesh) -> None:
        self._mesh = mesh
        self._samples: list[dict[str, int]] = []
        self._from = 0

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            # A relay that is being restarted has no size for a moment.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._samples.append(
                    {
                        "relay": resident(self._mesh.relay.pid),
                        "dnsd": resident(self._mesh.dnsd.pid),
                        "driver": resident(),
                    }
                )
            await asyncio.sleep(SAMPLE_SECONDS)

    def mark(self) -> None:
        """Nothing is disturbed from now on."""
        self._from = len(self._samples)

    def told(self, wrong: list[str]) -> list[str]:
        """Return each process's sizes; what grew between the first and the last third of the quiet is wrong."""
        quiet = self._samples[self._from :]
        third = max(1, len(quiet) // 3)
        lines = []
        for name in quiet[0]:
            first = mean(each[name] for each in quiet[:third])
            last = mean(each[name] for each in quiet[-third:])
            most = max(each[name] for each in self._samples)
            lines.append(
                f"{name}: {first / MIB:.1f} MiB early in the quiet, {last / MIB:.1f} late, at most {most / MIB:.1f}"
            )
            if last - first > max(GROWTH_BYTES_MAX, GROWTH_SHARE_MAX * first):
                wrong.append(f"memory of {name} grew from {first / MIB:.1f} to {last / MIB:.1f} MiB")
        return lines
