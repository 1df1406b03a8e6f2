"""The console scripts of this environment, as a user calls them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from ztna.cli.processes import console_script

COMMAND_SECONDS = 120


def require_tools(*names: str) -> None:
    """Go on when these programs are on PATH; without one the test is skipped, and fails under CI."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make test-tools` as root installs them"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def command(name: str) -> str:
    """Return the path of a console script."""
    return console_script(name)


def run(
    name: str, *arguments: str, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a console script to its end; `prefix` is a command that runs it."""
    return subprocess.run(
        [*prefix, command(name), *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=environment or None,
    )
