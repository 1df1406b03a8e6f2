"""What dnsd and a worker of it say to each other, and how the worker's copy of the zone follows dnsd's.

Pure. A worker is told everything once, then only what changed since what it was told last; a state that it has
no time for is left out. Answers from the copy are those from the original.

    dnsd -> worker:  Setup, then again and again Entries ... State, and once Listen with the sockets
    worker -> dnsd:  Report each second, and Connection with the socket of who wants a transfer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import msgspec

from dnsd.answer import Options
from dnsd.services import Service, describe
from dnsd.serving import Age
from dnsd.snapshot import Entry
from dnsd.zone import Settings, ZoneData, differing
from ztna.config import DnsdConfig, LogConfig
from ztna.errors import ProtocolError
from ztna.jsontypes import decode_hook, decoding, to_json
from ztna.leases import Lease
from ztna.tsig import Key

ENTRIES_BYTES = 65_536
"""Entries are sent in messages of about this size, between which the worker answers."""

Counts = Mapping[str, float]
"""A series of a metric as its name and the values of its labels, tab-separated, and its value."""

T = TypeVar("T")


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """What does not change while a worker lives; the options' `bounds` come with the first State."""

    config: DnsdConfig
    log: LogConfig
    keys: Mapping[str, Key]
    options: Options


class Entries(msgspec.Struct, frozen=True, tag="entries"):
    """Services that are there or changed, and names that are gone; in force with the next State."""

    entries: tuple[Entry, ...] = ()
    gone: tuple[str, ...] = ()


class State(msgspec.Struct, frozen=True, tag="state"):
    """All that was sent before is the zone now; with `settings` nothing of what was before that counts."""

    serial: int
    fresh_at: int
    age: Age
    settings: Settings | None = None


class Listen(msgspec.Struct, frozen=True, tag="listen"):
    """Answer on the two sockets that come with this: UDP, then TCP."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """How a worker is: what it counted so far, for /metrics, and what /status shows."""

    counts: Counts
    status: Mapping[str, int]


class Connection(msgspec.Struct, frozen=True, tag="connection"):
    """Go on with the connection that comes with this: whose it is, and what was read of it but not answered."""

    host: str
    received: bytes


class _RawEntries(msgspec.Struct, frozen=True, tag="entries"):
    """Entries before they are put together: each is made into bytes once."""

    entries: list[msgspec.Raw]
    gone: list[str]


ToWorker = Setup | Entries | State | Listen
FromWorker = Report | Connection

_TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker, dec_hook=decode_hook)
_FROM_WORKER: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker, dec_hook=decode_hook)


def encode(message: ToWorker | FromWorker) -> bytes:
    """Return a message as bytes."""
    return to_json(message)


def decode_to_worker(data: bytes) -> ToWorker:
    """Read what a worker is told. Raises ProtocolError."""
    return decoding(_TO_WORKER, data)


def decode_from_worker(data: bytes) -> FromWorker:
    """Read what a worker tells. Raises ProtocolError."""
    return decoding(_FROM_WORKER, data)


def update(told: ZoneData | None, zone: ZoneData, age: Age) -> Iterator[bytes]:
    """Yield the messages that lead a worker from what it was `told` to the zone; to None nothing was told."""
    is_new = told is None or told.settings != zone.settings
    services, leases = ({}, {}) if told is None or is_new else (told.services, told.leases)
    changed = differing(services, zone.services) | differing(leases, zone.leases)
    gone = [name for name in sorted(changed) if name not in zone.services and name not in zone.leases]
    if gone:
        yield encode(Entries(gone=tuple(gone)))
    pending: list[msgspec.Raw] = []
    size = 0
    for name in sorted(changed.difference(gone)):
        service = zone.services.get(name)
        line = to_json(Entry(name, service.instances if service else (), zone.leases.get(name)))
        pending.append(msgspec.Raw(line))
        size += len(line)
        if size >= ENTRIES_BYTES:
            yield to_json(_RawEntries(pending, []))
            pending, size = [], 0
    if pending:
        yield to_json(_RawEntries(pending, []))
    yield encode(State(zone.serial, zone.fresh_at, age, zone.settings if is_new else None))


class Copy:
    """A worker's copy of the zone; `zone` is None until the first State."""

    def __init__(self) -> None:
        self.zone: ZoneData | None = None
        self._services: dict[str, Service | None] = {}
        self._leases: dict[str, Lease | None] = {}

    def learn(self, message: Entries) -> None:
        """Take what the next State puts in force."""
        for entry in message.entries:
            self._services[entry.name] = describe(entry.name, entry.instances) if entry.instances else None
            self._leases[entry.name] = entry.lease
        for name in message.gone:
            self._services[name] = self._leases[name] = None

    def follow(self, state: State) -> ZoneData:
        """Return the zone as it is now: the very one of before when nothing changed. Raises ProtocolError."""
        zone = self.zone
        if state.settings is not None:
            services, leases = _merged({}, self._services), _merged({}, self._leases)
            zone = ZoneData(state.settings, services, leases, state.serial, state.fresh_at)
        elif zone is None:
            raise ProtocolError("a first state without settings")
        elif self._services:
            services, leases = _merged(zone.services, self._services), _merged(zone.leases, self._leases)
            zone = zone.followed_by(services, leases, state.serial, set(self._services))
            zone = zone.under(state.serial, state.fresh_at)
        elif (zone.serial, zone.fresh_at) != (state.serial, state.fresh_at):
            zone = zone.renumbered(state.serial, state.fresh_at)
        self.zone = zone
        self._services, self._leases = {}, {}
        return zone


def _merged(before: Mapping[str, T], changed: Mapping[str, T | None]) -> Mapping[str, T]:
    """Return a table with what changed in it, None for what is gone."""
    after = dict(before)
    for name, value in changed.items():
        if value is None:
            after.pop(name, None)
        else:
            after[name] = value
    return after
