"""How long dnsd takes to answer when 50,000 questions a second are offered for half a minute.

The asker is a C program of ours that paces them and reads the kernel's time of each answer, so that neither its own
waking up nor heaps of questions that it sends late are in the figures (dnsperf has both). A C echo, the floor, is
measured in turn: what it takes too is the machine's, that gives the processor to somebody else; `no CPU %` says
how much of the time a server was ready and had none.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Figures,
    Measure,
    Row,
    cpu_seconds,
    free_port,
    need,
    run_delay_seconds,
    running,
)
from tests.bench.rows_dns_size import dnsd_from_file

NAMES = 1000
OFFERED = 50_000
SECONDS = 30
_HERE = Path(__file__).resolve().parent


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    folder = directory / "dns-tail"
    folder.mkdir()

    @contextlib.contextmanager
    def ours() -> Iterator[Measure]:
        asker = _compiled(folder, "paced_client")
        with dnsd_from_file(folder, NAMES) as (pid, port, queries):
            yield lambda: offered(asker, pid, port, queries)

    @contextlib.contextmanager
    def floor() -> Iterator[Measure]:
        asker, echo, port = _compiled(folder, "paced_client"), _compiled(folder, "echo_floor"), free_port()
        with running([str(echo), str(port)], folder / "echo.log") as pid:
            yield lambda: offered(asker, pid, port, folder / f"queries-{NAMES}")

    return Row(
        f"dnsd: time to answer at {OFFERED:,} q/s offered for {SECONDS} s",
        "p99 < 1 ms, none lost",
        [Contender("ztna-dnsd", ours), Contender("C echo (floor)", floor)],
    )


def offered(asker: Path, pid: int, port: int, queries: Path) -> Figures:
    """Offer the load once. An asker that had no processor itself asked less often: `asked/s` says so."""
    argv = [str(asker), str(port), str(OFFERED), str(SECONDS), str(queries)]
    before, waited = cpu_seconds([pid]), run_delay_seconds([pid])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS + 60)
    spent, waited = cpu_seconds([pid]) - before, run_delay_seconds([pid]) - waited
    words = done.stdout.split()
    if done.returncode or len(words) % 2:
        raise CannotMeasure(f"paced_client: {done.stdout[-400:]}{done.stderr[-400:]}")
    told = {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}
    return {
        "p50 ms": told["p50"] / 1e6,
        "p99 ms": told["p99"] / 1e6,
        "p99.9 ms": told["p999"] / 1e6,
        "max ms": told["max"] / 1e6,
        "lost %": 100 * (told["sent"] - told["answered"]) / told["sent"],
        "asked/s": told["sent"] / SECONDS,
        "CPU of one core": spent / SECONDS,
        "no CPU %": 100 * waited / SECONDS,
    }


def _compiled(folder: Path, name: str) -> Path:
    program = folder / name
    argv = [need("gcc", "gcc"), "-O2", "-o", str(program), str(_HERE / f"{name}.c")]
    subprocess.run(argv, check=True, timeout=60)
    return program
