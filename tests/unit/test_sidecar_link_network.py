"""sidecar.link.network: what is read of this host, and when its owner hears of a change.

That the kernel's own events are followed tests/faults/test_network_change.py proves.
"""

import asyncio
import contextlib
import socket
from ipaddress import ip_address

import pytest
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from sidecar.link import network as module
from sidecar.link.network import Network, Observed, Standing, standing

DEADLINE_SECONDS = 10
HERE = Standing(("2600::1", "192.0.2.7"), frozenset({"2600::1", "192.0.2.7", "2600::2"}))
THERE = Standing(("192.0.2.8",), frozenset({"192.0.2.8"}))


async def test_this_host_as_the_kernel_tells_it() -> None:
    found = await asyncio.to_thread(standing)
    addresses = [ip_address(each) for each in found.addresses]
    assert not [each for each in addresses if each.is_loopback or each.is_link_local]
    versions = [each.version for each in addresses]
    both = 2 * min(versions.count(4), versions.count(6))
    assert versions[:both] == [6, 4] * (both // 2), (
        "neither family keeps the other out of the few that are told"
    )
    assert set(found.addresses) <= found.held
    assert {family for family, _, _ in found.defaults} <= {socket.AF_INET, socket.AF_INET6}


async def test_only_what_is_another_than_before_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter([HERE, HERE, THERE])
    looks = asyncio.Queue[Standing]()
    loop = asyncio.get_running_loop()

    def look() -> Standing:
        found = next(read)
        loop.call_soon_threadsafe(looks.put_nowait, found)
        return found

    monkeypatch.setattr(module, "standing", look)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    changes = asyncio.Queue[tuple[str, ...]]()
    network = Network(lambda: changes.put_nowait(network.addresses))
    running = asyncio.create_task(network.run())
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await looks.get() == HERE
        network._news.set()
        assert await looks.get() == HERE
        network._news.set()
        assert await changes.get() == THERE.addresses
    assert changes.empty(), "the second look saw nothing new"
    assert network.held == THERE.held
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_what_could_not_be_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Standing | Exception] = [HERE, NetlinkDumpInterrupted(), OSError("no memory"), THERE]

    def look() -> Standing:
        found = read.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(module, "standing", look)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    changes = asyncio.Queue[tuple[str, ...]]()
    network = Network(lambda: changes.put_nowait(network.addresses))
    network._news.set()
    running = asyncio.create_task(network.run())
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await changes.get() == THERE.addresses
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_host_that_lets_nobody_listen_has_no_addresses_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(module.socket, "socket", forbidden)
    network = Network(lambda: None)
    await network.run()
    assert network.addresses == ()


def test_a_relay_that_sees_another_address_on_one_connection_tells_of_a_move() -> None:
    seen = Observed()
    first, second = ("relay-1", 1), ("relay-1", 2)
    assert not seen.has_moved(first, None)
    assert not seen.has_moved(first, ("192.0.2.1", 1000))
    assert not seen.has_moved(("relay-2", 1), ("192.0.2.1", 1001)), "another relay, another socket"
    assert not seen.has_moved(first, ("192.0.2.1", 1000))
    assert seen.has_moved(first, ("192.0.2.1", 1002))
    assert seen.has_moved(first, ("192.0.2.2", 1002))
    assert not seen.has_moved(second, ("192.0.2.2", 1002)), "said of the connection before"
    assert not seen.has_moved(second, ("192.0.2.2", 1003)), "a connection has a port of its own"
    assert seen.has_moved(("relay-1", 3), ("192.0.2.3", 1004))


async def test_what_a_relay_sees_is_told_as_a_change() -> None:
    changes: list[int] = []
    network = Network(lambda: changes.append(1))
    network.observed(("relay-1", 1), ("192.0.2.1", 1000))
    assert not changes
    network.observed(("relay-1", 1), ("192.0.2.2", 1000))
    assert changes == [1]
