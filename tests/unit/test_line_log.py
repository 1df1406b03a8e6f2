"""One line an event in a file (here the audit log); what cannot be written is counted and costs nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.audit import AuditLog
from ztna import line_log as module
from ztna.errors import ConfigError

DEADLINE_S = 10.0


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    log = AuditLog(tmp_path / "audit.log")
    yield log
    log.close()


def test_each_line_is_json_with_its_time_and_the_file_is_private(log: AuditLog, tmp_path: Path) -> None:
    log.write("session_opened", {"agent": "line\nbreak", "bytes": 7})
    log.close()
    log.close()
    (line,) = lines(tmp_path / "audit.log")
    assert line["event"] == "session_opened" and line["agent"] == "line\nbreak" and line["bytes"] == 7
    assert str(line["time"]).endswith("Z")
    assert (tmp_path / "audit.log").stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_there_is_added_to_and_made_private(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_text('{"event": "before"}\n')
    path.chmod(0o644)
    log = AuditLog(path)
    log.write("after", {})
    log.close()
    assert [line["event"] for line in lines(path)] == ["before", "after"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_after_the_file_was_moved_away_it_is_made_anew(log: AuditLog, tmp_path: Path) -> None:
    log.write("first", {})
    until(lambda: log.written == 1)
    (tmp_path / "audit.log").rename(tmp_path / "audit.log.1")
    log.write("second", {})
    until(lambda: log.written == 2)
    log.reopen()
    log.write("third", {})
    log.close()
    assert [line["event"] for line in lines(tmp_path / "audit.log.1")] == ["first", "second"]
    assert [line["event"] for line in lines(tmp_path / "audit.log")] == ["third"]


def test_a_full_disk_is_counted_and_over_when_there_is_room_again(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open(tmp_path / "audit.log", os.O_WRONLY | os.O_APPEND)
    full = os.open("/dev/full", os.O_WRONLY)
    ours, log._file = log._file, full
    log.write("lost", {})
    until(lambda: log.lost == 1)
    assert "No space left" in log.problem and log.status()["lost"] == 1
    log._file = real
    log.write("kept", {})
    until(lambda: log.written == 1)
    assert log.problem == ""
    assert [line["event"] for line in lines(tmp_path / "audit.log")] == ["kept"]
    os.close(full)
    os.close(ours)


def test_a_line_that_was_cut_off_does_not_spoil_the_next(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.write, iter(range(10))

    def short(descriptor: int, data: bytes) -> int:
        if next(calls):
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:9])

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", short)
        log.write("torn", {})
        until(lambda: log.lost == 1)
    log.write("whole", {})
    log.close()
    torn, whole = (tmp_path / "audit.log").read_text().splitlines()
    assert len(torn) == 9 and json.loads(whole)["event"] == "whole"


def test_a_disk_that_hangs_costs_lines_and_never_waits(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = module.threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(log, "_append", lambda lines: hang.wait(DEADLINE_S))
        log.write("taken", {})
        until(lambda: log.status()["waiting"] == 0)
        for _ in range(module.LINES_WAITING_MAX + 5):
            log.write("waiting", {})
        with pytest.raises(ConfigError, match="lines wait"):
            log.reopen()
        hang.set()
    assert log.lost == 5


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)], ids=["directory", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "audit.log")
    with pytest.raises(ConfigError, match=r"relay\.audit_log"):
        AuditLog(tmp_path / "audit.log")
