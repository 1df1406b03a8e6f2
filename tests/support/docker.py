"""A Docker engine for tests: the running one, else one of our own, and a base image made without a registry."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.consul import peers_folder

ENGINE_SECONDS = 40
BUILD_SECONDS = 600
BASE_IMAGE = "ztna-mesh-test-base:bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates,bind9-dnsutils"
_ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str | None:
    """Say why no engine can be had here; None when one can."""
    if _answers(None):
        return None
    if os.geteuid() != 0:
        return "no Docker engine answers, and starting one needs root"
    missing = [tool for tool in ("dockerd", "docker", "debootstrap") if shutil.which(tool) is None]
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
    """Return a Debian with Python and dig, made by debootstrap once and kept beside the other real parts."""
    archive = peers_folder() / "base-bookworm.tar"
    if not archive.exists():
        rootfs = Path(tempfile.mkdtemp(prefix="ztna-rootfs-"))
        try:
            argv = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(rootfs)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_SECONDS)
            assert done.returncode == 0, f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            partial = archive.with_suffix(".partial")
            subprocess.run(
                ["tar", "-C", str(rootfs), "-cf", str(partial), "."], check=True, timeout=BUILD_SECONDS
            )
            partial.rename(archive)
        finally:
            shutil.rmtree(rootfs, ignore_errors=True)
    docker(host, "import", str(archive), BASE_IMAGE)
    return BASE_IMAGE


def build_folder(directory: Path) -> Path:
    """Make the folder that an image of ours is built in: the Dockerfile and all wheels."""
    wheels = directory / "wheels"
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels), str(_ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, f"pip wheel: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    shutil.copy(_ROOT / "tests/e2e/image/Dockerfile", directory / "Dockerfile")
    return directory
