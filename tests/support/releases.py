"""Earlier releases of ours as people run them beside this one, out of the repository's history.

`tests/upgrade/previous` names them. They run in the environment of the tests: what they need of others' packages is
what this one needs, or their daemons do not start and the test says so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.lab import Daemon
from ztna.cli.processes import console_script

ROOT = Path(__file__).parents[2]
PREVIOUS = ROOT / "tests" / "upgrade" / "previous"
PACKAGES = ("ztna", "sidecar", "dnsd", "relay")
NOW: Mapping[str, str] = {}
"""The environment of a daemon of this release."""


def earlier() -> list[str]:
    """Return the commits of the earlier releases, the previous one first."""
    lines = (line.partition("#")[0].split() for line in PREVIOUS.read_text().splitlines())
    return [words[0] for words in lines if words]


def unpacked(commit: str, directory: Path) -> Mapping[str, str]:
    """Unpack a release and return the environment in which our commands are its; skips where the history lacks it."""
    # Whoever checked it out may not be who runs the tests.
    git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))
    known = (*git, "cat-file", "-e", f"{commit}^{{commit}}")
    if subprocess.run(known, capture_output=True).returncode != 0:
        pytest.skip(f"release {commit[:7]} is not in this checkout: git fetch --unshallow")
    archive = (*git, "archive", commit, *PACKAGES)
    tree = subprocess.run(archive, capture_output=True, check=True).stdout
    subprocess.run(("tar", "-x", "-C", str(directory)), input=tree, check=True)
    environment = {"PYTHONPATH": str(directory)}
    asked = (console_script("python"), "-c", "import ztna.names; print(ztna.names.__file__)")
    found = subprocess.run(
        asked, cwd="/", env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(directory), f"this release would run: {found.stdout}"
    return environment


def change(daemon: Daemon, release: Mapping[str, str], seconds: float) -> None:
    """End a daemon, within `seconds` of SIGTERM, and start it as the other release, on its own configuration."""
    assert daemon.stop(seconds) == 0, daemon.tail()
    daemon.environment = release
    daemon.start()
    daemon.wait_ready()
