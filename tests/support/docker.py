"""A Docker engine for tests: the running one, else one of our own, and a base image that no registry is asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.consul import peers_folder
from tests.support.distribution import LOCK, copy_sources, locked_wheels, pip

ENGINE_SECONDS = 40
BUILD_SECONDS = 600
BASE_IMAGE = "ztna-mesh-test-base:bookworm"
_ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str | None:
    """Say why no engine with an image can be had here; None when one can."""
    if not _base_archive().exists():
        return "the containers' base image is not here: `make peers` makes it"
    if _answers(None):
        return None
    if os.geteuid() != 0:
        return "no Docker engine answers, and starting one needs root"
    missing = [tool for tool in ("dockerd", "docker") if shutil.which(tool) is None]
    return f"no Docker engine answers, and not installed: {', '.join(missing)}" if missing else None


def _answers(host: str | None) -> bool:
    if shutil.which("docker") is None:
        return False
    argv = ["docker", *(["--host", host] if host else []), "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(argv, capture_output=True, timeout=ENGINE_SECONDS).returncode == 0


@contextlib.contextmanager
def engine() -> Iterator[str | None]:
    """Yield the address of an engine (None: the default one answers); ours is ended and removed."""
    if _answers(None):
        yield None
        return
    directory = Path(tempfile.mkdtemp(prefix="ztna-docker-"))
    host = f"unix://{directory}/docker.sock"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("dockerd", "--host", host, "--data-root", str(directory / "data")),
                *("--exec-root", str(directory / "exec"), "--pidfile", str(directory / "pid")),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + ENGINE_SECONDS
        while not _answers(host):
            assert process.poll() is None, f"dockerd ended:\n{(directory / 'log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, (
                f"dockerd does not answer:\n{(directory / 'log').read_text()[-2000:]}"
            )
            time.sleep(0.2)
        yield host
    finally:
        process.terminate()
        process.wait(ENGINE_SECONDS)
        shutil.rmtree(directory, ignore_errors=True)


def docker(host: str | None, *argv: str) -> str:
    """Run the docker client to its end and return what it printed."""
    done = subprocess.run(
        ["docker", *(["--host", host] if host else []), *argv],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
    )
    assert done.returncode == 0, f"docker {' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout


def base_image(host: str | None) -> str:
    """Return a Debian with Python and dig, from the archive that `make peers` made; no registry is asked."""
    docker(host, "import", str(_base_archive()), BASE_IMAGE)
    return BASE_IMAGE


def _base_archive() -> Path:
    return peers_folder() / "base-bookworm.tar.gz"


def build_folder(directory: Path) -> Path:
    """Make the folder that an image of ours is built in: the Dockerfile, the lock, and all wheels."""
    wheels = shutil.copytree(locked_wheels(), directory / "wheels")
    shutil.copy(LOCK, directory)
    source = copy_sources(directory / "source")
    pip("wheel", "--wheel-dir", wheels, "--no-deps", "--no-build-isolation", source)
    shutil.rmtree(source)
    shutil.copy(_ROOT / "tests/e2e/image/Dockerfile", directory / "Dockerfile")
    return directory
