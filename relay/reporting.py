"""Tells of sessions and refusals: metrics count all of them, the audit log tells of each, the log keeps quiet.

Decides nothing; relay.sessions says what happened.
"""

from __future__ import annotations

import math

from relay.audit import AuditLog
from relay.commands import Event, Refusal, Told
from relay.denials import Denials
from relay.peers import WHERE
from ztna.quiet import Quiet
from ztna.reasons import Reason
from ztna.telemetry import SESSION_ENDS, SESSION_OPEN_SECONDS, SESSIONS_OPENED, logger, refused

_log = logger(__name__)


class Reports:
    """What one relay tells; without an audit log nothing is audited."""

    def __init__(self, audit: AuditLog | None) -> None:
        self.audit = audit
        self._quiet = Quiet()
        self._denials = Denials()

    def session(self, told: Told, more: dict[str, object], now: float) -> None:
        """Tell that a session was opened or closed; `more` is what the relay knows beside."""
        fields = told.fields | more
        if told.event == "session_opened":
            SESSIONS_OPENED.inc()
            SESSION_OPEN_SECONDS.observe(told.opening_s, {"session": told.session})
        else:
            SESSION_ENDS.labels(told.fields["reason"]).inc()
        if self.audit is not None:
            self.audit.write(told.event, fields)
        if self._quiet.allows((str(told.fields["agent"]), told.event, str(told.fields["service"])), now):
            _log.info(told.event, **fields)

    def refusal(self, refusal: Refusal, more: dict[str, object], now: float) -> None:
        """Tell what a peer was refused."""
        refused(WHERE, refusal.reason)
        if refusal.about == "open" and self.audit is not None:
            kind = refusal.name, refusal.subject, str(refusal.reason)
            line = self._denials.note(kind, more, now)
            if line is not None:
                self.audit.write("session_denied", line)
        if not self._quiet.allows((refusal.name, refusal.about, refusal.reason), now):
            return
        log = _log.warning if refusal.reason is Reason.NOT_YOUR_SESSION else _log.info
        log(
            "refused",
            message=refusal.about,
            peer=refusal.name,
            reason=refusal.reason,
            subject=refusal.subject,
            owners=",".join(refusal.owners),
        )

    def event(self, event: Event, now: float) -> None:
        """Tell what else happened."""
        if self._quiet.allows((event.event, *event.fields.values()), now):
            _log.info(event.event, **event.fields)

    def tick(self, now: float) -> None:
        """Say how many denials and lines there were that have none; call it about once a second."""
        self._tell_denials(now)
        for about, count in self._quiet.over(now):
            _log.info("lines_left_out", about=" ".join(about), count=count)

    def close(self) -> None:
        """Say what is left to say, and write it."""
        self._tell_denials(math.inf)
        if self.audit is not None:
            self.audit.close()

    def _tell_denials(self, now: float) -> None:
        for line in self._denials.over(now):
            if self.audit is not None:
                self.audit.write("session_denied", line)
