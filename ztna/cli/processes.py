"""Child processes of `ztna up`: started with their output in a file, ended together and promptly.

Knows nothing of the mesh; ztna.cli.mesh says what to start.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztna.errors import ZtnaError

STOP_SECONDS = 1.2
LOG_TAIL_LINES = 8
PORT_ATTEMPTS = 100
OTHER_PORTS = range(20_000, 32_768)
"""Below what Linux gives to clients by default, so that none takes one before the child listens there."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    # A `ztna up` that is killed with -9 must leave nothing running either (prctl(2)).
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def console_script(name: str) -> str:
    """Return the path of a console script of this very environment."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ZtnaError(
            f"{path} is missing: install the distribution (`pip install ztna-mesh`) in this environment"
        )
    return str(path)


def port_is_free(port: int) -> bool:
    """Say whether a port of 127.0.0.1 is free for both TCP and UDP."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


@dataclass
class Ports:
    """Hand out each port once: the preferred one when free, else another, remembering that."""

    taken: list[tuple[str, int, int]] = field(default_factory=list)
    _given: set[int] = field(default_factory=set)

    def choose(self, purpose: str, preferred: int) -> int:
        """Return a port free for TCP and UDP on 127.0.0.1; 0 as `preferred` means any."""
        if preferred and preferred not in self._given and port_is_free(preferred):
            self._given.add(preferred)
            return preferred
        for _ in range(PORT_ATTEMPTS):
            port = secrets.choice(OTHER_PORTS)
            if port not in self._given and port_is_free(port):
                self._given.add(port)
                if preferred:
                    self.taken.append((purpose, preferred, port))
                return port
        raise ZtnaError(f"no free port for {purpose}: {PORT_ATTEMPTS} attempts failed")


@dataclass
class Child:
    """One child process and the file its output goes to."""

    name: str
    argv: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only us. Raises ZtnaError."""
        with self.log.open("ab") as output:
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *self.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=os.environ | self.environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise ZtnaError(f"{self.name}: {self.argv[0]} cannot be run: {error.strerror}") from None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.returncode is None

    def ended_error(self) -> ZtnaError:
        """Say how it ended, with the last lines it printed."""
        code = self.process.returncode if self.process else None
        return ZtnaError(f"{self.name} ended with status {code}; its last lines ({self.log}):\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines of its output."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join("    " + line for line in lines[-LOG_TAIL_LINES:])

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask it to end (SIGTERM), and end it (SIGKILL) when `seconds` have passed."""
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), seconds)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def stop_in_order(groups: Sequence[Sequence[Child]], seconds_each: float) -> None:
    """End the groups one after the other, the children of one at the same time."""
    for group in groups:
        await asyncio.gather(*(child.stop(seconds_each) for child in group))
