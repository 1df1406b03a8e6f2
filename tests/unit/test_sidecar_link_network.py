"""sidecar.link.network: what is read of this host, and when its owner hears of a change.

That the kernel's own events are followed tests/faults/test_network_change.py proves.
"""

import asyncio
import contextlib
import socket
from ipaddress import ip_address

import pytest

from sidecar.link import network as module
from sidecar.link.network import Network, Standing, standing

DEADLINE_SECONDS = 10
HERE = Standing(("2600::1", "192.0.2.7"), frozenset({"2600::1", "192.0.2.7", "2600::2"}))
THERE = Standing(("192.0.2.8",), frozenset({"192.0.2.8"}))


async def test_this_host_as_the_kernel_tells_it() -> None:
    found = await asyncio.to_thread(standing)
    addresses = [ip_address(each) for each in found.addresses]
    assert not [each for each in addresses if each.is_loopback or each.is_link_local]
    assert [each.version for each in addresses] == sorted((each.version for each in addresses), reverse=True)
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
