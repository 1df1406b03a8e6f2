"""What an agent's admin socket answers to `trace` and `ping`: said by sidecar.agent.tracing, read by ztna.cli.reach."""

from __future__ import annotations

import msgspec

from ztna.reasons import Reason


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step: whether it went well (None: it could not be tried), in words, and how long it took, in ms."""

    step: str
    ok: bool | None
    told: str
    ms: float | None = None
    reason: Reason | None = None


class Pong(msgspec.Struct, frozen=True):
    """One round trip to a service's connector and back, in ms."""

    connector_id: str
    relay: str
    path: str
    ms: float
