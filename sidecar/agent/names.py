"""Asks DNS through the relays: the nearest first, another one when it does not answer.

Knows no name; what may be asked is the relay's to say. Source: protocol.md, Control stream; design.md 6.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable

from sidecar.agent.relays import Relays
from ztna.dns import Code, Message, Type, decode, encode_query
from ztna.errors import ProtocolError, ResolverUnavailable
from ztna.jsontypes import Binary
from ztna.telemetry import dropped
from ztna.wire.control import DNS_RESPONSE_BYTES_MAX, DnsQuery, DnsResponse

RELAY_SECONDS = 2.0
QUESTIONS_MAX = 64
"""As many as a relay answers one agent at once."""
_WHERE = "agent_names"


class RelayedNames:
    """Questions of this agent that relays put to their resolvers."""

    def __init__(self, relays: Relays, send: Callable[[str, DnsQuery], bool]) -> None:
        """`relays` are only read; `send` puts a query on a relay's control connection, False when it takes none."""
        self._relays = relays
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[tuple[str, int], asyncio.Future[bytes]] = {}
        self._slots = asyncio.Semaphore(QUESTIONS_MAX)

    def received(self, relay: str, response: DnsResponse) -> None:
        """Give a response to whoever asked that relay for it."""
        waiting = self._waiting.get((relay, response.request))
        if waiting is None or waiting.done():
            dropped(_WHERE, "unexpected")
            return
        waiting.set_result(bytes(response.message))

    async def exchange(self, query: bytes) -> bytes:
        """Return the response to a DNS query, which has the query's id. Raises ResolverUnavailable."""
        tried: list[str] = []
        async with self._slots:
            while (relay := self._relays.choose(tried)) is not None:
                tried.append(relay)
                response = await self._ask(relay, query)
                if response is not None:
                    return response
        raise ResolverUnavailable(
            f"no relay answers questions about names: {', '.join(tried) or 'none is connected'}"
        )

    async def ask(self, name: str, kind: Type) -> Message:
        """Return the response to a question. Raises ResolverUnavailable, also for one that is no use."""
        message_id = secrets.randbits(16)
        try:
            query = encode_query(message_id, name, kind, DNS_RESPONSE_BYTES_MAX)
            message = decode(await self.exchange(query))
        except ProtocolError as error:
            raise ResolverUnavailable(f"{kind.name} of {name}: {error}") from None
        asked = [(question.name, question.type) for question in message.questions]
        if not message.is_response or message.id != message_id or asked != [(name.lower(), kind)]:
            raise ResolverUnavailable(f"{kind.name} of {name}: an answer to another question")
        if message.code not in (Code.NOERROR, Code.NXDOMAIN, Code.REFUSED):
            raise ResolverUnavailable(f"{kind.name} of {name}: answered with code {message.code}")
        return message

    async def _ask(self, relay: str, query: bytes) -> bytes | None:
        key = (relay, next(self._numbers))
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[key] = waiting
        try:
            if not self._send(relay, DnsQuery(key[1], Binary(query))):
                return None
            async with asyncio.timeout(RELAY_SECONDS):
                return await waiting
        except TimeoutError:
            dropped(_WHERE, "no_answer")
            return None
        finally:
            del self._waiting[key]
