"""relay.notified on a real socket: who is believed, and how often the relay asks for it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import relay.notified
from relay.notified import Notified
from ztna import notify, tsig
from ztna.config import Endpoint
from ztna.errors import ProtocolError
from ztna.names import Zone
from ztna.tsig import Key

ZONE = Zone("ztna.local")
KEY = Key("relay.ztna", "hmac-sha256", b"k" * 32)
WAIT_SECONDS = 5.0


class Pulls:
    """Counts pulls and lets a test wait for them."""

    def __init__(self) -> None:
        self.count = 0
        self._arrived = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._arrived.set()

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.count < count:
                self._arrived.clear()
                await self._arrived.wait()


@contextmanager
def notified(
    pulls: Pulls, *, key: Key | None = None, sources: tuple[str, ...] = ("127.0.0.1",)
) -> Iterator[Notified]:
    heard = Notified(Endpoint("127.0.0.1", 0), ZONE, sources, key, pulls)
    try:
        yield heard
    finally:
        heard.close()


async def say(heard: Notified, *messages: bytes) -> list[bytes]:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(heard.address)
        for data in messages:
            sock.send(data)
        async with asyncio.timeout(WAIT_SECONDS):
            return [await loop.sock_recv(sock, 4096) for _ in messages]


async def test_a_notify_of_a_resolver_is_answered_and_pulls() -> None:
    pulls = Pulls()
    with notified(pulls) as heard:
        (answer,) = await say(heard, notify.encode(7, "ztna.local"))
        assert notify.code(answer, 7) == 0
        await pulls.reach(1)
        assert heard.heard == 1
        (answer,) = await say(heard, notify.encode(8, "100.10.in-addr.arpa"))
        assert notify.code(answer, 8) == 0 and (heard.heard, pulls.count) == (1, 1)


async def test_many_are_one_pull_and_one_more_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay.notified, "NOTIFY_SECONDS_MIN", 0.05)
    pulls = Pulls()
    with notified(pulls) as heard:
        await say(heard, *(notify.encode(n, "ztna.local") for n in range(20)))
        await pulls.reach(2)
        assert heard.heard == 20 and pulls.count == 2


async def test_a_stranger_is_refused_and_garbage_is_not_answered() -> None:
    pulls = Pulls()
    with notified(pulls, sources=("192.0.2.53",)) as heard:
        (answer,) = await say(heard, notify.encode(7, "ztna.local"))
        assert notify.code(answer, 7) == 5
        assert heard._answer(b"no DNS", ("127.0.0.1", 1)) is None
        assert heard._answer(answer, ("127.0.0.1", 1)) is None
        assert pulls.count == 0


async def test_with_a_key_only_signed_messages_count() -> None:
    pulls = Pulls()
    with notified(pulls, key=KEY, sources=()) as heard:
        (answer,) = await say(heard, notify.encode(7, "ztna.local"))
        assert notify.code(answer, 7) == 5 and pulls.count == 0
        forged, asker = tsig.begin(
            notify.encode(8, "ztna.local"), Key(KEY.name, KEY.algorithm, b"x" * 32), time.time()
        )
        (answer,) = await say(heard, forged)
        assert notify.code(answer, 8) == 9 and pulls.count == 0
        with pytest.raises(ProtocolError, match="BADSIG"):
            asker.verify(answer, time.time())
        signed, asker = tsig.begin(notify.encode(9, "ztna.local"), KEY, time.time())
        (answer,) = await say(heard, signed)
        assert notify.code(asker.verify(answer, time.time()), 9) == 0
        await pulls.reach(1)
