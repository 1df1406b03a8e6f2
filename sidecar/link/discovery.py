"""Find relays by DNS: SRV records of `_ztna-relay._udp.<domain>`, asked for again before their TTL ends.

The first label of a record's target is the relay's name, which its certificate must carry: whoever answers DNS can
hide relays, and point to hosts that cannot prove to be one. What becomes of those that are found is the owner's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Protocol

from ztna.config import Endpoint, RelayTarget
from ztna.errors import BadName, ResolverUnavailable
from ztna.names import RelayName, Zone
from ztna.resolver import SrvAnswer, SrvRecord
from ztna.telemetry import dropped, logger

RELAYS_MAX = 8
REFRESH_PART_MIN, REFRESH_PART_MAX = 0.6, 0.9
"""When in its TTL an answer is asked for again."""
REFRESH_SECONDS_MIN = 1.0
REFRESH_SECONDS_MAX = 300.0
FAILURE_SECONDS_MIN = 0.5
FAILURE_SECONDS_MAX = 10.0

_log = logger(__name__)


class Asker(Protocol):
    """What is needed of ztna.resolver.Resolver."""

    async def srv(self, name: str) -> SrvAnswer:
        """Return the SRV records of a name. Raises ResolverUnavailable."""


async def follow_relays(
    resolver: Asker, domain: Zone, found: Callable[[tuple[RelayTarget, ...]], None]
) -> None:
    """Call `found` with all relays after each good answer, until cancelled; while none comes the last one holds."""
    failures = 0
    while True:
        try:
            answer = await resolver.srv(f"_ztna-relay._udp.{domain}")
        except ResolverUnavailable as error:
            if not failures:
                _log.warning("relays_not_found", error=error)
            failures += 1
            longest = min(FAILURE_SECONDS_MAX, FAILURE_SECONDS_MIN * 2.0 ** min(failures, 8))
            await asyncio.sleep(random.uniform(FAILURE_SECONDS_MIN, longest))
            continue
        failures = 0
        if not answer.stale:
            found(targets_of(answer.records))
        ttl_s = answer.ttl_s * random.uniform(REFRESH_PART_MIN, REFRESH_PART_MAX)
        await asyncio.sleep(min(REFRESH_SECONDS_MAX, max(REFRESH_SECONDS_MIN, ttl_s)))


def targets_of(records: Iterable[SrvRecord]) -> tuple[RelayTarget, ...]:
    """Return the relays that SRV records name, by priority, at most RELAYS_MAX."""
    targets = []
    for record in sorted(records, key=lambda record: (record.priority, -record.weight, record.target)):
        try:
            name = RelayName(record.target.partition(".")[0].lower())
        except BadName:
            dropped("relay_discovery", "bad_name")
            continue
        host = record.addresses[0] if record.addresses else record.target
        targets.append(RelayTarget(name=name, address=Endpoint(host, record.port)))
    if len(targets) > RELAYS_MAX:
        dropped("relay_discovery", "too_many", len(targets) - RELAYS_MAX)
    return tuple(dict.fromkeys(targets))[:RELAYS_MAX]
