"""A file of JSON lines, one an event: the relay's audit log, the connector's flow log.

A thread writes, so that a slow or full disk never holds up the daemon: lines wait in a bounded queue, and what cannot
be written is counted and gone. What is worth a line is its users' to say.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ztna.errors import ConfigError
from ztna.jsontypes import to_json
from ztna.log_lines import utc
from ztna.telemetry import dropped

LINES_WAITING_MAX = 10_000
LINES_PER_WRITE = 256
CLOSE_SECONDS = 2.0
MODE = 0o600

_Item = bytes | int | None
"""A line, the descriptor of a file to go on in, or the end."""


class LineLog:
    """One file, appended to. `problem` says why the last line could not be written, empty when it was."""

    def __init__(self, path: Path, *, key: str, where: str) -> None:
        """Open the file, made with mode 0600 when it is not there. Raises ConfigError.

        `key` is the configuration's that names the file, `where` what lost lines are counted under.
        """
        self._path = path
        self._key = key
        self._where = where
        self._queue: queue.Queue[_Item] = queue.Queue(LINES_WAITING_MAX)
        self._file = _open(path, key)
        self._torn = False
        """Whether the file ends inside a line."""
        self.problem = ""
        self.written = self.lost = 0
        # A daemon thread: one that hangs in a write must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=where, daemon=True)
        self._thread.start()

    def write(self, event: str, fields: Mapping[str, object]) -> None:
        """Have a line written; never waits."""
        line = to_json({"time": utc(time.time()), "event": event, **fields}) + b"\n"
        if not self._put(line):
            self._lose(1, "queue_full")

    def reopen(self) -> None:
        """Go on in a new file at the same path, for whoever has moved the old one away. Raises ConfigError."""
        descriptor = _open(self._path, self._key)
        if not self._put(descriptor):
            os.close(descriptor)
            raise ConfigError(f"{self._key}: {self._path}: not taken up, {LINES_WAITING_MAX} lines wait")

    def close(self) -> None:
        """Write what waits, within CLOSE_SECONDS; harmless twice."""
        if self._thread.is_alive() and self._put(None):
            self._thread.join(CLOSE_SECONDS)

    def status(self) -> dict[str, object]:
        """Return what /status shows."""
        return {
            "file": str(self._path),
            "written": self.written,
            "lost": self.lost,
            "waiting": self._queue.qsize(),
            "problem": self.problem,
        }

    def _put(self, item: _Item) -> bool:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while True:
            items = [self._queue.get()]
            while len(items) < LINES_PER_WRITE and not self._queue.empty():
                items.append(self._queue.get())
            lines: list[bytes] = []
            for item in items:
                if isinstance(item, bytes):
                    lines.append(item)
                    continue
                self._append(lines)
                lines = []
                os.close(self._file)
                if item is None:
                    return
                self._file, self._torn = item, False
            self._append(lines)

    def _append(self, lines: list[bytes]) -> None:
        if not lines:
            return
        data = (b"\n" if self._torn else b"") + b"".join(lines)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError as error:
            self.problem = f"{self._path}: {error.strerror}"
            self._torn = self._torn if done == 0 else data[done - 1 : done] != b"\n"
            self.written += data[:done].count(b"\n")
            self._lose(len(lines) - min(len(lines), data[:done].count(b"\n")), "disk")
            return
        self.written += len(lines)
        self.problem, self._torn = "", False

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        dropped(self._where, why, count)


def _open(path: Path, key: str) -> int:
    """Return a descriptor to append with. Raises ConfigError for what is no file, or cannot be had."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, MODE)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{key}: {path}: expected a regular file")
        os.fchmod(descriptor, MODE)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
    except ConfigError:
        os.close(descriptor)
        raise
    return descriptor
