"""`ztna` itself: the exit status of a command that Ctrl-C ended before it was done."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.console import command
from tests.support.lab import until
from ztna.cli.main import INTERRUPTED, cli

ANSWER_SECONDS = 60.0
IN_THE_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""As a script starts it with `&`."""


@pytest.mark.parametrize("start", [(), IN_THE_BACKGROUND], ids=["foreground", "background"])
@pytest.mark.parametrize("options", [("--once",), ("--once", "--json"), ()])
def test_ctrl_c_before_the_second_look_of_top_is_an_interruption(
    tmp_path: Path, options: tuple[str, ...], start: tuple[str, ...]
) -> None:
    """Without a terminal it looks twice, also when nobody said --once."""
    file = tmp_path / "dnsd.yaml"
    with socket.create_server(("127.0.0.1", 0)) as admin:
        admin.settimeout(ANSWER_SECONDS)
        file.write_text(f"dnsd: {{admin: '127.0.0.1:{admin.getsockname()[1]}'}}\n")
        argv = [*start, command("ztna"), "top", *options, "--interval", "3600", "--config", str(file)]
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            admin.accept()[0].close()  # it is asking: past its imports
            process.send_signal(signal.SIGINT)
            told, complained = process.communicate(timeout=ANSWER_SECONDS)
    assert process.returncode == INTERRUPTED == 130
    assert told == "" and complained.endswith("\nInterrupted\n") and "Traceback" not in complained


def test_ctrl_c_at_a_question_is_an_interruption_and_no_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "etc/dnsmasq.d").mkdir(parents=True)
    (tmp_path / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    argv = ["dns", "install", f"--root={tmp_path}"]
    refused = CliRunner().invoke(cli, argv, input="n\n")
    assert refused.exit_code == 1 and "Aborted!" in refused.output
    with subprocess.Popen([command("ztna"), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = b""
        while not told.endswith(b"Go on? [y/N]: "):
            came = process.stdout.read(1)
            assert came, told
            told += came
        # A signal that comes before it reads would be heard of when it has read.
        status = Path(f"/proc/{process.pid}/status")
        until("it waits for the answer", lambda: "State:\tS" in status.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(ANSWER_SECONDS) == INTERRUPTED
