"""ztna.runtime: a real process, its signals, its pages, its exit status."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ztna import runtime
from ztna.config import Config, Endpoint
from ztna.listening import bind_error, port_in_use_error
from ztna.runtime import Daemon, Readiness, sleep_or_stop

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 20.0
POLL_SECONDS = 0.01

# What a daemon does is said on its standard input, one word a line.
DAEMON = """
import asyncio, resource, sys
from ztna import runtime
from ztna.errors import LinkError, ConfigError
from ztna.jsontypes import Secret
from ztna.telemetry import logger

async def body(daemon):
    daemon.readiness.awaiting("consul", "no leader")
    daemon.readiness.warn("dns_insecure", "resolver 192.0.2.1")
    daemon.on_reload.append(lambda: print("reloaded", flush=True))
    daemon.status_sources["things"] = lambda: {"secret": Secret(b"hunter2"), "files": FILES()}
    print(daemon.admin_address[1], flush=True)
    loop = asyncio.get_running_loop()
    words = asyncio.Queue()
    loop.add_reader(0, lambda: words.put_nowait(sys.stdin.readline().strip()))
    while not daemon.stopping.is_set():
        getter = daemon.tasks.create_task(words.get())
        stopping = daemon.tasks.create_task(daemon.stopping.wait())
        await asyncio.wait((getter, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not getter.done():
            break
        await act(daemon, getter.result())
    if HANG:
        print("hanging", flush=True)
        await asyncio.Event().wait()

async def act(daemon, word):
    if word == "ready":
        daemon.readiness.done("consul")
    elif word == "fail":
        raise LinkError("the relay 192.0.2.1:4433 does not answer")
    elif word == "config":
        raise ConfigError("relay.tls.key: mode 0644")
    elif word == "task":
        async def broken():
            raise LinkError("in a task")
        daemon.tasks.create_task(broken())
        await asyncio.Event().wait()
    elif word == "bug":
        raise ZeroDivisionError("a bug")
    elif word == "callback":
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    elif word == "bad_reload":
        def bad():
            raise LinkError("unreadable certificate")
        daemon.on_reload.insert(0, bad)
    elif word == "rereading":
        daemon.on_reload.insert(0, daemon.reread)
    elif word == "leave":
        daemon.tasks.create_task(asyncio.Event().wait())
        daemon.stopping.set()
    print("did", word, flush=True)

FILES = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
HANG = "--hang" in sys.argv and (sys.argv.remove("--hang") or True)
runtime.daemon_command("ztna-dnsd", "dnsd", body)()
"""


class Process:
    """The daemon above, as a process of its own."""

    def __init__(self, *arguments: str, admin: str = "127.0.0.1:0") -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", DAEMON, "--set", f"dnsd.admin={admin}", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.port = 0

    def line(self) -> str:
        assert self.child.stdout
        return self.child.stdout.readline().strip()

    def started(self) -> Process:
        self.port = int(self.line())
        return self

    def tell(self, word: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(word + "\n")
        self.child.stdin.flush()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ended(self) -> tuple[int, list[dict[str, Any]]]:
        _, log = self.child.communicate(timeout=DEADLINE_SECONDS)
        return self.child.returncode, [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(*arguments: str, **options: str) -> Process:
        processes.append(Process(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.child.kill()
        process.child.communicate()


Start = Callable[..., Process]


def test_not_ready_says_what_is_awaited_and_then_ready(start: Start) -> None:
    process = start().started()
    code, text = process.get("/readyz")
    assert (code, json.loads(text)) == (
        503,
        {
            "ready": False,
            "awaiting": {"consul": "no leader"},
            "warnings": {"dns_insecure": "resolver 192.0.2.1"},
        },
    )
    assert process.get("/healthz") == (200, "ok\n")
    assert "ztna_ready 0.0" in process.get("/metrics")[1]
    process.tell("ready")
    assert process.line() == "did ready"
    assert process.get("/readyz")[0] == 200
    assert "ztna_ready 1.0" in process.get("/metrics")[1]
    assert process.get("/nothing")[0] == 404


def test_metrics_and_status_tell_what_it_is(start: Start) -> None:
    process = start().started()
    code, metrics = process.get("/metrics")
    assert code == 200
    assert 'ztna_build_info{daemon="ztna-dnsd",version="' in metrics
    assert "process_resident_memory_bytes" in metrics
    status = json.loads(process.get("/status")[1])
    assert (status["daemon"], status["pid"]) == ("ztna-dnsd", process.child.pid)
    assert status["readiness"]["ready"] is False
    assert status["things"]["secret"] == "***"
    soft, hard = status["things"]["files"]
    assert soft == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(start: Start, number: int) -> None:
    process = start().started()
    process.child.send_signal(number)
    code, log = process.ended()
    assert code == 0
    assert [line["event"] for line in log] == ["started", "stopping", "stopped"]


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("--hang").started()
    process.child.send_signal(signal.SIGTERM)
    assert process.line() == "hanging"
    assert process.get("/readyz")[0] == 503
    process.child.send_signal(signal.SIGTERM)
    code, log = process.ended()
    assert code == 1
    assert log[-1]["event"] == "exit_at_once"


def test_a_reload_is_told_to_all_and_a_bad_one_is_survived(start: Start) -> None:
    process = start().started()
    process.tell("bad_reload")
    assert process.line() == "did bad_reload"
    process.child.send_signal(signal.SIGHUP)
    assert process.line() == "reloaded"
    process.child.send_signal(signal.SIGTERM)
    code, log = process.ended()
    assert code == 0
    assert [line.get("error") for line in log if line["event"] == "reload_failed"] == [
        "unreadable certificate"
    ]


def test_a_configuration_out_of_a_pipe_is_kept_and_why_is_said(start: Start, tmp_path: Path) -> None:
    """As with `--config <(...)`: to open it again would wait for somebody to write, with the whole daemon."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start("--config", str(pipe))
    pipe.write_text("dnsd: {ttl_s: 7}")
    process.started().tell("rereading")
    assert process.line() == "did rereading"
    process.child.send_signal(signal.SIGHUP)
    assert process.line() == "reloaded", "the others are told all the same"
    assert process.get("/healthz")[0] == 200
    process.child.send_signal(signal.SIGTERM)
    code, log = process.ended()
    (said,) = [line["error"] for line in log if line["event"] == "reload_failed"]
    assert code == 0 and said.startswith(f"{pipe}: no file but a pipe or device, whose text is gone")


def test_a_port_that_is_taken_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        code, log = start(admin=f"127.0.0.1:{port}").ended()
    assert code == 1
    assert log[-1]["error"] == f"127.0.0.1:{port} is taken by another process; stop it or choose another port"
    assert "traceback" not in log[-1]


def test_an_address_that_is_not_ours_is_named(start: Start) -> None:
    code, log = start(admin="192.0.2.1:80").ended()
    assert code == 1
    assert log[-1]["error"] == "cannot listen on 192.0.2.1:80: Cannot assign requested address"


@pytest.mark.parametrize(
    ("word", "status", "error"),
    [
        ("fail", 1, "the relay 192.0.2.1:4433 does not answer"),
        ("task", 1, "in a task"),
        ("config", 2, "relay.tls.key: mode 0644"),
    ],
)
def test_an_error_of_ours_is_one_line(start: Start, word: str, status: int, error: str) -> None:
    process = start().started()
    process.tell(word)
    code, log = process.ended()
    assert code == status
    assert [line["error"] for line in log if line["event"] == "failed"] == [error]
    assert not any("traceback" in line for line in log)


def test_a_bug_has_its_traceback(start: Start) -> None:
    process = start().started()
    process.tell("bug")
    code, log = process.ended()
    assert code == 1
    assert "ZeroDivisionError: a bug" in log[-1]["traceback"]


def test_a_bug_in_a_callback_is_counted_and_costs_no_more(start: Start) -> None:
    process = start().started()
    process.tell("callback")
    assert process.line() == "did callback"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while "ztna_unexpected_errors_total 1.0" not in process.get("/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)
    process.child.send_signal(signal.SIGTERM)
    code, log = process.ended()
    assert code == 0
    assert any("division by zero" in line.get("traceback", "") for line in log)


def test_tasks_that_are_left_are_cancelled(start: Start) -> None:
    process = start().started()
    process.tell("leave")
    code, log = process.ended()
    assert (code, log[-1]["event"]) == (0, "stopped")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "dnsd.admn=127.0.0.1:1"], "ztna-dnsd: dnsd.admn: unknown key; did you mean admin?"),
        (["--set", "dnsd"], "ztna-dnsd: --set dnsd: expected KEY=VALUE"),
        (["--config", "/nonexistent/c.yaml"], "ztna-dnsd: /nonexistent/c.yaml: No such file or directory"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_is_told_and_is_status_2(start: Start, arguments: list[str], said: str) -> None:
    process = start(*arguments)
    _, text = process.child.communicate(timeout=DEADLINE_SECONDS)
    assert process.child.returncode == 2
    assert said in text


def test_a_missing_section_is_told(tmp_path: Path) -> None:
    code = "from ztna import runtime; runtime.daemon_command('ztna-relay', 'relay', None)()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ztna-relay: relay: the configuration has no such section; name a file")


def test_the_log_level_is_a_flag_and_the_version_is_told(start: Start) -> None:
    process = start("--log-level", "error").started()
    process.child.send_signal(signal.SIGTERM)
    assert process.ended() == (0, [])
    process = start("--version")
    assert process.line().startswith("ztna-dnsd, version ")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ZTNA_")}


def test_readiness_is_for_everything_awaited() -> None:
    readiness = Readiness()
    assert readiness.ready
    readiness.awaiting("a")
    readiness.awaiting("b", "0 of 3")
    readiness.awaiting("b", "1 of 3")
    readiness.done("a")
    assert not readiness.ready
    assert readiness.report() == {"ready": False, "awaiting": {"b": "1 of 3"}, "warnings": {}}
    readiness.done("b")
    readiness.done("b")
    assert readiness.ready
    readiness.warn("w", "x")
    readiness.unwarn("w")
    assert readiness.report()["warnings"] == {}


async def test_a_sleep_ends_with_the_stop() -> None:
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("test", Config(), tasks)
        assert not await sleep_or_stop(daemon, 0.001)
        asyncio.get_running_loop().call_later(0.01, daemon.stopping.set)
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert await sleep_or_stop(daemon, 1000.0)


def test_errors_name_the_endpoint() -> None:
    assert str(port_in_use_error(("::1", 53))).startswith("[::1]:53 is taken")
    assert str(bind_error(Endpoint("a", 1), OSError(13, "Permission denied"))) == (
        "cannot listen on a:1: Permission denied; ports below 1024 take CAP_NET_BIND_SERVICE, or root"
    )
    assert runtime.EXIT_FINE == 0
