"""Ours and the peers in turn: rounds, the first dropped, medians and ratios to the first contender.

Shared machines make single absolute times worthless, so every contender of a row is measured in each round,
one after the other, and what is quoted is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60.0

Figures = Mapping[str, float]
Measure = Callable[[], Figures]


class CannotMeasure(Exception):
    """A contender is not to be had here; says why."""


@dataclass
class Contender:
    """One program in a row; `enter` starts it and yields what measures it once."""

    name: str
    enter: Callable[[], contextlib.AbstractContextManager[Measure]]


@dataclass
class Row:
    """What is measured, in which unit, against whom; ours comes first."""

    name: str
    target: str
    contenders: Sequence[Contender]


@dataclass
class Result:
    """Every figure of every round of one contender, the first round dropped."""

    contender: str
    figures: dict[str, list[float]] = field(default_factory=dict)
    missing: str = ""

    def medians(self) -> dict[str, float]:
        """Return the median of each figure."""
        return {name: median(values) for name, values in self.figures.items()}


def run_row(row: Row, rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Measure all contenders of a row in turn, `rounds` times after one that is dropped."""
    results = {contender.name: Result(contender.name) for contender in row.contenders}
    with contextlib.ExitStack() as stack:
        measures: dict[str, Measure] = {}
        for contender in row.contenders:
            try:
                measures[contender.name] = stack.enter_context(contender.enter())
            except CannotMeasure as error:
                results[contender.name].missing = str(error)
                say(f"  {contender.name}: left out: {error}")
        for number in range(rounds + 1):
            for name, measure in measures.items():
                figures = measure()
                told = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
                say(f"  round {number}{' (dropped)' if number == 0 else ''} {name}: {told}")
                if number:
                    for key, value in figures.items():
                        results[name].figures.setdefault(key, []).append(value)
    return list(results.values())


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the user and system time that these processes, threads included, have had."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def with_children(pid: int) -> list[int]:
    """Return a process and those it has started that live."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def run_delay_seconds(pids: Sequence[int]) -> float:
    """Return how long these processes' first threads were ready and had no processor (sched-stats.rst)."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) for pid in pids) / 1e9


def memory_bytes(pid: int) -> int:
    """Return a process's resident size."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def need(tool: str, package: str) -> str:
    """Return the path of a tool; CannotMeasure names the package that has it."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise CannotMeasure(f"{tool} is not installed (package {package})")
    return path


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a port of 127.0.0.1 that was free just now, for UDP and TCP."""
    while True:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        ):
            tcp.bind(("127.0.0.1", 0))
            port: int = tcp.getsockname()[1]
            with contextlib.suppress(OSError):
                udp.bind(("127.0.0.1", port))
                return port


@contextlib.contextmanager
def running(argv: Sequence[str], log: Path, **environment: str) -> Iterator[int]:
    """Run a program while inside and yield its pid; it is ended by pid."""
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=os.environ | environment)
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(what: str, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Wait for a program to be up; CannotMeasure when it is not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if condition():
                return
        time.sleep(0.05)
    raise CannotMeasure(f"{what}: not within {seconds:.0f} s")


def accepts(port: int, address: str = "127.0.0.1") -> bool:
    """Whether somebody listens there (TCP)."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((address, port)) == 0
