"""What is made of the sources for others: wheels, an sdist, a Debian package.

Built in copies of the sources, as setuptools leaves things beside what it builds.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.consul import peers_folder

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements/run.txt"
TEST_LOCK = ROOT / "requirements/test.txt"
BUILD_SECONDS = 600


def copy_sources(directory: Path) -> Path:
    """Copy to this new directory what a distribution is built from."""
    directory.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    for package in ("ztna", "sidecar", "dnsd", "relay"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def build(directory: Path) -> tuple[Path, Path]:
    """Build in this new directory as `make dist` does; return the wheel, which is made of the sdist, and the sdist."""
    source = copy_sources(directory)
    uv = Path(sys.executable).parent / "uv"
    run(uv, "build", "--quiet", "--python", sys.executable, "--no-build-isolation", source)
    (wheel,), (sdist,) = (list((source / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def locked_wheels() -> Path:
    """Return a folder with the wheels that the lock names, kept beside the other real parts."""
    return _kept("wheels", LOCK, "--require-hashes", "-r", LOCK)


def wheels_for_testing() -> Path:
    """Return a folder with what the extra `testing` takes beside the lock, as the tests' lock has it."""
    return _kept("wheels-testing", TEST_LOCK, "--constraint", TEST_LOCK, "testcontainers")


def _kept(name: str, lock: Path, *wanted: str | Path) -> Path:
    place = peers_folder() / f"{name}-{_key(lock)}"
    if not place.exists():
        peers_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=peers_folder()) as scratch:
            partial = Path(scratch) / "wheels"
            pip("download", "--dest", partial, "--only-binary", ":all:", *wanted)
            try:
                partial.rename(place)
            except OSError:
                if not place.exists():  # else another test process was quicker, with the same
                    raise
    return place


def _key(lock: Path) -> str:
    return hashlib.sha256(sys.version.encode() + lock.read_bytes()).hexdigest()[:12]


def pip(verb: str, *words: str | Path) -> None:
    """Run this environment's pip."""
    run(sys.executable, "-m", "pip", verb, "--quiet", *words)


def run(*argv: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a builder or installer and return what it printed; AssertionError when it failed."""
    told = list(map(str, argv))
    done = subprocess.run(told, capture_output=True, text=True, timeout=BUILD_SECONDS, env=environment)
    assert done.returncode == 0, f"{' '.join(told)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
