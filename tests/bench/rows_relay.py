"""What connections cost the relay: a handshake each, and 2,000 of them that end at once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.harness import CannotMeasure, Contender, Figures, Measure, Row, cpu_seconds

HANDSHAKES = 500
CONNECTIONS = 2000
GONE_SECONDS = 60.0


def handshakes_row(directory: Path) -> Row:
    """Return the row of handshakes; everything is written under `directory`."""
    return Row(
        "handshakes: mTLS to the relay with Retry, a chain of two each way",
        "reported",
        [Contender("ztna-relay", lambda: relay(directory / "handshakes", handshakes))],
    )


def mass_close_row(directory: Path) -> Row:
    """Return the row of 2,000 connections that end at once."""
    return Row(
        f"mass close: {CONNECTIONS:,} peers say goodbye at once",
        "loop never blocked > 50 ms",
        [Contender("ztna-relay", lambda: relay(directory / "mass-close", mass_close))],
    )


class Process:
    """A program that answers lines with lines of JSON."""

    def __init__(self, log: Path, *argv: str) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.pid = self._process.pid

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotMeasure(f"the process ended: {Path(self._log.name).read_text()[-500:]}")
        return line

    def ask(self, line: str) -> Any:
        self.say(line)
        return json.loads(self.line())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


def handshakes(directory: Path, relay: Process, about: Any) -> Figures:
    """Connect HANDSHAKES agents, 16 at a time."""
    cpu, wall = cpu_seconds([relay.pid]), time.monotonic()
    with contextlib.closing(_Crowd(directory, about, HANDSHAKES)):
        cpu, wall = cpu_seconds([relay.pid]) - cpu, time.monotonic() - wall
    return {
        "per CPU second": HANDSHAKES / cpu,
        "CPU ms each": cpu / HANDSHAKES * 1000,
        "per second": HANDSHAKES / wall,
    }


def mass_close(directory: Path, relay: Process, about: Any) -> Figures:
    """Connect CONNECTIONS agents, have all of them close at once, and wait until the relay has seen it."""
    with contextlib.closing(_Crowd(directory, about, CONNECTIONS)) as crowd:
        relay.ask("watch")
        crowd.close_all()
        deadline = time.monotonic() + GONE_SECONDS
        while (report := relay.ask("report"))["connections"]:
            if time.monotonic() > deadline:
                raise CannotMeasure(f"{report['connections']} connections are still there")
            time.sleep(0.05)
    return {"blocked CPU ms": report["blocked_cpu_ms"], "blocked ms": report["blocked_ms"]}


class _Crowd:
    """So many agents, all connected once this exists."""

    def __init__(self, directory: Path, about: Any, count: int) -> None:
        host, port = about["address"]
        argv = (host, str(port), about["certificate"], about["key"], str(count))
        self._process = Process(directory / "crowd.log", "tests.support.crowd", *argv)
        self._process.line()

    def close_all(self) -> None:
        self._process.say("close")
        self._process.line()

    def close(self) -> None:
        self._process.end()


@contextlib.contextmanager
def relay(directory: Path, measure: Any) -> Iterator[Measure]:
    """A relay in a process of its own."""
    directory.mkdir()
    process = Process(directory / "relay.log", "tests.bench.relay_process", str(directory))
    try:
        about = json.loads(process.line())
        yield lambda: measure(directory, process, about)
    finally:
        process.end()
