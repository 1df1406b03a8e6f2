"""Backend health: outcomes of checks -> a verdict per check, backend, published port and service.

A backend is as bad as the worst of its checks, a port as good as the best of its backends, a service as bad as the
worst of its ports.

    critical --success_before_passing good ones in a row--------------> passing
    passing  --failures_before_warning bad ones in a row, or a warning-> warning
    any      --failures_before_critical bad ones in a row-------------> critical
    critical, having turned critical flaps_max times in a while -------> passing only after flap_hold_s of good ones

Pure. Who probes a backend is sidecar.connector.probes; who tells Consul is sidecar.connector.registration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ztna.config import CheckConfig
from ztna.leases import Port
from ztna.sections import Endpoint

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
    """One check of a service: the published port, the backend that it asks, its place among that one's checks."""

    port: Port
    backend: Endpoint
    number: int = 0


class CheckHealth:
    """The verdict on one check. It starts critical: a backend nobody has asked yet is not offered."""

    def __init__(self, config: CheckConfig, now: float) -> None:
        self.verdict: Verdict = "critical"
        self.output = "not yet checked"
        self.since = now
        self.is_settled = False
        """Whether enough was asked for the verdict to be one."""
        self.config = config
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
        self.is_settled |= verdict != "critical" or self._bad >= self.config.failures_before_critical
        if verdict == self.verdict:
            return False
        if verdict == "critical":
            self._falls.append(now)
        self.verdict = verdict
        self.since = now
        return True

    def follow(self, verdict: Verdict, output: str, now: float) -> None:
        """Take over what somebody else decided of this check, by thresholds of his own."""
        self.output, self.is_settled = output, True
        if verdict != self.verdict:
            self.verdict, self.since = verdict, now

    def _next(self, outcome: Outcome, now: float) -> Verdict:
        config = self.config
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
        return is_flapping and now - self._good_since < self.config.flap_hold_s


class ServiceHealth:
    """The verdict on one service, made of the verdicts on its ports' backends.

    A port of whose backends too little is known yet leaves it as it was, so that exchanging backends is no outage.
    """

    def __init__(self, checks: Mapping[CheckKey, CheckHealth], now: float, slow_start_s: float = 0.0) -> None:
        self.checks = checks
        self.verdict: Verdict = "critical"
        self.since = now
        self._available_since = now
        self._slow_start_s = slow_start_s

    def handle(self, key: CheckKey, outcome: Outcome, now: float) -> bool:
        """Take the outcome of one check in; say whether the service's verdict changed."""
        self.checks[key].handle(outcome, now)
        return self._judge(now)

    def follow(self, key: CheckKey, verdict: Verdict, output: str, now: float) -> bool:
        """Take over somebody else's verdict on one check; say whether the service's changed."""
        self.checks[key].follow(verdict, output, now)
        return self._judge(now)

    def part(self, is_in: Callable[[CheckKey], bool]) -> tuple[Verdict, str]:
        """Return the verdict and the output of some of the checks alone; passing when there are none."""
        checks = {key: check for key, check in self.checks.items() if is_in(key)}
        if not checks:
            return "passing", "Consul runs the checks"
        verdict = self._verdict(checks)
        return verdict, _output(checks, verdict)

    def update(self, checks: Mapping[CheckKey, CheckHealth], now: float, slow_start_s: float) -> bool:
        """Go on with other checks; say whether the service's verdict changed."""
        self.checks, self._slow_start_s = checks, slow_start_s
        return self._judge(now)

    def backend(self, port: Port, backend: Endpoint) -> Verdict:
        """Return the verdict on one backend."""
        return _worst(
            check.verdict for key, check in self.checks.items() if (key.port, key.backend) == (port, backend)
        )

    def _judge(self, now: float) -> bool:
        verdict = self._verdict(self.checks)
        if verdict == self.verdict:
            return False
        if self.verdict == "critical":
            self._available_since = now
        self.verdict = verdict
        self.since = now
        return True

    def _verdict(self, judged: Mapping[CheckKey, CheckHealth]) -> Verdict:
        ports: dict[Port, dict[Endpoint, list[CheckHealth]]] = {}
        for key, check in judged.items():
            ports.setdefault(key.port, {}).setdefault(key.backend, []).append(check)
        worst: list[Verdict] = []
        for backends in ports.values():
            settled = [checks for checks in backends.values() if all(check.is_settled for check in checks)]
            verdicts = [_worst(check.verdict for check in checks) for checks in settled]
            worst.append(min(verdicts, key=_RANK.__getitem__) if verdicts else self.verdict)
        return _worst(worst)

    def weight(self, full: int, now: float) -> int:
        """Return what to say of a configured weight now: little while critical and just after, never nothing."""
        if self._slow_start_s == 0:
            return full
        age_s = 0.0 if self.verdict == "critical" else now - self._available_since
        step = min(SLOW_START_STEPS, 1 + int(age_s / self._slow_start_s * SLOW_START_STEPS))
        return max(1, full * step // SLOW_START_STEPS)

    @property
    def output(self) -> str:
        """What the checks last said, the worst first; of a service that is not passing only those that are not."""
        return _output(self.checks, self.verdict)


def next_delay(interval_s: float, jitter: float, draw: float) -> float:
    """Return the seconds to the next check, up to `jitter` longer or shorter; `draw` is uniform in [0, 1)."""
    return interval_s * (1 - jitter + 2 * jitter * draw)


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=_RANK.__getitem__)


def _output(checks: Mapping[CheckKey, CheckHealth], verdict: Verdict) -> str:
    worst_first = sorted(checks.items(), key=lambda item: -_RANK[item[1].verdict])
    if verdict == "passing":
        return "; ".join(check.output for _, check in worst_first)
    return "; ".join(
        f"{key.port.protocol}:{key.port.port} {check.output}"
        for key, check in worst_first
        if check.verdict != "passing"
    )
