"""The virtual addresses as local ones: `ip route add local POOL dev lo`, taken back on exit or after a crash.

In mode tun they are routed to the agent's device instead, which takes the route with it whenever it goes.

What was added is written down first, in a locked file of the runtime directory: a file whose lock is free
belongs to an agent that is gone, and only a route that such a file names and that carries our mark is removed.
Binds nothing itself, and changes no route but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import IO, Any

from pyroute2 import IPRoute, NetlinkError

from sidecar.agent.tun import Tun
from ztna.config import AgentMode, Override
from ztna.conflicts import AnyNetwork
from ztna.errors import ConfigError, ZtnaError
from ztna.leases import ULA, ULA_PREFIX_BITS, is_ula
from ztna.telemetry import logger

LOOPBACK = IPv4Network("127.0.0.0/8")
ROUTE_MARK = 90
"""The routes' protocol number (rtnetlink(7), rtm_protocol), free for use in IANA's and iproute2's lists."""

_TABLE_MAIN = 254
_TABLE_LOCAL = 255
_NO_DUPLICATE_DETECTION = 0x02
"""linux/if_addr.h, IFA_F_NODAD: there is nobody else on the device."""
_NOT_UNICAST = (IPv4Network("0.0.0.0/8"), IPv4Network("224.0.0.0/3"))
_log = logger(__name__)


def check_pool(mode: AgentMode, pool: IPv4Network) -> None:
    """Raise ConfigError, naming the mode that can, when this mode cannot bind the pool's addresses."""
    if any(pool.overlaps(each) for each in _NOT_UNICAST):
        raise ConfigError(f"agent.pool: {pool} holds addresses that no mode can bind; expected unicast ones")
    if mode == "listen" and not pool.subnet_of(LOOPBACK):
        raise ConfigError(
            f"agent.pool: mode listen binds only addresses inside {LOOPBACK}, not {pool}; set agent.mode to "
            f"anyip or tun (need CAP_NET_ADMIN), or use a pool inside {LOOPBACK}"
        )
    if mode != "listen" and pool.overlaps(LOOPBACK):
        raise ConfigError(
            f"agent.pool: {pool} is local on every Linux already and must not be routed; set agent.mode to listen"
        )


def runtime_directory() -> Path:
    """Return where state lives that must not survive a reboot: systemd's choice, /run, or one of the user's."""
    given = os.environ.get("RUNTIME_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/run/ztna-mesh")
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(parent) / f"ztna-mesh-{os.geteuid()}"


def check_ula(mode: AgentMode, ula: IPv6Network) -> None:
    """Raise ConfigError when the IPv6 addresses beside the leases cannot be had in this mode."""
    if not is_ula(ula):
        raise ConfigError(f"agent.ula: expected a /{ULA_PREFIX_BITS} in {ULA} (RFC 4193), got {ula}")
    if mode == "listen":
        raise ConfigError(
            "agent.ula: mode listen binds addresses that every host has, and of IPv6 there is only ::1; set "
            "agent.mode to anyip or tun, or leave it out: programs fall back to the IPv4 address"
        )


def check_overrides(overrides: Sequence[Override]) -> None:
    """Raise ConfigError when overrides contradict each other, or name what no host can bind."""
    for key, values in (
        ("service", [each.service for each in overrides]),
        ("ip", [str(each.ip) for each in overrides]),
    ):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ConfigError(f"agent.overrides: {twice[0]} is given to two; each {key} once")
    for each in overrides:
        if any(each.ip in network for network in _NOT_UNICAST):
            raise ConfigError(f"agent.overrides: {each.ip} of {each.service} is no unicast address")


@contextlib.asynccontextmanager
async def local_route(pool: AnyNetwork, directory: Path, tun: Tun | None = None) -> AsyncIterator[None]:
    """Make every address of the pool a local one, or one behind the device, while inside.

    First takes back what agents that crashed in this network namespace left. Raises ConfigError when a route
    or address overlaps the pool, and ZtnaError when the capability is missing or another agent has the pool.
    """
    # In threads, as pyroute2's own asyncio client needs a loop that opens netlink sockets: uvloop does not.
    held = _held_route(pool, directory, tun)
    await asyncio.to_thread(held.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(held.__exit__, None, None, None)


@contextlib.contextmanager
def _held_route(pool: AnyNetwork, directory: Path, tun: Tun | None) -> Iterator[None]:
    _make(directory)
    with _record(pool, directory) as record:
        if record is None:
            raise ZtnaError(
                f"agent.pool: another agent on this host already has {pool}; give each its own pool"
            )
        with IPRoute() as netlink:
            _clean_up(netlink, directory, record)
            try:
                _refuse_conflicts(netlink, pool)
                _write(record, str(pool))
                if tun is None:
                    _add(netlink, pool, _route(netlink, pool))
                else:
                    _add_to_device(netlink, pool, tun)
            except ZtnaError:
                _discard(record)
                raise
        _log.info("route_added", pool=str(pool))
        try:
            yield
        finally:
            with IPRoute() as netlink:
                if tun is None:
                    _remove(netlink, pool, _route(netlink, pool))
                else:
                    _remove(netlink, pool, _tun_route(pool, tun))
                    netlink.addr("del", **_tun_address(pool, tun))
            _discard(record)
            _log.info("route_removed", pool=str(pool))


def _clean_up(netlink: IPRoute, directory: Path, own: IO[str]) -> None:
    """Remove the routes of agents that died here; a lock that is held means its agent lives."""
    _remove_recorded(netlink, own)
    for path in _recorded(directory, own):
        with _locked(path) as record:
            if record is not None:
                _remove_recorded(netlink, record)
                _discard(record)


def _remove_recorded(netlink: IPRoute, record: IO[str]) -> None:
    record.seek(0)
    text = record.read().strip()
    if not text:
        return
    try:
        pool = ip_network(text)
    except ValueError:
        # Torn by a crash while it was written, so its route was never added.
        return
    if _remove(netlink, pool, _route(netlink, pool)):
        _log.warning("route_of_crashed_agent_removed", pool=text)


def _refuse_conflicts(netlink: IPRoute, pool: AnyNetwork) -> None:
    for route in netlink.get_routes(family=_family(pool)):
        if route["dst_len"] == 0:
            continue
        network = ip_network((route.get("dst"), route["dst_len"]), strict=False)
        if network.overlaps(pool):
            where = "local table" if route["table"] == _TABLE_LOCAL else f"table {route['table']}"
            raise ConfigError(
                f"agent.pool: {pool} overlaps {network}, which this host already routes ({where}); "
                "choose another pool for dnsd and its agents, or remove that route"
            )


def _add(netlink: IPRoute, pool: AnyNetwork, route: dict[str, Any]) -> None:
    try:
        netlink.route("add", **route)
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise ZtnaError(
                "agent.mode: anyip needs CAP_NET_ADMIN to add a local route; grant it (root, or "
                f"AmbientCapabilities=), or use mode listen with a pool inside {LOOPBACK}"
            ) from None
        raise ZtnaError(f"agent.pool: route for {pool}: {os.strerror(error.code)}") from None


def _remove(netlink: IPRoute, pool: AnyNetwork, route: dict[str, Any]) -> bool:
    """Remove the route if it is there with our mark; say whether it was."""
    try:
        netlink.route("del", **route)
    except NetlinkError as error:
        if error.code in (errno.ESRCH, errno.ENOENT):
            return False
        raise ZtnaError(f"agent.pool: taking back the route for {pool}: {os.strerror(error.code)}") from None
    return True


def _route(netlink: IPRoute, pool: AnyNetwork) -> dict[str, Any]:
    """Describe the route whole: the kernel deletes only one that matches every field given."""
    return {
        "family": _family(pool),
        "dst": str(pool),
        "oif": (netlink.link_lookup(ifname="lo"))[0],
        "table": _TABLE_LOCAL,
        "type": "local",
        # IPv6 routes have no scope (rtnetlink(7)): they are all global.
        "scope": "host" if pool.version == 4 else "universe",
        "proto": ROUTE_MARK,
    }


def _tun_route(pool: AnyNetwork, tun: Tun) -> dict[str, Any]:
    """Describe the route to the device; programs send from the network's own address, which is never leased."""
    return {
        "family": _family(pool),
        "dst": str(pool),
        "oif": tun.index,
        "table": _TABLE_MAIN,
        "prefsrc": str(pool.network_address),
        "proto": ROUTE_MARK,
    }


def _add_to_device(netlink: IPRoute, pool: AnyNetwork, tun: Tun) -> None:
    address = _tun_address(pool, tun)
    try:
        netlink.addr("add", **address)
    except NetlinkError as error:
        raise ZtnaError(
            f"agent.pool: address {pool.network_address} on {tun.name}: {os.strerror(error.code)}"
        ) from None
    try:
        _add(netlink, pool, _tun_route(pool, tun))
    except ZtnaError:
        netlink.addr("del", **address)
        raise


def _tun_address(pool: AnyNetwork, tun: Tun) -> dict[str, Any]:
    return {
        "index": tun.index,
        "family": _family(pool),
        "address": str(pool.network_address),
        "prefixlen": pool.max_prefixlen,
        "flags": _NO_DUPLICATE_DETECTION if pool.version == 6 else 0,
    }


def _family(pool: AnyNetwork) -> socket.AddressFamily:
    return socket.AF_INET if pool.version == 4 else socket.AF_INET6


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ZtnaError(f"runtime directory {directory}: {error.strerror}") from None


def _file_name(pool: str) -> str:
    """Name a record by network namespace too: containers may share the directory and not the routes."""
    namespace = Path("/proc/self/ns/net").stat().st_ino
    return f"anyip-{namespace}-{pool.replace('/', '_')}"


@contextlib.contextmanager
def _record(pool: AnyNetwork, directory: Path) -> Iterator[IO[str] | None]:
    path = directory / _file_name(str(pool))
    path.touch(mode=0o600)
    with _locked(path) as record:
        yield record


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str] | None]:
    """Open and lock a file; None when it has gone or somebody else holds its lock."""
    try:
        record = path.open("r+", encoding="ascii", errors="replace")
    except FileNotFoundError:
        yield None
        return
    with record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield record


def _recorded(directory: Path, own: IO[str]) -> list[Path]:
    return [path for path in directory.glob(_file_name("*")) if str(path) != own.name]


def _discard(record: IO[str]) -> None:
    Path(record.name).unlink(missing_ok=True)


def _write(record: IO[str], text: str) -> None:
    record.seek(0)
    record.truncate()
    record.write(text + "\n")
    record.flush()
    os.fsync(record.fileno())
