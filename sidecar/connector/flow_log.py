"""The flow log: one JSON line for each flow that ended, with its bytes, in a file of its own (`connector.flow_log`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ztna.line_log import LineLog
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason

Ended = Literal["finished", "reset", "idle", "evicted", "session_ended", "backend_left", "closing"]


@dataclass(slots=True)
class Counts:
    """What a flow carried: bytes of payload each way, and the datagrams they came in (0 for TCP)."""

    to_backend: int = 0
    to_agent: int = 0
    datagrams_to_backend: int = 0
    datagrams_to_agent: int = 0


@dataclass(frozen=True, slots=True)
class FlowEnd:
    """One flow that has ended; addresses with their ports are the inner ones, as the agent's program sees them."""

    protocol: Literal["tcp", "udp", "icmp"]
    agent: str
    service: ServiceName
    session: SessionId
    flow: str | None
    source: str
    destination: str
    backend: str
    seconds: float
    counts: Counts
    ended: Ended
    reason: Reason | None = None


class FlowLog:
    """Writes lines, or none without a file."""

    def __init__(self, path: str | None) -> None:
        """Open the file. Raises ConfigError."""
        self._lines: LineLog | None = None
        if path is not None:
            self._lines = LineLog(Path(path), key="connector.flow_log", where="connector.flow_log")

    @property
    def problem(self) -> str:
        """Why the last line could not be written, empty when it was."""
        return self._lines.problem if self._lines is not None else ""

    def write(self, end: FlowEnd) -> None:
        """Have a line written; never waits."""
        if self._lines is None:
            return
        counts = end.counts
        fields: dict[str, object] = {
            "protocol": end.protocol,
            "agent": end.agent,
            "service": end.service,
            "session": end.session,
            "flow": end.flow,
            "source": end.source,
            "destination": end.destination,
            "backend": end.backend,
            "seconds": round(end.seconds, 3),
            "bytes_to_backend": counts.to_backend,
            "bytes_to_agent": counts.to_agent,
            "ended": end.ended,
            "reason": end.reason,
        }
        if end.protocol != "tcp":
            fields["datagrams_to_backend"] = counts.datagrams_to_backend
            fields["datagrams_to_agent"] = counts.datagrams_to_agent
        self._lines.write("flow_ended", fields)

    def reopen(self) -> None:
        """Go on in a new file at the same path. Raises ConfigError."""
        if self._lines is not None:
            self._lines.reopen()

    def close(self) -> None:
        """Write what waits."""
        if self._lines is not None:
            self._lines.close()

    def status(self) -> dict[str, object] | None:
        """Return what /status shows."""
        return self._lines.status() if self._lines is not None else None
