"""Read the lock in `requirements/`: which version of what, and the hashes of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Environment, Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "requirements"
BUILD, RUN, TEST = (FOLDER / name for name in ("build.txt", "run.txt", "test.txt"))

# The Pythons that one lock serves.
PYTHONS = ("3.11", "3.12", "3.13")

_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)")


@dataclass(frozen=True)
class Locked:
    """One package of a lock: its normal name, its only version, where it applies, and SHA-256 of its files."""

    name: str
    version: str
    marker: Marker | None
    hashes: tuple[str, ...]

    @property
    def on_linux(self) -> bool:
        """Whether any Python that the lock serves installs it on Linux; the mesh runs nowhere else."""
        return self.marker is None or any(self.marker.evaluate(linux(python)) for python in PYTHONS)

    @property
    def pin(self) -> str:
        """The package as a line of a lock for every Python, so without its marker."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{each}" for each in self.hashes)])


def linux(python: str, extra: str = "") -> dict[str, str]:
    """Return what markers are asked about on Linux with that Python, for one extra of a package."""
    here: Environment = default_environment()
    there = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    version = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": python,
    }
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    return {
        **{name: str(value) for name, value in here.items()},
        **there,
        **version,
        **cpython,
        "extra": extra,
    }


def read(path: Path) -> dict[str, Locked]:
    """Return the packages of a lock by normal name.

    Raises ValueError for a line that pins no exact version, or a package named twice.
    """
    found: dict[str, Locked] = {}
    for line in _logical_lines(path.read_text()):
        requirement = Requirement(line.split("--hash=", 1)[0].strip())
        pins = list(requirement.specifier)
        if len(pins) != 1 or pins[0].operator != "==" or "*" in pins[0].version:
            raise ValueError(f"{path.name} pins no exact version of {requirement.name}")
        name = canonicalize_name(requirement.name)
        if name in found:
            raise ValueError(f"{path.name} names {name} twice")
        found[name] = Locked(name, pins[0].version, requirement.marker, tuple(_HASH.findall(line)))
    return found


def _logical_lines(text: str) -> list[str]:
    """Return the lines without comments, those ended by a backslash joined with what follows."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [line for line in "\n".join(kept).replace("\\\n", " ").splitlines() if line.strip()]
