"""dnsd.channel: messages of any size and sockets, whole and in order, until the other end is closed."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

import dnsd.channel
from dnsd.channel import PACKET_BYTES, Channel, pair
from ztna.errors import ProtocolError


def ends() -> tuple[Channel, Channel]:
    here, there = pair()
    return Channel(here), Channel(there)


@pytest.mark.parametrize("size", [0, 1, PACKET_BYTES, PACKET_BYTES + 1, 5_000_000])
async def test_a_message_arrives_whole(size: int) -> None:
    here, there = ends()
    message = os.urandom(size)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(here.send(message))
        assert await there.receive() == (message, [])
    here.close()
    there.close()


async def test_messages_sent_at_once_do_not_mix() -> None:
    here, there = ends()
    messages = [bytes((n,)) * 300_000 for n in range(8)]
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for each in messages:
            tasks.create_task(here.send(each))
        got = [await there.receive() for _ in messages]
    assert got == [(each, []) for each in messages]
    here.close()
    there.close()


async def test_sockets_come_with_their_message_and_are_the_same() -> None:
    here, there = ends()
    left, right = socket.socketpair()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(here.send(b"x" * (PACKET_BYTES * 2), [left]))
        received = await there.receive()
    assert received is not None and len(received[1]) == 1
    left.close()
    (given,) = received[1]
    given.setblocking(True)
    right.sendall(b"hello")
    assert given.recv(5) == b"hello"
    assert not os.get_inheritable(given.fileno())
    for each in (given, right):
        each.close()
    here.close()
    there.close()


async def test_the_end_is_told_and_sending_fails_after_it() -> None:
    here, there = ends()
    await here.send(b"unread")
    there.close()
    async with asyncio.timeout(30):
        assert await here.receive() is None
        with pytest.raises(OSError):
            await here.send(b"more")
    here.close()


async def test_a_message_over_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.channel, "MESSAGE_BYTES_MAX", 10)
    here, there = ends()
    await here.send(bytes(11))
    with pytest.raises(ProtocolError, match="over 10 bytes"):
        await there.receive()
    here.close()
    there.close()
