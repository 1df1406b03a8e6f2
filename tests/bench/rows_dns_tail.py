"""How long dnsd takes to answer when 50,000 questions a second are offered for half a minute.

A C echo, the floor, is measured in turn: what it takes too is the client's, or the machine's that gives a processor to
somebody else. `no CPU %` says how much of the time a server was ready and had none.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

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
ECHO = Path(__file__).with_name("echo_floor.c")


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    folder = directory / "dns-tail"
    folder.mkdir()

    @contextlib.contextmanager
    def ours() -> Iterator[Measure]:
        with dnsd_from_file(folder, NAMES) as (pid, port, queries):
            yield lambda: offered(pid, port, queries, folder / "latencies")

    @contextlib.contextmanager
    def floor() -> Iterator[Measure]:
        gcc, port, binary = need("gcc", "gcc"), free_port(), folder / "echo"
        subprocess.run([gcc, "-O2", "-o", str(binary), str(ECHO)], check=True, timeout=60)
        with running([str(binary), str(port)], folder / "echo.log") as pid:
            yield lambda: offered(pid, port, folder / f"queries-{NAMES}", folder / "latencies")

    return Row(
        f"dnsd: time to answer at {OFFERED:,} q/s offered for {SECONDS} s",
        "p99 < 1 ms, none lost; on a machine where the floor's is",
        [Contender("ztna-dnsd", ours), Contender("C echo (floor)", floor)],
    )


def offered(pid: int, port: int, queries: Path, told: Path) -> Figures:
    """Offer the load once; dnsperf tells every answer's time, which is its own waking up, too."""
    argv = [need("dnsperf", "dnsperf"), "-s", "127.0.0.1", "-p", str(port), "-d", str(queries)]
    argv += ["-l", str(SECONDS), "-Q", str(OFFERED), "-c", "4", "-T", "1", "-q", "5000", "-v"]
    before, waited = cpu_seconds([pid]), run_delay_seconds([pid])
    with told.open("wb") as output:
        done = subprocess.run(argv, stdout=output, stderr=subprocess.PIPE, timeout=SECONDS + 120)
    busy = (cpu_seconds([pid]) - before) / SECONDS
    waited = (run_delay_seconds([pid]) - waited) / SECONDS
    latencies, lost = [], 0
    with told.open() as lines:
        for line in lines:
            if line.startswith("> "):
                code, *_, last = line.split()[1:]
                if code == "T":
                    lost += 1
                else:
                    latencies.append(float(last))
    if not latencies or not re.search(r"Queries lost", told.read_text()[-4000:]):
        raise CannotMeasure(f"dnsperf: {done.stderr[-400:]!r}")
    cuts = quantiles(latencies, n=1000)
    return {
        "p50 ms": cuts[499] * 1e3,
        "p99 ms": cuts[989] * 1e3,
        "p99.9 ms": cuts[998] * 1e3,
        "lost %": 100 * lost / (lost + len(latencies)),
        "answers/s": len(latencies) / SECONDS,
        "CPU of one core": busy,
        "no CPU %": 100 * waited,
    }
