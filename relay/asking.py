"""Asks DNS for agents that reach no resolver of the mesh: one question and answer at a time, a bounded number at once.

What may be asked is decided in relay.names; how it comes and goes is the owner's (`dns_query`, `dns_response`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from relay.commands import ConnectionKey
from relay.names import Asked, answer, judge
from ztna.dns import Code, Message, Type, encode_response
from ztna.errors import ResolverUnavailable
from ztna.identity import Identity
from ztna.names import Zone
from ztna.reasons import Reason
from ztna.telemetry import dropped, refused
from ztna.wire.control import DNS_RESPONSE_BYTES_MAX

QUESTIONS_PER_PEER_MAX = 64
QUESTIONS_TOTAL_MAX = 512
WHERE = "relay_names"


class Asker(Protocol):
    """What is needed of ztna.resolver.Resolver."""

    async def ask(self, name: str, kind: Type) -> Message:
        """Return the answer to a question. Raises ResolverUnavailable."""


class Names:
    """The questions of all agents. `run` owns those that are under way."""

    def __init__(self, resolver: Asker, zone: Zone) -> None:
        self._resolver = resolver
        self._zone = zone
        self._tasks: asyncio.TaskGroup | None = None
        self._under_way: dict[ConnectionKey, int] = {}

    @property
    def under_way(self) -> int:
        """How many questions wait for DNS."""
        return sum(self._under_way.values())

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.Event().wait()

    def ask(
        self,
        key: ConnectionKey,
        identity: Identity,
        data: bytes,
        tell: Callable[[bytes], None],
        *,
        in_pace: bool = True,
    ) -> None:
        """Answer a query by `tell`, perhaps before this returns. Raises ProtocolError for what is no query."""
        judged = judge(data, self._zone, identity.may_use)
        if isinstance(judged, bytes):
            refused(WHERE, Reason.NO_GRANT)
            tell(judged)
            return
        if self._tasks is None or not in_pace or not self._has_room(key):
            refused(WHERE, Reason.LIMIT_REACHED)
            tell(encode_response(judged.query, Code.SERVFAIL))
            return
        self._under_way[key] = self._under_way.get(key, 0) + 1
        self._tasks.create_task(self._answer(key, identity, judged, tell), name=f"dns {judged.name}")

    def _has_room(self, key: ConnectionKey) -> bool:
        return self._under_way.get(key, 0) < QUESTIONS_PER_PEER_MAX and self.under_way < QUESTIONS_TOTAL_MAX

    async def _answer(
        self, key: ConnectionKey, identity: Identity, asked: Asked, tell: Callable[[bytes], None]
    ) -> None:
        try:
            found = await self._resolver.ask(asked.name, asked.kind)
            response = answer(asked, found, self._zone, identity.may_use)
            if len(response) > DNS_RESPONSE_BYTES_MAX:
                dropped(WHERE, "answer_too_large")
                response = encode_response(asked.query, Code.SERVFAIL)
            tell(response)
        except ResolverUnavailable:
            dropped(WHERE, "no_answer")
            tell(encode_response(asked.query, Code.SERVFAIL))
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]
