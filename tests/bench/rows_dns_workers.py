"""dnsd's CPU time per query, memory and answers a second by the number of its workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench.harness import Contender, Figures, Measure, Row, memory_bytes, with_children
from tests.bench.rows_dns import queried
from tests.bench.rows_dns_size import dnsd_from_file

NAMES = 1000
WORKERS = (1, 2, 4)
CLIENTS = 32
"""The kernel chooses a worker by the port of who asks, so there must be some."""
OUTSTANDING = 2000
"""Enough for whole batches at each of them: what a batch costs is the same for few and many."""


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    return Row(
        f"dnsd: CPU per query by workers, {NAMES:,} names, all processes together",
        "reported; 2 workers cost what 1 does when batches are full (CPU us per query)",
        [Contender(f"{count} workers", partial(_dnsd_with, directory, count)) for count in WORKERS],
    )


@contextlib.contextmanager
def _dnsd_with(directory: Path, workers: int) -> Iterator[Measure]:
    folder = directory / f"dns-workers-{workers}"
    folder.mkdir()
    with dnsd_from_file(folder, NAMES, workers=workers) as (pid, port, queries):
        ask = queried(pid, port, queries, CLIENTS, OUTSTANDING)

        def measure() -> Figures:
            return {**ask(), "MB": sum(map(memory_bytes, with_children(pid))) / 1e6}

        yield measure
