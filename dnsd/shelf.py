"""The file that keeps the last names over a restart. What stands in it is dnsd.snapshot's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path

from dnsd.snapshot import (
    CONFIRMED_OFFSET,
    SNAPSHOT_BYTES_MAX,
    Snapshot,
    confirmed,
    decode,
    encode,
    entries,
)
from dnsd.zone import ZoneData
from ztna.errors import ProtocolError
from ztna.names import Zone
from ztna.telemetry import logger

_log = logger(__name__)


class Shelf:
    """Reads the names at start, and keeps the file up to date; without a path it keeps nothing.

    `trouble` says why the file could not be read or written the last time, None while it can.
    """

    def __init__(self, path: Path | None, domain: Zone) -> None:
        self.trouble: str | None = None
        self._path = path
        self._domain = domain
        self._zone: ZoneData | None = None
        self._confirmed_at = 0.0

    def read(self, now: float) -> Snapshot | None:
        """Return the names of the last run; None when there are none or they cannot be trusted."""
        if self._path is None:
            return None
        try:
            snapshot = decode(_read(self._path))
            if snapshot.domain != self._domain:
                raise ProtocolError(f"names of {snapshot.domain}")
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            self._fail("snapshot_unreadable", error)
            return None
        # A clock that was set back must not make old names young.
        return Snapshot(
            snapshot.domain,
            snapshot.serial,
            min(snapshot.confirmed_at, now),
            snapshot.services,
            snapshot.leases,
        )

    async def keep(self, zone: ZoneData, confirmed_at: float) -> None:
        """Bring the file up to date: changed names are written anew, confirmed ones only dated."""
        if self._path is None:
            return
        before = self._zone
        # A zone with another serial only is the same names.
        is_same = before is not None and (before.services, before.leases) == (zone.services, zone.leases)
        if is_same and confirmed_at == self._confirmed_at:
            return
        try:
            if is_same:
                _date(self._path, confirmed_at)
            else:
                # In a thread: a large zone takes the disk a while.
                await asyncio.to_thread(_write, self._path, self._domain, zone, confirmed_at)
        except OSError as error:
            self._zone = None
            self._fail("snapshot_not_written", error)
        else:
            self._zone, self._confirmed_at, self.trouble = zone, confirmed_at, None

    def _fail(self, event: str, error: Exception) -> None:
        trouble = f"{self._path}: {getattr(error, 'strerror', None) or error}"
        if trouble != self.trouble:
            _log.warning(event, error=trouble)
        self.trouble = trouble


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        # Whoever writes this file says where names lead: it must be nobody else.
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or state.st_uid not in (0, os.geteuid()):
            raise ProtocolError("others than its owner may write it, or its owner is somebody else")
        if state.st_size > SNAPSHOT_BYTES_MAX:
            raise ProtocolError(f"over {SNAPSHOT_BYTES_MAX} bytes")
        return file.read()


def _write(path: Path, domain: Zone, zone: ZoneData, confirmed_at: float) -> None:
    data = encode(domain, zone.serial, confirmed_at, entries(zone.services, zone.leases))
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def _date(path: Path, confirmed_at: float) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, confirmed(confirmed_at), CONFIRMED_OFFSET)
    finally:
        os.close(descriptor)
