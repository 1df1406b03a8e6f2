"""Every console script and `python -m` twin starts, names itself and lists its options."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.console import command

SCRIPTS = {"ztna": "ztna", "ztna-sidecar": "sidecar", "ztna-dnsd": "dnsd", "ztna-relay": "relay"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_console_script_tells_its_version_and_help(script: str) -> None:
    done = subprocess.run([command(script), "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.1.0" in done.stdout
    done = subprocess.run([command(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {script} ")


@pytest.mark.parametrize("package", [package for package in SCRIPTS.values() if package != "ztna"])
def test_a_daemon_starts_as_a_module_too(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
