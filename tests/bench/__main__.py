"""`make bench`: the rows of the targets that exist, ours and the peers in turn in one run.

    python -m tests.bench [ROW ...] [--rounds N] [--json FILE] [--list]

A target that is missed is said and is no failure; a row that cannot be measured is (exit 1).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.harness import Result, Row, run_row

ROWS = {
    "dns": "tests.bench.rows_dns",
    "dns-size": "tests.bench.rows_dns_size",
    "dns-workers": "tests.bench.rows_dns_workers",
    "dns-tail": "tests.bench.rows_dns_tail",
    "leases": "tests.bench.rows_leases",
    "change": "tests.bench.rows_leases:change_row",
    "forwarder-udp": "tests.bench.rows_forwarder_udp",
    "forwarder-kernel": "tests.bench.rows_forwarder_udp:kernel_row",
    "tcp": "tests.bench.rows_tcp",
    "tcp-relay": "tests.bench.rows_tcp_relay",
    "latency": "tests.bench.rows_latency",
    "link-datagrams": "tests.bench.rows_link",
    "tcp-punched": "tests.bench.rows_punched",
    "handshakes": "tests.bench.rows_relay:handshakes_row",
    "memory": "tests.bench.rows_memory",
    "mass-close": "tests.bench.rows_relay:mass_close_row",
}


def table(row: Row, results: list[Result]) -> Table:
    """Return the row as a table: medians, and each as a multiple of ours."""
    figures = list(dict.fromkeys(name for result in results for name in result.figures))
    shown = Table("", *figures, title=f"{row.name}\ntarget: {row.target}", title_justify="left")
    ours = results[0].medians()
    for result in results:
        if result.missing:
            shown.add_row(result.contender, f"left out: {result.missing}")
            continue
        cells = []
        for name in figures:
            value = result.medians().get(name)
            if value is None:
                cells.append("")
                continue
            ratio = (
                f"  (ours is {ours[name] / value:.2f} of it)"
                if value and name in ours and result is not results[0]
                else ""
            )
            cells.append(f"{value:,.4g}{ratio}")
        shown.add_row(result.contender, *cells)
    return shown


def main() -> int:
    """Measure the rows asked for (all by default) and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that is dropped")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ROWS))
        return 0
    console, failed, kept = Console(width=140), [], {}
    with tempfile.TemporaryDirectory(prefix="ztna-bench-") as directory:
        for name in arguments.rows or ROWS:
            module, _, function = ROWS[name].partition(":")
            make: Callable[[Path], Row] = getattr(importlib.import_module(module), function or "row")
            row = make(Path(directory))
            console.print(f"[bold]{row.name}[/]")
            results = run_row(row, arguments.rounds, lambda text: console.print(text, highlight=False))
            console.print(table(row, results))
            kept[name] = {result.contender: result.figures or result.missing for result in results}
            if results[0].missing:
                failed.append(name)
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=2))
    if failed:
        console.print(f"not measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
