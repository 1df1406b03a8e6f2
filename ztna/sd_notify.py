"""What systemd is told (sd_notify(3)): ready, reloading, stopping, a status line, and that the loop lives.

Any service manager that sets NOTIFY_SOCKET will do. Without it nothing is said. Decides nothing: the
daemon's readiness says when it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import MutableMapping

RESEND_SECONDS = 5.0
"""What the manager's full queue did not take is said again after so long."""
STATUS_CHARACTERS_MAX = 500


class ServiceManager:
    """Whoever started this process and wants to hear how it is. Never blocks and never fails."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        """Speak to the socket at `address` (`@name`: an abstract one); None says nothing."""
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._socket: socket.socket | None = None
        self._untold: list[str] = []
        self._status = ""
        self._said_ready = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> ServiceManager:
        """Take NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID out of the environment: children are not asked."""
        address = environment.pop("NOTIFY_SOCKET", None)
        microseconds = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(pid)) == str(pid)
        watchdog_s = int(microseconds) / 1e6 if watched and microseconds.isdecimal() else 0.0
        return cls(address or None, watchdog_s or None)

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return self._address is not None

    def changed(self, *, ready: bool, status: str) -> None:
        """Say what the daemon waits for, if that is new; and once, when it first waits for nothing, READY."""
        self._tell_status(status)
        if ready and not self._said_ready:
            self._said_ready = True
            self._tell("READY=1")

    def reloading(self, monotonic_us: int) -> None:
        """Say that files are read again; `monotonic_us` is CLOCK_MONOTONIC, which tells one reload from the next."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={monotonic_us}")

    def reloaded(self) -> None:
        """Say that they are, whatever came of it: the manager awaits it."""
        if self._said_ready:
            self._tell("READY=1")

    def stopping(self, status: str) -> None:
        """Say that the end has begun."""
        self._tell_status(status)
        self._tell("STOPPING=1")

    async def keep(self) -> None:
        """Prove at half the watchdog's time that the loop runs, for ever; say again what was not taken."""
        seconds = self._watchdog_s / 2 if self._watchdog_s else RESEND_SECONDS
        while self.listens:
            if self._watchdog_s:
                self._tell("WATCHDOG=1")
            else:
                self._flush()
            await asyncio.sleep(seconds)

    def close(self) -> None:
        """Say nothing more."""
        self._address = None
        if self._socket is not None:
            self._socket.close()

    def _tell_status(self, status: str) -> None:
        status = " ".join(status.split())[:STATUS_CHARACTERS_MAX]
        if status != self._status:
            self._status = status
            self._tell(f"STATUS={status}")

    def _tell(self, message: str) -> None:
        """Send it after what waits; in place of what waits of its kind, which bounds that."""
        if self.listens:
            self._untold = [said for said in self._untold if _kind(said) != _kind(message)]
            self._untold.append(message)
        self._flush()

    def _flush(self) -> None:
        # A manager that is gone or full costs the daemon nothing; what it missed is kept for the next try.
        with contextlib.suppress(OSError):
            while self.listens and self._untold:
                self._send(self._untold[0])
                del self._untold[0]

    def _send(self, message: str) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self._socket.sendto(message.encode(), self._address or "")


def _kind(message: str) -> str:
    return message.partition("=")[0]
