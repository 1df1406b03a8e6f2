"""This host's addresses, and word of each change that may matter to a path: an address, or a default route.

The kernel says that something changed (rtnetlink(7)); what, is read again then. Events come in bursts, and most mean
nothing here: containers come and go without a change of what is kept. Who has to do what is the owner's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ztna.telemetry import logger
from ztna.udp import SockAddr

SETTLE_SECONDS = 0.1
"""How long what follows a first event is waited for."""
PAUSE_SECONDS = 1.0
"""How long after one look the next one is, at the least."""
EVENTS_BYTES = 65_536
OWN_DEVICES = "ztna"
"""How the names of agents' TUN devices begin: nobody else reaches this host by what they have."""

# linux/rtnetlink.h, linux/if_addr.h
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # links, addresses and routes of IPv4 and IPv6
_ROUTE_TABLE_MAIN = 254
_UNUSABLE, _DEPRECATED = 0x08 | 0x40, 0x20  # duplicate or tentative (RFC 4862)

_log = logger(__name__)

RelayConnection = tuple[str, int]
"""A relay's name, and which connection to it."""


class Standing(NamedTuple):
    """What a host's paths depend on."""

    addresses: tuple[str, ...] = ()
    """Those of its interfaces that others may reach, none of loopback or of one link only; IPv6 and IPv4 in turn, as
    no more than the first few can be told to the other end."""
    held: frozenset[str] = frozenset()
    """These and those from which nothing new is to begin (RFC 4862, deprecated)."""
    defaults: frozenset[tuple[int, str, int]] = frozenset()
    """Its default routes: family, gateway, interface."""


class Observed:
    """Where relays see this host come from: when that changes on one connection, a NAT on the way was restarted."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[RelayConnection, SockAddr]] = {}

    def has_moved(self, connection: RelayConnection, address: SockAddr | None) -> bool:
        """Take what a relay says; return whether it says another thing than before.

        Each connection has a port of its own, so that of two connections only the hosts are compared.
        """
        before = self._seen.get(connection[0])
        if address is None or (before is not None and before[1] == address):
            return False  # what was said on the connection before may still stand
        self._seen[connection[0]] = (connection, address)
        return before is not None and (before[0] == connection or before[1][0] != address[0])


class Network:
    """Keeps `addresses` while `run` runs, and calls `changed` after each change, seen here or by a relay."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._observed = Observed()
        self._standing = Standing()
        self._news = asyncio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of this host's interfaces as they were last seen."""
        return self._standing.addresses

    @property
    def held(self) -> frozenset[str]:
        """The addresses on which what has begun may go on."""
        return self._standing.held

    def observed(self, connection: RelayConnection, address: SockAddr | None) -> None:
        """Take where a relay sees us come from on one connection to it, None while it has not said."""
        if self._observed.has_moved(connection, address):
            _log.info(
                "network_moved",
                relay=connection[0],
                seen_at=f"{address[0]}:{address[1]}" if address else None,
            )
            self._changed()

    async def run(self) -> None:
        """Read once, then again after each event, until cancelled.

        Where the kernel says nothing (a sandbox without AF_NETLINK) there are no addresses, and only relays tell.
        """
        loop = asyncio.get_running_loop()
        try:
            events = _events()
        except OSError as error:
            _log.warning("network_unwatched", detail=error)
            return
        with events:
            # Before the first look, so that nothing is missed between.
            loop.add_reader(events.fileno(), self._heard, events)
            try:
                self._standing = await self._read()
                while True:
                    await self._news.wait()
                    await asyncio.sleep(SETTLE_SECONDS)
                    self._news.clear()
                    await self._look()
                    await asyncio.sleep(PAUSE_SECONDS)
            finally:
                loop.remove_reader(events.fileno())

    async def _look(self) -> None:
        before, self._standing = self._standing, await self._read()
        if self._standing != before:
            _log.info("network_changed", addresses=list(self.addresses))
            self._changed()

    async def _read(self) -> Standing:
        """Return what stands; what stood, to be read again, when it changed as it was read."""
        try:
            return await asyncio.to_thread(standing)
        except (NetlinkError, OSError) as error:
            _log.debug("network_not_read", detail=error)
            self._news.set()
            return self._standing

    def _heard(self, events: socket.socket) -> None:
        # What was said does not matter, nor that there was too much of it (ENOBUFS).
        with suppress(OSError):
            while events.recv(EVENTS_BYTES):
                pass
        self._news.set()


def _events() -> socket.socket:
    """Return a socket that can be read whenever something changed. Raises OSError."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        events.setblocking(False)
        events.bind((0, _GROUPS))
    except OSError:
        events.close()
        raise
    return events


def standing() -> Standing:
    """Return what this host's paths depend on now. Not for a running loop's thread, as pyroute2 has its own."""
    with IPRoute() as netlink:
        found: dict[int, list[str]] = {6: [], 4: []}
        held = set()
        own_devices = {
            link["index"]
            for link in netlink.get_links()
            if link.get_attr("IFLA_IFNAME").startswith(OWN_DEVICES)
        }
        for each in netlink.get_addr():
            flags = each.get_attr("IFA_FLAGS") or each["flags"]
            own = ip_address(each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS"))
            if flags & _UNUSABLE or own.is_loopback or own.is_link_local or each["index"] in own_devices:
                continue
            held.add(str(own))
            if not flags & _DEPRECATED:
                found[own.version].append(str(own))
        defaults = frozenset(
            (each["family"], each.get_attr("RTA_GATEWAY") or "", each.get_attr("RTA_OIF") or 0)
            for each in netlink.get_routes(table=_ROUTE_TABLE_MAIN)
            if each["dst_len"] == 0 and each["family"] in (socket.AF_INET, socket.AF_INET6)
        )
    in_turn = chain.from_iterable(zip_longest(sorted(found[6]), sorted(found[4])))
    return Standing(tuple(each for each in in_turn if each is not None), frozenset(held), defaults)
