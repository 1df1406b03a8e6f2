"""The first process of a container: statuses, signals, and what is left to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.lab import until
from ztna.container import init

TOLD = """
import signal, sys
number = int(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, [number])
print("ready", flush=True)
print(signal.Signals(signal.sigwait([number])).name)
sys.exit(3)
"""


def started(*words: str) -> subprocess.Popen[str]:
    """Start it as the image does, as a process that orphans are left to (PR_SET_CHILD_SUBREAPER, prctl(2))."""
    script = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])"
    argv = [sys.executable, "-c", script, sys.executable, "-I", "-S", init.__file__, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def ended(words: Sequence[str]) -> tuple[int, str, str]:
    with started(*words) as process:
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["sh", "-c", "exit 0"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
    ],
)
def test_the_status_is_the_commands(words: list[str], status: int) -> None:
    assert ended(words) == (status, "", "")


def test_what_cannot_be_started_is_named() -> None:
    assert ended(["no-such-program"]) == (127, "", "init: no-such-program: No such file or directory\n")
    assert ended(["/"]) == (126, "", "init: /: Permission denied\n")
    status, out, err = ended([])
    assert (status, out) == (2, "") and err.startswith("init: expected a command")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_passed_on(number: signal.Signals) -> None:
    with started(sys.executable, "-c", TOLD, str(int(number))) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out) == (3, f"{number.name}\n")


def test_the_command_has_no_signal_blocked_or_ignored() -> None:
    _, out, _ = ended(["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])
    blocked, ignored = (int(line.split()[1], 16) for line in out.splitlines())
    pythons = sum(1 << (number - 1) for number in (signal.SIGPIPE, signal.SIGXFSZ))
    assert (blocked, ignored & pythons) == (0, 0)


def test_orphans_are_waited_for() -> None:
    """The shell leaves a child behind, which is killed: nobody of that id is there, zombie or not."""
    with started("sh", "-c", "(sh -c 'echo $$; exec sleep 60' &); exec sleep 60") as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        os.kill(orphan, signal.SIGKILL)
        until("nothing of the orphan", lambda: not os.path.exists(f"/proc/{orphan}"), 20)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.returncode == 128 + signal.SIGTERM
