"""How long dnsd takes to answer when 50,000 questions a second are offered for half a minute."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

from tests.bench.harness import CannotMeasure, Contender, Figures, Measure, Row, cpu_seconds, need
from tests.bench.rows_dns_size import dnsd_from_file

NAMES = 1000
OFFERED = 50_000
SECONDS = 30


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    folder = directory / "dns-tail"
    folder.mkdir()

    @contextlib.contextmanager
    def ours() -> Iterator[Measure]:
        with dnsd_from_file(folder, NAMES) as (pid, port, queries):
            yield lambda: offered(pid, port, queries, folder / "latencies")

    return Row(
        f"dnsd: time to answer at {OFFERED:,} q/s offered for {SECONDS} s",
        "p99 < 1 ms, none lost",
        [Contender("ztna-dnsd", ours)],
    )


def offered(pid: int, port: int, queries: Path, told: Path) -> Figures:
    """Offer the load once; dnsperf tells every answer's time, which is its own waking up, too."""
    argv = [need("dnsperf", "dnsperf"), "-s", "127.0.0.1", "-p", str(port), "-d", str(queries)]
    argv += ["-l", str(SECONDS), "-Q", str(OFFERED), "-c", "4", "-T", "1", "-q", "5000", "-v"]
    before = cpu_seconds([pid])
    with told.open("wb") as output:
        done = subprocess.run(argv, stdout=output, stderr=subprocess.PIPE, timeout=SECONDS + 120)
    busy = (cpu_seconds([pid]) - before) / SECONDS
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
    }
