"""`ztna up` as its user meets it: one pass with --check, JSON, taken ports, a clean end on Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.console import command, require_tools, run
from tests.support.consul import ConsulUnderTest, require_binary
from tests.support.lab import until

pytestmark = pytest.mark.slow

END_SECONDS = 3.0
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Root without a single capability may do what an ordinary user may, in the folders that root owns."""


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_check_passes_without_privileges_and_tells_what_it_did_as_json() -> None:
    done = run("ztna", "up", "--check", "--json", prefix=WITHOUT_PRIVILEGES, **os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is True
    assert [step["step"] for step in told["steps"]] == ["resolve", "udp echo", "http get", "denied service"]
    assert all(step["ok"] for step in told["steps"])
    assert "no_grant" in told["steps"][3]["detail"]
    health = {row["service"]: row["health"] for row in told["services"]}
    assert health == {"echo-service": "passing", "web-app": "passing", "db": "critical"}


def test_a_taken_port_is_said_and_another_chosen() -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 5533))
            taken.listen()
        except OSError:
            pass  # somebody else has it already, which serves as well
        done = run("ztna", "up", "--check", **os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "port 5533 (dnsd) is taken; using " in done.stdout


def test_ctrl_c_ends_everything_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    require_tools("curl")
    environment = os.environ | {"TMPDIR": str(tmp_path), "COLUMNS": "200"}
    output = tmp_path / "printed"
    with output.open("wb") as printed:
        process = subprocess.Popen([command("ztna"), "up"], stdout=printed, stderr=printed, env=environment)
    try:
        text = until(
            "the commands to try", lambda: "Try, from" in output.read_text() and output.read_text(), 60
        )
        children = children_of(process.pid)
        assert len(children) >= 5
        web_port = re.search(r"http://127\.0\.0\.1:(\d+)/db/up", text)
        assert web_port is not None
        url = f"http://127.0.0.1:{web_port.group(1)}/db/up"
        subprocess.run(["curl", "-sS", "--fail", "-X", "POST", url], check=True, timeout=10)
        until("db is told to be passing", lambda: "db: passing" in output.read_text(), 20)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(END_SECONDS + 5) == 0, output.read_text()
        assert time.monotonic() - started < END_SECONDS
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert [path.name for path in tmp_path.iterdir()] == ["printed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_a_signal_ended_says_so_by_its_exit_status(
    tmp_path: Path, number: signal.Signals
) -> None:
    kept = tmp_path / "kept"
    with subprocess.Popen([command("ztna"), "up", "--check", "--keep", str(kept)]) as process:
        until("it has begun", lambda: kept.is_dir() and list(kept.iterdir()), 60)
        process.send_signal(number)
        assert process.wait(END_SECONDS + 5) == 128 + number


def test_the_commands_it_prints_work(tmp_path: Path) -> None:
    require_tools("dig", "curl", "nc")
    output = tmp_path / "printed"
    with output.open("wb") as printed:
        process = subprocess.Popen([command("ztna"), "up"], stdout=printed, stderr=printed)
    try:
        last = "configurations and logs: "
        text = until("all it has to say", lambda: last in output.read_text() and output.read_text(), 60)
        lines = [line.strip().partition("   #")[0] for line in text.splitlines() if line.startswith("  ")]
        commands = [line for line in lines if line.startswith(("dig", "curl", "echo", "ztna"))]
        assert len(commands) >= 10
        until("the page is served", lambda: "hello from web-app" in _shell(commands[3]))
        for line in commands:
            line = line.replace("ztna ping", "ztna ping --count 1")
            expected = "ok select" if "select" in line else "hello" if line.startswith("echo") else ""
            until(line, lambda line=line, expected=expected: expected in _shell(line) and _shell(line))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def _shell(line: str) -> str:
    environment = os.environ | {"PATH": f"{Path(command('ztna')).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=20, env=environment
    ).stdout


def test_bad_usage_exits_with_2_and_says_why() -> None:
    for arguments, words in (
        (("up", "--pool", "nonsense"), "expected a network"),
        (("up", "--json"), "--json goes with --check"),
        (("check-config", "/nowhere/x.yaml"), "/nowhere/x.yaml"),
        (("nothing",), "No such command"),
    ):
        done = run("ztna", *arguments, **os.environ)
        assert done.returncode == 2, f"{arguments}: {done.stdout}{done.stderr}"
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_consul_that_does_not_answer_is_named() -> None:
    done = run("ztna", "up", "--check", "--consul", "http://127.0.0.1:1", **os.environ)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_running_consul_is_used_when_named_and_the_rest_can_be_kept(
    own_consul: ConsulUnderTest, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    arguments = ("up", "--check", "--json", "--consul", own_consul.address, "--keep", str(kept))
    done = run("ztna", *arguments, **os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["consul"] == f"the running one at {own_consul.address}"
    names = {path.name for path in kept.iterdir()}
    for daemon in ("dnsd", "relay", "connector", "agent"):
        assert {f"{daemon}.yaml", f"{daemon}.log"} <= names
    assert {path.name for path in kept.glob("*.key") if path.stat().st_mode & 0o077} == set()
    # Whoever named it keeps it: it runs on, our services are gone, the names keep their addresses.
    assert own_consul.request("GET", "/v1/health/service/web-app")[1] == []
    assert len(own_consul.request("GET", "/v1/kv/ztna/vip/service/?keys")[1]) == 3
    again = run("ztna", "up", "--check", "--keep", str(kept), **os.environ)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_consul_on_path_is_used_in_dev_mode(tmp_path: Path) -> None:
    (tmp_path / "consul").symlink_to(require_binary("newest"))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run("ztna", "up", "--check", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Consul: {tmp_path}/consul 1.19.2 in dev mode" in done.stdout
