"""Backend health: outcomes of checks -> a verdict per check, and one per service (the worst of its checks).

    critical --success_before_passing in a row--> passing --failures_before_critical in a row--> critical

Pure. Who probes a backend is sidecar.connector.backends; who tells Consul is sidecar.connector.registration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ztna.leases import Port

Verdict = Literal["passing", "critical"]

JITTER = 0.1
"""Checks of many services spread out: each wait is up to this part longer or shorter."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check of a backend found; `output` is for people."""

    ok: bool
    output: str


class CheckHealth:
    """The verdict on one check. It starts critical: a backend nobody has asked yet is not offered."""

    def __init__(self, *, success_before_passing: int, failures_before_critical: int, now: float) -> None:
        self.verdict: Verdict = "critical"
        self.output = "not yet checked"
        self.since = now
        self._success_before_passing = success_before_passing
        self._failures_before_critical = failures_before_critical
        self._against = 0

    def handle(self, outcome: Outcome, now: float) -> bool:
        """Take one outcome in; say whether the verdict changed."""
        self.output = outcome.output
        if outcome.ok == (self.verdict == "passing"):
            self._against = 0
            return False
        self._against += 1
        needed = self._success_before_passing if outcome.ok else self._failures_before_critical
        if self._against < needed:
            return False
        self.verdict = "passing" if outcome.ok else "critical"
        self.since = now
        self._against = 0
        return True


class ServiceHealth:
    """The verdict on one service: passing only while every check of it passes."""

    def __init__(self, checks: dict[Port, CheckHealth], now: float) -> None:
        self.checks = checks
        self.verdict: Verdict = "critical"
        self.since = now

    def handle(self, port: Port, outcome: Outcome, now: float) -> bool:
        """Take the outcome of one port's check in; say whether the service's verdict changed."""
        self.checks[port].handle(outcome, now)
        verdict: Verdict = "passing" if _all_pass(self.checks.values()) else "critical"
        if verdict == self.verdict:
            return False
        self.verdict = verdict
        self.since = now
        return True

    @property
    def output(self) -> str:
        """What the checks last said, the failing ones alone when there are any."""
        failing = [
            f"{port.protocol}:{port.port} {check.output}"
            for port, check in self.checks.items()
            if check.verdict == "critical"
        ]
        return "; ".join(failing or [check.output for check in self.checks.values()])


def next_delay(interval_s: float, draw: float) -> float:
    """Return the seconds to the next check; `draw` is uniform in [0, 1)."""
    return interval_s * (1 - JITTER + 2 * JITTER * draw)


def _all_pass(checks: Iterable[CheckHealth]) -> bool:
    return all(check.verdict == "passing" for check in checks)
