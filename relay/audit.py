"""The audit log: one JSON line for each session that was opened, denied or closed, in a file of its own.

What is worth a line is relay.reporting's to say.
"""

from __future__ import annotations

from pathlib import Path

from ztna.line_log import LineLog


class AuditLog(LineLog):
    """The lines of one relay."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises ConfigError."""
        super().__init__(path, key="relay.audit_log", where="relay.audit")
