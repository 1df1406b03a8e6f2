"""Daemons whose wall clock a test sets. Not by libfaketime: under it Python's threads wait seconds for each other."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("wall_clock.c")


class Clocks:
    """A wall clock for each daemon of these names; all begin so far ahead of this machine's."""

    def __init__(self, directory: Path, names: tuple[str, ...], ahead_seconds: int) -> None:
        """Compile what daemons are started with; where there is no compiler the test is skipped, and fails under CI."""
        compiler = shutil.which("cc")
        if compiler is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)("not installed: gcc, libc6-dev")
        self._library = directory / "wall_clock.so"
        argv = (
            compiler,
            "-shared",
            "-fPIC",
            "-O2",
            "-Wall",
            "-Werror",
            "-o",
            str(self._library),
            str(SOURCE),
        )
        subprocess.run(argv, check=True, timeout=60)
        self._files = {name: directory / f"{name}.clock" for name in names}
        for name in names:
            self.set(name, ahead_seconds)

    def environment(self, name: str) -> Mapping[str, str]:
        """Return what a daemon is to have in its environment."""
        return {"LD_PRELOAD": str(self._library), "ZTNA_TEST_CLOCK": str(self._files[name])}

    def set(self, name: str, ahead_seconds: int) -> None:
        """Set a daemon's clock so far ahead of this machine's, from its next look at it on."""
        # In place: the daemon has the file open.
        descriptor = os.open(self._files[name], os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("=q", ahead_seconds), 0)
        finally:
            os.close(descriptor)
