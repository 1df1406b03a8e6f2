"""The script of the compose file that makes the certificates: what was begun and not ended is made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distribution import ROOT

SCRIPT = ROOT / "ztna/container/compose/certificates.sh"
NAMES = ("relay", "connector", "agent")
CHOWN = """#!/bin/sh
[ ! -e "$FAILS" ] || { echo "the engine ended it" >&2; exit 1; }
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the volumes, and a `chown` that an ordinary user may call."""
    for name in ("authority", "bin", *(f"to/{name}" for name in NAMES)):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin/chown").write_text(CHOWN)
    (tmp_path / "bin/chown").chmod(0o755)
    return tmp_path


def run(place: Path) -> int:
    """Run the script with its volumes in a folder; return its exit status."""
    script = SCRIPT.read_text()
    for name in ("authority", "to/"):
        script = script.replace(f"/{name}", f"{place}/{name}")
    path = f"{place}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "FAILS": str(place / "fails")}
    return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, timeout=60).returncode


def contents(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place / "to")): path.read_bytes()
        for path in (place / "to").rglob("*")
        if path.is_file()
    }


def test_what_was_begun_is_made_anew_and_what_is_there_is_kept(place: Path) -> None:
    (place / "fails").touch()
    assert run(place) == 1
    begun = contents(place)
    assert set(begun) == {"relay/relay.pem", "relay/relay.key"}
    (place / "fails").unlink()
    assert run(place) == 0
    made = contents(place)
    assert set(made) == {
        f"{name}/{file}" for name in NAMES for file in (f"{name}.pem", f"{name}.key", "ca.pem")
    }
    assert made["relay/relay.key"] != begun["relay/relay.key"]
    assert {(place / f"to/{name}/{name}.key").stat().st_mode & 0o777 for name in NAMES} == {0o600}
    assert run(place) == 0
    assert contents(place) == made
