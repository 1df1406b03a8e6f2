"""dnsd.secondaries on real sockets: what is published when, and who is told how often."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

import dnsd.secondaries
from dnsd.secondaries import Secondaries
from dnsd.transfer import Request
from dnsd.zone import ZoneData, rebuilt
from tests.support.dns import SETTINGS, lease
from ztna import notify, tsig
from ztna.config import Endpoint, NotifyConfig, TransferConfig
from ztna.dns import Code
from ztna.errors import ConfigError
from ztna.tsig import Key

KEY = Key("edge.ztna", "hmac-sha256", b"k" * 32)
KEYS = {KEY.name: KEY}
CONFIRMED = 1_700_000_000.0


def listening(*targets: tuple[Endpoint, str | None]) -> Secondaries:
    notified = tuple(NotifyConfig(address=address, key=key) for address, key in targets)
    return Secondaries(TransferConfig(notify=notified), KEYS)


@asynccontextmanager
async def running(secondaries: Secondaries, served: list[ZoneData]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(secondaries.run(served.append))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def secondary() -> Iterator[tuple[socket.socket, Endpoint]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        yield sock, Endpoint(*sock.getsockname())


async def heard(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(5):
        data, source = await asyncio.get_running_loop().sock_recvfrom(sock, 4096)
    return data, source


def first() -> ZoneData:
    return ZoneData(SETTINGS, {}, {}, int(time.time()) - 100)


async def test_each_zone_that_changed_is_told_until_it_is_answered() -> None:
    with secondary() as (sock, address):
        secondaries = listening((address, "Edge.ztna"))
        async with running(secondaries, []):
            zone = secondaries.numbered(first(), CONFIRMED)
            told = set()
            for _ in zone.apexes:
                data, source = await heard(sock)
                received = tsig.receive(data, KEYS, time.time())
                assert received.exchange is not None
                told.add(notify.zone_of(received.body))
                sock.sendto(b"garbage", source)
                answer = notify.answer(received.body, Code.NOERROR)
                sock.sendto(received.exchange.sign(answer, time.time()), source)
            assert told == {"ztna.local", "100.10.in-addr.arpa"}
            async with asyncio.timeout(5):
                while len(secondaries._targets[0].told) < 2:
                    await asyncio.sleep(0.01)
        notified = secondaries.status()["notified"]
        assert notified == {str(address): dict.fromkeys(told, zone.serial)}


async def test_a_secondary_that_refuses_or_lies_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.secondaries, "ATTEMPT_SECONDS", (0.05, 0.05))
    with secondary() as (sock, address):
        secondaries = listening((address, None))
        async with running(secondaries, []):
            secondaries.numbered(first(), CONFIRMED)
            data, source = await heard(sock)
            sock.sendto(notify.answer(data, Code.REFUSED), source)
            async with asyncio.timeout(5):
                while not secondaries._targets[0].problem:
                    await asyncio.sleep(0.01)
            assert "answered with code 5" in str(secondaries.status())
            # It says nothing to the next one at all.
            async with asyncio.timeout(5):
                while "no answer" not in secondaries._targets[0].problem:
                    await asyncio.sleep(0.01)


async def test_a_second_change_is_served_at_once_and_published_a_second_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dnsd.secondaries, "PUBLISH_SECONDS", 0.2)
    secondaries = Secondaries(TransferConfig(), KEYS)
    served: list[ZoneData] = []
    async with running(secondaries, served):
        one = secondaries.numbered(first(), CONFIRMED)
        assert secondaries.publication.zone is one and one.fresh_at == int(CONFIRMED)
        assert secondaries.numbered(one, CONFIRMED) is one
        two = secondaries.numbered(rebuilt(one, {}, {"web": lease("10.100.1.2")}, time.time()), CONFIRMED)
        assert two.serial == one.serial and two.leases and secondaries.publication.zone is one
        assert two.follows == one.serial and secondaries.numbered(two, CONFIRMED) is two
        async with asyncio.timeout(5):
            while not served:
                await asyncio.sleep(0.01)
        assert served[0].serial > one.serial and served[0].leases == two.leases
        assert secondaries.publication.zone is served[0] and served[0].follows == two.serial
        monkeypatch.setattr(dnsd.secondaries, "PUBLISH_SECONDS", 0.0)
        three = secondaries.numbered(rebuilt(served[0], {}, {}, time.time()), CONFIRMED + 1)
        assert secondaries.publication.zone is three and three.serial > served[0].serial
        request = Request(1, 0, b"\x04ztna\x05local\0\0\xfb\0\1", ("ztna", "local"), one.serial)
        assert not isinstance(secondaries.publication.answer(request, over_tcp=True), Code)


def test_freshness_is_published_each_minute_and_nothing_when_withdrawn() -> None:
    secondaries = Secondaries(TransferConfig(), KEYS)
    assert not secondaries.is_due(CONFIRMED)
    zone = secondaries.numbered(first(), CONFIRMED)
    assert not secondaries.is_due(CONFIRMED + 59) and secondaries.is_due(CONFIRMED + 60)
    fresh = secondaries.freshened(CONFIRMED + 60)
    assert fresh.serial > zone.serial and fresh.fresh_at == int(CONFIRMED) + 60
    secondaries.withdraw()
    assert secondaries.publication.zone is None and secondaries.status()["serial"] is None


def test_where_nobody_may_transfer_nothing_is_kept() -> None:
    secondaries = Secondaries(TransferConfig(), {})
    zone = first()
    assert secondaries.numbered(zone, CONFIRMED) is zone and secondaries.publication.zone is None


@pytest.mark.parametrize(
    ("address", "key", "told"),
    [("dns.example", None, "numeric IPv4"), ("127.0.0.1", "other", "no key named other")],
)
def test_a_target_that_cannot_be_told_is_named(address: str, key: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"dnsd.transfer.notify\[0\]\..*{told}"):
        listening((Endpoint(address, 53), key))
