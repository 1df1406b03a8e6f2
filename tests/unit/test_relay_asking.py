"""relay.asking: questions of agents on their way to DNS and back, a bounded number at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

import pytest

from relay import asking
from relay.asking import Names
from tests.support.identities import identity
from ztna.dns import Code, HostData, Message, Record, Type, decode, encode_query, encode_response
from ztna.errors import ProtocolError, ResolverUnavailable
from ztna.names import Zone
from ztna.wire.control import DNS_RESPONSE_BYTES_MAX

LAPTOP = identity("laptop", agent=["web-app"])
NAME = "web-app.ztna.local"


class Resolver:
    """Answers when it is let to; `answers` is how many addresses it has."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.answers: list[Record] = [Record(NAME, Type.A, 1, 30, IPv4Address("10.100.0.2"))]

    async def ask(self, name: str, kind: Type) -> Message:
        self.asked.append(name)
        await self.let.wait()
        if self.error is not None:
            raise self.error
        query = decode(encode_query(1, name, kind, 1232))
        return decode(encode_response(query, Code.NOERROR, self.answers))


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Names, Resolver]]:
    resolver = Resolver()
    names = Names(resolver, Zone("ztna.local"))
    running = asyncio.create_task(names.run())
    await asyncio.sleep(0)
    try:
        yield names, resolver
    finally:
        running.cancel()
        await asyncio.wait([running])


def ask(names: Names, name: str = NAME, key: int = 1, *, in_pace: bool = True) -> asyncio.Future[Message]:
    told: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    query = encode_query(7, name, Type.A, 1232)
    names.ask(key, LAPTOP, query, lambda data: told.set_result(decode(data)), in_pace=in_pace)
    return told


async def test_a_question_is_answered_and_one_that_is_not_granted_never_asked() -> None:
    async with serving() as (names, resolver):
        told = ask(names)
        assert names.under_way == 1
        resolver.let.set()
        message = await told
        assert (message.id, message.answers) == (7, tuple(resolver.answers))
        assert (await ask(names, "billing.ztna.local")).code == Code.REFUSED
        assert resolver.asked == [NAME] and names.under_way == 0
        with pytest.raises(ProtocolError):
            names.ask(1, LAPTOP, b"nonsense" * 4, lambda data: None)


async def test_what_dns_does_not_answer_or_no_frame_holds_is_a_failure() -> None:
    async with serving() as (names, resolver):
        resolver.let.set()
        resolver.error = ResolverUnavailable("away")
        assert (await ask(names)).code == Code.SERVFAIL
        resolver.error = None
        resolver.answers = [
            Record(NAME, Type.PTR, 1, 30, HostData(f"{'x' * 60}.host-{number}.ztna.local"))
            for number in range(700)
        ]
        query = decode(encode_query(1, NAME, Type.A, 1232))
        assert len(encode_response(query, Code.NOERROR, resolver.answers)) > DNS_RESPONSE_BYTES_MAX
        assert (await ask(names)).code == Code.SERVFAIL


async def test_names_of_any_bytes_are_answered_and_end_nothing() -> None:
    async with serving() as (names, resolver):
        resolver.let.set()
        strange = HostData("\\046\\255.web-app.ztna.local")
        reverse = "2.0.100.10.in-addr.arpa"
        resolver.answers = [Record(reverse, Type.PTR, 1, 30, strange)]
        assert (await ask(names, reverse)).answers == tuple(resolver.answers)
        for name, code in (("xn--\\255.web-app.ztna.local", Code.NOERROR), ("\\046\\255", Code.REFUSED)):
            told = await ask(names, name)
            assert (told.questions[0].name, told.code) == (name, code)
        assert resolver.asked == [reverse, "xn--\\255.web-app.ztna.local"]


async def test_one_agent_takes_no_more_than_its_share_and_all_no_more_than_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "QUESTIONS_PER_PEER_MAX", 2)
    monkeypatch.setattr(asking, "QUESTIONS_TOTAL_MAX", 3)
    async with serving() as (names, resolver):
        assert (await ask(names, in_pace=False)).code == Code.SERVFAIL
        waiting = [ask(names), ask(names)]
        assert (await ask(names)).code == Code.SERVFAIL, "its share is used up"
        waiting.append(ask(names, key=2))
        assert (await ask(names, key=3)).code == Code.SERVFAIL, "and so is the whole"
        resolver.let.set()
        assert [(await each).code for each in waiting] == [Code.NOERROR] * 3
        assert (await ask(names)).code == Code.NOERROR and names.under_way == 0


async def test_before_it_runs_nothing_is_asked() -> None:
    names = Names(Resolver(), Zone("ztna.local"))
    assert (await ask(names)).code == Code.SERVFAIL
