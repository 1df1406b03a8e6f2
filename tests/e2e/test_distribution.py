"""Wheel and sdist as `make dist` makes them: they install with pip and pipx, and the programs run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.console import require_tools
from tests.support.distribution import build, locked_wheels, run

pytestmark = pytest.mark.slow

PROGRAMS = ("ztna", "ztna-dnsd", "ztna-relay", "ztna-sidecar")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist") / "source")


def environment(**more: str | Path) -> dict[str, str]:
    """Return ours, with the wheels of what we depend on at hand, and nothing that leads to the sources."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ZTNA_", "PYTHON"))}
    given = {name: str(value) for name, value in more.items()}
    return kept | {"PIP_FIND_LINKS": str(locked_wheels()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | given


def check_programs(folder: Path, place: Path) -> None:
    """Run each program, and have one write and read what comes as package data."""
    for program in PROGRAMS:
        done = subprocess.run(
            [folder / program, "--version"], capture_output=True, text=True, timeout=60, cwd=place
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{program}, version 0.1.0")
    run(folder / "ztna", "init", "host", "--dir", place / "etc")
    for name in ("dnsd", "relay", "connector", "agent"):
        run(folder / "ztna", "check-config", "--no-files", place / f"etc/{name}.yaml")


def test_the_sdist_installs_with_pip(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, sdist = built
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", sdist, environment=environment())
    check_programs(tmp_path / "venv/bin", tmp_path)


def test_the_wheel_installs_with_pipx(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, _ = built
    places = {
        "PIPX_HOME": tmp_path / "pipx",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "PIPX_MAN_DIR": tmp_path / "man",
    }
    require_tools("pipx")
    run("pipx", "install", "--python", sys.executable, wheel, environment=environment(**places))
    assert sorted(each.name for each in (tmp_path / "bin").iterdir()) == sorted(PROGRAMS)
    check_programs(tmp_path / "bin", tmp_path)
