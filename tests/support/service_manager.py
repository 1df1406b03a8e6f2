"""A service manager's end of sd_notify, in a test: a socket that hears what a daemon says."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEARD_SECONDS = 20.0


class Manager:
    """A bound NOTIFY_SOCKET; `heard` has every line, in order, once it was read."""

    def __init__(self, address: str) -> None:
        """Listen at a path, or at `@name` among the abstract ones."""
        self.address = address
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    @classmethod
    def in_folder(cls, folder: Path) -> Manager:
        return cls(str(folder / "notify"))

    @classmethod
    def abstract(cls) -> Manager:
        return cls(f"@ztna-test-{os.getpid()}-{time.monotonic_ns()}")

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """Return what such a manager gives to a service; the watchdog's process is not known before it starts."""
        given = {"NOTIFY_SOCKET": self.address}
        return given if watchdog_s is None else given | {"WATCHDOG_USEC": str(int(watchdog_s * 1e6))}

    def read(self, seconds: float) -> None:
        """Take what there is, waiting so long for the first of it."""
        while select.select([self._socket], [], [], seconds)[0]:
            self.heard += self._socket.recv(4096).decode().splitlines()
            seconds = 0.0

    def until(self, condition: Callable[[list[str]], Any], seconds: float = HEARD_SECONDS) -> None:
        """Listen until what was heard in all satisfies the condition; fails with it otherwise."""
        deadline = time.monotonic() + seconds
        while not condition(self.heard):
            assert time.monotonic() < deadline, f"heard {self.heard}"
            self.read(deadline - time.monotonic())

    def until_said(self, line: str, seconds: float = HEARD_SECONDS) -> None:
        """Listen until this line was said."""
        self.until(lambda heard: line in heard, seconds)

    def close(self) -> None:
        self._socket.close()
