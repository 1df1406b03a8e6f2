"""Keeps secondaries and relays up to date: when a new state of the zone is published, and who is told.

A change is published at once, or as soon as the last serial is a second old. What is transferred is
dnsd.transfer's, and who may ask for it dnsd.server's.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from dnsd.transfer import FRESH_SECONDS, PUBLISH_SECONDS, Publication
from dnsd.zone import Labels, ZoneData
from ztna import notify, tsig
from ztna.config import Endpoint, TransferConfig
from ztna.errors import ConfigError, ProtocolError
from ztna.telemetry import NOTIFIES, logger
from ztna.tsig import Key

ATTEMPT_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""How long each NOTIFY is waited for; then the secondary is left to its refresh (RFC 1996 3.6)."""
PACKET_BYTES_MAX = 4096

_log = logger(__name__)


@dataclass(eq=False)
class _Target:
    """One who is told, and what there is to tell."""

    address: Endpoint
    key: Key | None
    serials: dict[Labels, int] = field(default_factory=dict)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    told: dict[str, int] = field(default_factory=dict)
    """Zone -> the last serial it confirmed having heard of."""
    problem: str = ""


class Secondaries:
    """Publishes the zone and tells of it."""

    def __init__(self, config: TransferConfig, keys: Mapping[str, Key]) -> None:
        """Take what is configured; nobody is told of a state before `served` returns.

        Raises ConfigError for a key that is not among `keys` or an address that is none.
        """
        self.publication = Publication()
        self.wanted = are_wanted(config, keys)
        self._targets = [_target(config, place, keys) for place in range(len(config.notify))]
        self._published_at = 0.0
        self._pending: ZoneData | None = None
        """What is served already, under the serial of before, and is to be published soon."""
        self._waiting = asyncio.Event()
        self.served: Callable[[], Awaitable[None]] | None = None
        """Waits until what was published last is what is answered: who is told of it asks at once."""

    def numbered(self, zone: ZoneData, confirmed_at: float) -> ZoneData:
        """Return the zone as it may be served now: under the serial that was published last, or a new one.

        Secondaries compare serials, so one that they cannot have yet is not shown. Harmless twice.
        """
        last = self.publication.zone
        if not self.wanted or zone is last or zone is self._pending:
            return zone
        if last is None or time.monotonic() - self._published_at >= PUBLISH_SECONDS:
            serial = zone.serial if last is None else max(zone.serial, _next(last))
            return self._publish(zone.under(serial, int(confirmed_at)))
        self._pending = zone.under(last.serial, last.fresh_at)
        self._waiting.set()
        return self._pending

    def withdraw(self) -> None:
        """Transfer nothing until there is a zone again."""
        self._pending = None
        self.publication.withdraw()

    def is_due(self, confirmed_at: float) -> bool:
        """Return whether secondaries have not heard for a while that the catalog is confirmed."""
        last = self.publication.zone
        return last is not None and self._pending is None and confirmed_at - last.fresh_at >= FRESH_SECONDS

    def freshened(self, confirmed_at: float) -> ZoneData:
        """Publish the zone once more, as confirmed at this time; there must be one."""
        last = self.publication.zone
        assert last is not None, "only a zone that is published can be due"
        return self._publish(last.renumbered(_next(last), int(confirmed_at)))

    async def run(self, serve: Callable[[ZoneData], None]) -> None:
        """Publish what waits, and tell everybody, until cancelled; `serve` gets each state with a new serial."""
        async with asyncio.TaskGroup() as tasks:
            for target in self._targets:
                tasks.create_task(self._tell(target), name=f"notify {target.address}")
            while True:
                await self._waiting.wait()
                self._waiting.clear()
                await asyncio.sleep(max(0.0, self._published_at + PUBLISH_SECONDS - time.monotonic()))
                last = self.publication.zone
                if self._pending is not None and last is not None:
                    serve(self._publish(self._pending.renumbered(_next(last), last.fresh_at)))

    def status(self) -> Mapping[str, object]:
        """Return what was published and who knows, for /status."""
        zone = self.publication.zone
        return {
            "serial": zone.serial if zone else None,
            "fresh_at": zone.fresh_at if zone else None,
            "notified": {
                str(target.address): {**target.told, **_problem(target)} for target in self._targets
            },
        }

    def _publish(self, zone: ZoneData) -> ZoneData:
        self._published_at = time.monotonic()
        self._pending = None
        changed = self.publication.publish(zone)
        for target in self._targets:
            target.serials.update(dict.fromkeys(changed, zone.serial))
            target.woken.set()
        return zone

    async def _tell(self, target: _Target) -> None:
        while True:
            await target.woken.wait()
            target.woken.clear()
            if self.served is not None:
                await self.served()
            serials, target.serials = target.serials, {}
            for apex, serial in serials.items():
                if apex in target.serials:
                    continue
                problem = await self._notify(target, apex, serial)
                if problem and not target.problem:
                    _log.warning("notify_failed", peer=target.address, error=problem)
                elif target.problem and not problem:
                    _log.info("notify_works", peer=target.address)
                target.problem = problem

    async def _notify(self, target: _Target, apex: Labels, serial: int) -> str:
        """Tell one of one zone; return what went wrong, empty when it answered."""
        zone = ".".join(apex)
        problem = ""
        for seconds in ATTEMPT_SECONDS:
            if apex in target.serials:
                # There is news of it already.
                return problem
            try:
                async with asyncio.timeout(seconds):
                    code = await _exchange(target, zone)
            except TimeoutError:
                problem = problem or "no answer"
            except (OSError, ProtocolError) as error:
                problem = str(error)
            else:
                if code == 0:
                    target.told[zone] = serial
                    NOTIFIES.labels("told").inc()
                    return ""
                problem = f"answered with code {code}"
                break
        NOTIFIES.labels("failed").inc()
        return f"{zone}: {problem}"


def are_wanted(config: TransferConfig, keys: Mapping[str, Key]) -> bool:
    """Say whether anybody may transfer: otherwise nothing is kept for it."""
    return bool(config.allow or config.notify or keys)


async def _exchange(target: _Target, zone: str) -> int:
    """Send one NOTIFY and return the code of its answer."""
    message_id = secrets.randbits(16)
    data = notify.encode(message_id, zone)
    exchange = None
    if target.key is not None:
        data, exchange = tsig.begin(data, target.key, time.time())
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        sock.connect((target.address.host, target.address.port))
        await loop.sock_sendall(sock, data)
        while True:
            answer = await loop.sock_recv(sock, PACKET_BYTES_MAX)
            code = notify.code(answer, message_id)
            if code is None:
                continue
            if exchange is not None:
                exchange.verify(answer, time.time())
            return code


def _next(zone: ZoneData) -> int:
    return max(zone.serial + 1, int(time.time())) & 0xFFFFFFFF


def _problem(target: _Target) -> Mapping[str, object]:
    return {"problem": target.problem} if target.problem else {}


def _target(config: TransferConfig, place: int, keys: Mapping[str, Key]) -> _Target:
    each = config.notify[place]
    where = f"dnsd.transfer.notify[{place}]"
    try:
        socket.inet_aton(each.address.host)
    except OSError:
        raise ConfigError(f"{where}.address: expected a numeric IPv4 address, got {each.address}") from None
    if each.key is None:
        return _Target(each.address, None)
    key = keys.get(each.key.lower().rstrip("."))
    if key is None:
        raise ConfigError(f"{where}.key: dnsd.keys has no key named {each.key}")
    return _Target(each.address, key)
