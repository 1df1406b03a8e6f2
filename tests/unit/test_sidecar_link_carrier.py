"""sidecar.link.carrier: which carriers a change of the network, or a dead way, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import cast

import pytest

from sidecar.link.carrier import ByteStream, FrameStream
from tests.support.identities import identity
from ztna.reasons import Reason
from ztna.stall import LOOK_SECONDS, STALL_SECONDS
from ztna.tls_tcp import Delivery

OWN, OTHER = "192.0.2.1", "192.0.2.2"


class Connection:
    """A byte stream on which nothing ever comes."""

    identity = identity("connector")
    peer_address = ("192.0.2.9", 4435)
    is_ended = is_given_up = is_closed = False

    def __init__(self, own: str = OWN) -> None:
        self.own_address = (own, 40_000)
        self.unacknowledged = 0
        self.silence_s = 0.0
        self.accepts = True

    def start(self, *_: object) -> None:
        pass

    def delivery(self) -> Delivery:
        if self.is_closed:
            raise OSError("closed")
        return Delivery(self.unacknowledged, self.silence_s, 0.01)

    def give_up(self) -> None:
        self.is_given_up = True

    def write(self, data: memoryview) -> int:
        self.unacknowledged += 1
        return len(data) if self.accepts else 0

    def close(self) -> None:
        self.is_closed = True


class Ground:
    """A frame stream on such a connection, and why it ended."""

    def __init__(self, own: str = OWN) -> None:
        self.connection = Connection(own)
        self.ended: list[Reason] = []
        self.frames = FrameStream(cast(ByteStream, self.connection), lambda frame: None, self.ended.append)
        self.frames.start()


@pytest.mark.parametrize(
    ("own", "held", "ended"),
    [
        (OWN, (OWN, OTHER), []),
        (OWN, (OTHER,), [Reason.PEER_GONE]),
        (OWN, (), []),
        ("127.0.0.1", (OTHER,), []),
    ],
    ids=["its address is held", "it is gone", "nobody knows the addresses", "loopback"],
)
async def test_a_carrier_ends_with_its_address(own: str, held: Collection[str], ended: list[Reason]) -> None:
    """Where netlink cannot be had no address is known, and a relay may say that we moved all the same."""
    ground = Ground(own)
    ground.frames.network_changed(held)
    assert ground.ended == ended


async def test_a_dead_way_ends_a_carrier_and_is_remembered() -> None:
    ground = Ground()
    now = asyncio.get_running_loop().time()
    ground.frames.send(b"x")
    while not ground.ended:
        now += LOOK_SECONDS
        ground.connection.silence_s += LOOK_SECONDS
        assert ground.connection.silence_s <= STALL_SECONDS + 2 * LOOK_SECONDS
        ground.frames.look(now)
    assert ground.ended == [Reason.PEER_GONE]
    assert ground.connection.is_given_up
    ground.frames.look(now + LOOK_SECONDS)
    assert ground.ended == [Reason.PEER_GONE]


async def test_a_way_that_dies_under_a_long_write_is_noticed() -> None:
    """OpenSSL has sent some of its records, and tells nothing of them."""
    ground = Ground()
    now = asyncio.get_running_loop().time()
    ground.frames.look(now)
    ground.connection.accepts = False
    assert not ground.frames.send_data(memoryview(bytes(100)))
    looks = int(STALL_SECONDS / LOOK_SECONDS) + 2
    for count in range(1, looks + 1):
        ground.connection.silence_s = count * LOOK_SECONDS
        ground.frames.look(now + count * LOOK_SECONDS)
    assert ground.ended == [Reason.PEER_GONE]


async def test_a_connection_that_is_closed_says_nothing_of_its_way() -> None:
    ground = Ground()
    ground.frames.send(b"x")
    ground.connection.close()
    ground.frames.look(asyncio.get_running_loop().time() + 60)
    assert ground.ended == []
