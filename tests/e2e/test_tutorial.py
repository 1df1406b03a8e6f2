"""docs/tutorial.md as a stranger follows it: every command in its order, each with the output that the page shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.console import require_tools
from tests.support.pages import ROOT, fences

pytestmark = [pytest.mark.slow, pytest.mark.namespaces]

PAGE = ROOT / "docs/tutorial.md"
INSTALLED_BEFORE = "apt-get install --yes "
IN_THE_FIRST_TERMINAL = "make demo "
BREAKS, AT_THE_END = "kill $(cat hello/pid)", "rm -r "
PATIENCE_SECONDS = 40.0
"""What a line needs to say what the page shows: checks and certificates take seconds, more of them under load."""


@dataclass
class Step:
    """One block of commands, and what the page shows after it."""

    commands: list[str]
    shown: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """Return the page's blocks in order."""
    found: list[Step] = []
    for language, lines in fences(PAGE.read_text()):
        if language == "sh":
            found.append(Step(lines))
        else:
            assert language == "text" and not found[-1].shown
            found[-1].shown = lines
    return found


def blurred(text: str) -> str:
    """Return what does not differ from one run to the next: no times, epochs, session ids or table widths."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"(?<![\w.])\d+(\.\d+)?(?= ms| s\b)|epoch[ =]\d+", "#", text))


def says(output: str, shown: list[str]) -> bool:
    """Say whether an output has the lines that the page shows, in their order."""
    rest = blurred(output)
    for line in shown:
        _, found, rest = rest.partition(blurred(line).strip())
        if not found:
            return False
    return True


@dataclass
class Stranger:
    """Somebody with two terminals on a machine of their own, in a clone of the repository."""

    host: namespaces.Host
    clone: Path
    environment: dict[str, str]

    def argv(self, line: str) -> list[str]:
        """Return what runs a line in the second terminal, which has the environment activated."""
        return [*self.host.prefix, "sh", "-c", line]

    def until_pictured(self, service: str, state: str) -> None:
        """Look at the picture that the page names until a service is in a state there."""
        (url,) = set(re.findall(r"<(http://127\.0\.0\.1:\d+/)>", PAGE.read_text()))
        self.type(
            f"curl -sS --fail {url} | grep -o '<svg.*'", [f'<g class="box {state}"><title>{service}: {state}']
        )

    def start(self, line: str, log: Path) -> subprocess.Popen[bytes]:
        """Type a line in the first terminal."""
        argv = self.argv(f"exec {line}")
        with log.open("wb") as file:
            return subprocess.Popen(
                argv, cwd=self.clone, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )

    def type(self, line: str, shown: list[str]) -> None:
        """Type a line, again while it does not say what it shall; all of the page's lines can be."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            output = self.clone / "output"
            with output.open("wb") as file:  # no pipe: what a line leaves running would hold it open
                done = subprocess.run(
                    self.argv(line),
                    cwd=self.clone,
                    env=self.environment,
                    stdout=file,
                    stderr=file,
                    timeout=60,
                )
            text = output.read_text()
            if says(text, shown) if shown else done.returncode == 0:
                return
            assert time.monotonic() < deadline, f"{line}: {done.returncode}: {text}\nexpected {shown}"
            time.sleep(0.2)


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Stranger]:
    require_tools("dig", "curl", "make")
    with namespaces.network() as network:
        clone = tmp_path / "clone"
        clone.mkdir()
        for entry in ROOT.iterdir():
            if entry.name not in (".git", ".venv", "hello", "mesh"):
                (clone / entry.name).symlink_to(entry)
        # The environment that runs this test is the one that `make` finds made.
        binaries = Path(sys.executable).parent
        (clone / ".venv").mkdir()
        (clone / ".venv/bin").symlink_to(binaries)
        (clone / ".venv/.installed").touch()
        environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "COLUMNS": "120"}
        yield Stranger(network.host("stranger"), clone, environment)


def test_a_stranger_gets_from_nothing_to_a_name_a_denied_service_and_a_broken_one(stranger: Stranger) -> None:
    first, *rest = steps()
    assert first.commands[0].startswith(INSTALLED_BEFORE)
    log = stranger.clone / "first-terminal"
    mesh: subprocess.Popen[bytes] | None = None
    pictured = False
    try:
        for step in rest:
            *before, last = step.commands
            for line in before:
                stranger.type(line, [])
            if last.startswith(IN_THE_FIRST_TERMINAL):
                mesh = stranger.start(last, log)
                _wait(log, mesh, step.shown)
                stranger.until_pictured("web-app", "passing")
                stranger.until_pictured("db", "critical")
            else:
                if last.startswith(AT_THE_END):
                    _ctrl_c(mesh, log)
                stranger.type(last, step.shown)
            if before[:1] == [BREAKS] and mesh is not None and mesh.poll() is None:
                stranger.until_pictured("hello", "critical")
                pictured = True
    finally:
        if mesh is not None and mesh.poll() is None:
            os.killpg(mesh.pid, signal.SIGKILL)
    assert pictured and not (stranger.clone / "mesh").exists()


def _wait(log: Path, mesh: subprocess.Popen[bytes], shown: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not says(log.read_text(), shown):
        assert mesh.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _ctrl_c(mesh: subprocess.Popen[bytes] | None, log: Path) -> None:
    assert mesh is not None
    os.killpg(mesh.pid, signal.SIGINT)  # as a terminal does: to everything in its foreground
    mesh.wait(30)
    assert "stopped everything" in log.read_text()


def test_what_has_to_be_there_first_is_what_the_makefile_installs_for_the_tests() -> None:
    (line,) = steps()[0].commands
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    known = " ".join(re.findall(r"^(?:BASE|TEST)_PACKAGES := (.*)$", makefile, re.MULTILINE)).split()
    assert set(line.removeprefix(INSTALLED_BEFORE).split()) <= set(known)


def test_an_output_that_is_another_is_noticed() -> None:
    assert says("ok  a (1 ms)\nFAILED b (2.5 ms)\n", ["ok     a (9 ms)", "FAILED b (1 ms)"])
    assert not says("FAILED b (2 ms)\nok a (1 ms)\n", ["ok a (9 ms)", "FAILED b (1 ms)"])
    assert not says("127.100.0.7\n", ["127.100.0.8"])
