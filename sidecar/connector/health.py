"""Backend health: outcomes of checks -> a verdict per check, and one per service (the worst of its checks).

    critical --success_before_passing good ones in a row--------------> passing
    passing  --failures_before_warning bad ones in a row, or a warning-> warning
    any      --failures_before_critical bad ones in a row-------------> critical
    critical, having turned critical flaps_max times in a while -------> passing only after flap_hold_s of good ones

Pure. Who probes a backend is sidecar.connector.probes; who tells Consul is sidecar.connector.registration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ztna.config import CheckConfig
from ztna.leases import Port

Verdict = Literal["passing", "warning", "critical"]

FLAP_WINDOW_SECONDS = 300.0
SLOW_START_STEPS = 5
"""The weight of a service that has just recovered grows in so many equal steps: each is a write to Consul."""

_RANK: dict[Verdict, int] = {"passing": 0, "warning": 1, "critical": 2}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check of a backend found; `output` is for people. A warning is no failure."""

    ok: bool
    output: str
    is_warning: bool = False


class CheckKey(NamedTuple):
    """One check of a service: the published port whose backend it asks, and its place among that port's checks."""

    port: Port
    number: int = 0


class CheckHealth:
    """The verdict on one check. It starts critical: a backend nobody has asked yet is not offered."""

    def __init__(self, config: CheckConfig, now: float) -> None:
        self.verdict: Verdict = "critical"
        self.output = "not yet checked"
        self.since = now
        self._config = config
        self._good = 0
        self._bad = 0
        self._good_since = now
        self._falls: deque[float] = deque(maxlen=config.flaps_max)

    def handle(self, outcome: Outcome, now: float) -> bool:
        """Take one outcome in; say whether the verdict changed."""
        self.output = outcome.output
        if outcome.ok:
            self._good_since = now if self._good == 0 else self._good_since
            self._good, self._bad = self._good + 1, 0
        else:
            self._good, self._bad = 0, self._bad + 1
        verdict = self._next(outcome, now)
        if verdict == self.verdict:
            return False
        if verdict == "critical":
            self._falls.append(now)
        self.verdict = verdict
        self.since = now
        return True

    def _next(self, outcome: Outcome, now: float) -> Verdict:
        config = self._config
        if not outcome.ok:
            if self._bad >= config.failures_before_critical:
                return "critical"
            warns = config.failures_before_warning
            is_warned = warns is not None and self._bad >= warns
            return "warning" if is_warned and self.verdict == "passing" else self.verdict
        better: Verdict = "warning" if outcome.is_warning else "passing"
        if self.verdict == "passing":
            return better
        if self._good < config.success_before_passing:
            return self.verdict
        if self.verdict == "critical" and self._is_held(now):
            self.output = (
                f"{outcome.output}; it flaps: passing after {config.flap_hold_s:g} s without a failure"
            )
            return "critical"
        return better

    def _is_held(self, now: float) -> bool:
        """Whether it has turned critical too often of late to be believed at once."""
        while self._falls and now - self._falls[0] > FLAP_WINDOW_SECONDS:
            self._falls.popleft()
        is_flapping = len(self._falls) == self._falls.maxlen
        return is_flapping and now - self._good_since < self._config.flap_hold_s


class ServiceHealth:
    """The verdict on one service: the worst of its checks."""

    def __init__(self, checks: dict[CheckKey, CheckHealth], now: float, slow_start_s: float = 0.0) -> None:
        self.checks = checks
        self.verdict: Verdict = "critical"
        self.since = now
        self._available_since = now
        self._slow_start_s = slow_start_s

    def handle(self, key: CheckKey, outcome: Outcome, now: float) -> bool:
        """Take the outcome of one check in; say whether the service's verdict changed."""
        self.checks[key].handle(outcome, now)
        verdict = _worst(self.checks.values())
        if verdict == self.verdict:
            return False
        if self.verdict == "critical":
            self._available_since = now
        self.verdict = verdict
        self.since = now
        return True

    def weight(self, full: int, now: float) -> int:
        """Return what to say of a configured weight now: little while critical and just after, never nothing."""
        if self._slow_start_s == 0:
            return full
        age_s = 0.0 if self.verdict == "critical" else now - self._available_since
        step = min(SLOW_START_STEPS, 1 + int(age_s / self._slow_start_s * SLOW_START_STEPS))
        return max(1, full * step // SLOW_START_STEPS)

    @property
    def output(self) -> str:
        """What the checks last said, the worst ones alone when there are any."""
        worst = _worst(self.checks.values())
        if worst == "passing":
            return "; ".join(check.output for check in self.checks.values())
        return "; ".join(
            f"{key.port.protocol}:{key.port.port} {check.output}"
            for key, check in self.checks.items()
            if check.verdict == worst
        )


def next_delay(interval_s: float, jitter: float, draw: float) -> float:
    """Return the seconds to the next check, up to `jitter` longer or shorter; `draw` is uniform in [0, 1)."""
    return interval_s * (1 - jitter + 2 * jitter * draw)


def _worst(checks: Iterable[CheckHealth]) -> Verdict:
    return max((check.verdict for check in checks), key=_RANK.__getitem__)
