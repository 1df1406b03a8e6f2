"""tests.support.docker and distribution where they share with other test processes, without an engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import distribution, docker
from tests.support.lab import until

DOCKERD = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = --pidfile ] && echo $$ > "$2"; shift; done
echo $$ > "$PLACE/started"
exec sleep 600
"""
DOCKER = """#!/bin/sh
[ "$1" = --host ] && [ -e "$PLACE/started" ] || exit 1
echo "$3" >> "$PLACE/asked"
"""
USER = """
from tests.support import docker
with docker.engine() as host:
    print(host, flush=True)
    input()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs in the place of Docker's, and an engine's folder of its own."""
    for name, text in {"dockerd": DOCKERD, "docker": DOCKER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv(docker._PLACE, str(tmp_path / "ours"))
    yield tmp_path
    if (tmp_path / "started").exists() and runs(tmp_path):
        os.kill(started(tmp_path), signal.SIGKILL)


def started(place: Path) -> int:
    return int((place / "started").read_text())


def runs(place: Path) -> bool:
    """Whether the engine does; one that nobody has waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{started(place)}/status").read_text()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def using() -> Iterator[subprocess.Popen[str]]:
    """A test process that has an engine."""
    with subprocess.Popen(
        [sys.executable, "-c", USER],
        cwd=docker.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and "docker.sock" in process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_an_engine_ends_with_its_last_user_also_when_that_one_is_killed(place: Path) -> None:
    with using() as first, using() as second:
        first.kill()
        first.wait()
        (guard,) = guards(place)
        before = waits(guard)
        until("the guard has looked", lambda: waits(guard) > before + 1)
        assert runs(place), "the second one uses it"
        second.kill()
    until("the engine has ended", lambda: not runs(place))
    until("what was left behind is looked for", lambda: "images" in (place / "asked").read_text())
    until("its guard has ended", lambda: guards(place) == [])


def test_an_engine_ends_before_a_user_that_ends_in_order_and_its_guard_too(place: Path) -> None:
    with using() as only:
        assert len(guards(place)) == 1
        only.communicate("\n")
        assert only.returncode == 0 and not runs(place)
    until("its guard has ended", lambda: guards(place) == [])


def guards(place: Path) -> list[str]:
    """Return the pids of those who look after this engine."""
    return [
        file.parent.name
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if _words(file)[1:] == ["-m", "tests.support.docker", str(started(place))]
    ]


def waits(pid: str) -> int:
    """Return how often a process has gone to wait for something (proc(5))."""
    _, _, rest = Path(f"/proc/{pid}/status").read_text().partition("\nvoluntary_ctxt_switches:")
    return int(rest.split()[0])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().rstrip("\0").split("\0")
    except OSError:
        return []


def test_an_engine_that_does_not_answer_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "ours").mkdir()
    monkeypatch.setattr(docker, "_OURS", place / "ours")
    asked = []

    def answers(host: str | None) -> bool:
        """Never; and whoever waits is interrupted once the engine runs."""
        asked.append(host)
        until("started", lambda: (place / "started").exists() and (place / "started").read_text().strip())
        raise KeyboardInterrupt

    monkeypatch.setattr(docker, "_answers", answers)
    with pytest.raises(KeyboardInterrupt):
        docker._start()
    assert asked and not runs(place)


def test_wheels_that_another_process_got_meanwhile_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found none, and one was quicker."""
    folder, lock = tmp_path / "peers", tmp_path / "lock.txt"
    lock.write_text("click==8.0")
    monkeypatch.setenv("ZTNA_PEERS_DIR", str(folder))

    def pip(verb: str, *words: str | Path) -> None:
        ours = Path(words[words.index("--dest") + 1])
        ours.mkdir()
        (ours / "click.whl").touch()
        theirs = folder / f"wheels-{distribution._key(lock)}"
        theirs.mkdir()
        (theirs / "click.whl").touch()

    monkeypatch.setattr(distribution, "pip", pip)
    kept = distribution._kept("wheels", lock)
    assert [path.name for path in folder.iterdir()] == [kept.name]
    assert [path.name for path in kept.iterdir()] == ["click.whl"]
