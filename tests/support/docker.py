"""A Docker engine for tests: the running one, else one of our own, and a base image that no registry is asked for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.fetch import IMAGE_NUMBER
from tests.support.consul import peers_folder
from tests.support.distribution import copy_sources, locked_wheels, pip
from ztna.container import context

ENGINE_SECONDS = 40
GUARD_SECONDS = 1.0
"""How long an engine goes on, at most, after its last user was killed."""
BUILD_SECONDS = 600
BASE_IMAGE = f"ztna-mesh-test-base:{IMAGE_NUMBER}"
ROOT = Path(__file__).resolve().parents[2]
_PLACE = "ZTNA_TESTS_DOCKER_DIR"
_OURS = Path(os.environ.get(_PLACE, f"{tempfile.gettempdir()}/ztna-mesh-tests-docker-{os.geteuid()}"))
_HOST = f"unix://{_OURS}/docker.sock"


def why_not() -> str | None:
    """Say why no engine with an image can be had here; None when one can."""
    if not base_archive().exists():
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
def required_engine() -> Iterator[str | None]:
    """Yield the address of an engine, for testcontainers too; without one skip the test, or in CI fail it."""
    if (reason := why_not()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with engine() as host, pytest.MonkeyPatch.context() as environment:
        if host:
            environment.setenv("DOCKER_HOST", host)
        environment.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")  # its image would have to be pulled
        yield host


@contextlib.contextmanager
def engine() -> Iterator[str | None]:
    """Yield the address of an engine (None: the default one answers).

    Ours is one for all test processes, as two would undo each other's packet filter: the first starts it, the last
    one out ends it, or the guard when that one was killed. What images are built upon is kept beside the other real
    parts.
    """
    if _answers(None):
        yield None
        return
    _OURS.mkdir(mode=0o700, exist_ok=True)
    with (_OURS / "users").open("w") as users:
        with _alone():
            fcntl.flock(users, fcntl.LOCK_SH)
            if not _answers(_HOST):
                _start()
        try:
            yield _HOST
        finally:
            with _alone():
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass  # others use it
                else:
                    _end(int((_OURS / "pid").read_text()))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Be the one who starts or ends the engine."""
    with (_OURS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start() -> None:
    with (_OURS / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("dockerd", "--host", _HOST, "--data-root", str(peers_folder() / "docker")),
                *("--exec-root", str(_OURS / "exec"), "--pidfile", str(_OURS / "pid")),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(process.pid)],
            cwd=ROOT,
            env=os.environ | {_PLACE: str(_OURS)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + ENGINE_SECONDS
    try:
        while not _answers(_HOST):
            said = (_OURS / "log").read_text()[-2000:]
            assert process.poll() is None, f"dockerd ended:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.2)
    except BaseException:
        process.terminate()
        process.wait(ENGINE_SECONDS)
        raise


def _guard(pid: int) -> None:
    """End the engine once none of its users is left; return when it has ended, whoever ended it.

    A user that is killed gives up its lock and nothing else, so that somebody has to look.
    """
    with contextlib.suppress(ProcessLookupError), (_OURS / "users").open("w") as users:
        handle = os.pidfd_open(pid)
        while not select.select([handle], [], [], GUARD_SECONDS)[0]:
            with _alone(), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _end(pid)
                return


def _end(pid: int) -> None:
    """End it, and keep only what the next image is built upon: base, and the packages of the lock."""
    handle = os.pidfd_open(pid)  # it may be the child of another test process
    try:
        _clean()
    finally:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], ENGINE_SECONDS)
        os.close(handle)
    assert ended, f"dockerd {pid} goes on after SIGTERM"
    shutil.rmtree(_OURS / "exec", ignore_errors=True)


def _clean() -> None:
    """Remove what a test run that was killed may have left behind, and the images of these sources."""
    if left := docker(_HOST, "ps", "--all", "--quiet").split():
        docker(_HOST, "rm", "--force", "--volumes", *left)
    for kind in ("network", "volume"):
        docker(_HOST, kind, "prune", "--force")
    for name in docker(_HOST, "images", "--format", "{{.Repository}}:{{.Tag}}").split():
        if name.startswith("ztna-mesh") and name != BASE_IMAGE:
            docker(_HOST, "rmi", "--force", name)


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
    if not docker(host, "images", "--quiet", BASE_IMAGE):
        docker(host, "import", str(base_archive()), BASE_IMAGE)
    return BASE_IMAGE


def base_archive() -> Path:
    """Return where `make peers` puts it."""
    return peers_folder() / f"base-bookworm-{IMAGE_NUMBER}.tar.gz"


def our_image(host: str | None, folder: Path) -> str:
    """Build the product's image of these sources, without any network, and return its name."""
    wheel = our_wheel(folder / "wheel")
    digest = context.write(folder / "image", wheel=wheel, wheels=locked_wheels())
    name = f"ztna-mesh-test:{digest[:12]}"
    arguments = {"BASE": base_image(host), "PIP_NO_INDEX": "1"}
    told = [part for each in arguments.items() for part in ("--build-arg", "=".join(each))]
    docker(host, "build", "--quiet", "--network", "none", "--tag", name, *told, str(folder / "image"))
    return name


def our_wheel(folder: Path) -> Path:
    """Build the wheel of these sources in a new folder."""
    folder.mkdir()
    source = copy_sources(folder / "source")
    pip("wheel", "--wheel-dir", folder, "--no-deps", "--no-build-isolation", source)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    return wheel


if __name__ == "__main__":
    _guard(int(sys.argv[1]))
