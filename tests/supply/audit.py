"""Ask a vulnerability service about every locked package, by pip-audit; never take no answer for a good one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tests.supply import lock

SERVICE = "https://api.osv.dev/v1/query"
ANSWER_SECONDS = 15
RUN_SECONDS = 600.0


class Exit(IntEnum):
    """How an audit ends."""

    CLEAN = 0
    VULNERABLE = 1
    NOT_CHECKED = 3


def audit(locks: Sequence[Path], service: str = SERVICE) -> tuple[Exit, list[str]]:
    """Return how the audit of locks ended, and the lines to print.

    NOT_CHECKED when the service did not answer, or not for every package that Linux installs.
    """
    with tempfile.TemporaryDirectory(prefix="ztna-audit-") as folder:
        report = Path(folder) / "report.json"
        asked = Path(folder) / "asked.txt"
        asked.write_text("".join(f"{each.pin}\n" for each in _on_linux(locks).values()))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", str(asked), "--require-hashes", "--disable-pip"),
                *("--vulnerability-service", "osv", "--osv-url", service, "--timeout", str(ANSWER_SECONDS)),
                *("--format", "json", "--progress-spinner", "off", "--cache-dir", folder, "--output", str(report)),
            ],
            capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
        )  # fmt: skip
        if not report.exists():
            reason = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
            return Exit.NOT_CHECKED, [f"NOT CHECKED, there may be known vulnerabilities: {reason}"]
        return judge(locks, json.loads(report.read_text()))


def judge(locks: Sequence[Path], report: dict[str, list[dict[str, Any]]]) -> tuple[Exit, list[str]]:
    """Say what a report of pip-audit means for locks."""
    answered = {each["name"]: each for each in report["dependencies"] if "skip_reason" not in each}
    lines = [
        f"{name} {each['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for name, each in sorted(answered.items())
        for hole in each["vulns"]
    ]
    if lines:
        return Exit.VULNERABLE, ["known vulnerabilities:", *lines]
    if missing := sorted(_on_linux(locks).keys() - answered.keys()):
        return Exit.NOT_CHECKED, [f"NOT CHECKED: {', '.join(missing)}"]
    return Exit.CLEAN, [f"no known vulnerability in {len(answered)} packages"]


def main() -> int:
    """Audit what builds the mesh and what tests it, which holds all that it runs with; return how that ended.

    An audit that could not be made is told, and fails where `CI` is set: nobody reads a log that passed.
    """
    end, lines = audit((lock.BUILD, lock.TEST), os.environ.get("OSV_URL", SERVICE))
    print("\n".join(lines), file=sys.stderr if end else sys.stdout)
    if end is Exit.NOT_CHECKED and not os.environ.get("CI"):
        return 0
    return int(end)


def _on_linux(locks: Sequence[Path]) -> dict[str, lock.Locked]:
    return {name: each for path in locks for name, each in lock.read(path).items() if each.on_linux}
