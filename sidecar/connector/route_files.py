"""Routes in files: the configuration's own, and those of `connector.routes_dir`, read again when they change.

Looked at every POLL_SECONDS, and on SIGHUP. Each file is taken as a whole or not at all: one that cannot be used
keeps what it had, which the log, /readyz and a metric say; the others are not concerned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidecar.connector.sources import Definition, Origin, definitions
from sidecar.connector.srv_records import sound
from ztna import sections
from ztna.config import Config, ConnectorConfig, RoutesFile
from ztna.errors import ConfigError
from ztna.runtime import Daemon
from ztna.telemetry import ROUTE_FILES_BROKEN, ROUTE_RELOADS, logger
from ztna.watching import POLL_SECONDS, Stamp, stamp, wait

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
FILES_MAX = 2_000
SETTLE_LOOKS = 2
"""What is gone or broken may be in the middle of being written: only what is so at a second look, too, counts."""

_CONFIG = Origin("config")

_log = logger(__name__)


@dataclass(slots=True)
class _File:
    """One file as it was last seen; `definitions` are those of the last content that could be used."""

    origin: Origin
    path: Path | None
    definitions: tuple[Definition, ...] = ()
    seen: Stamp = None
    is_unread: bool = True
    is_heard: bool = False
    """Whether it could ever be read."""
    looks_bad: int = 0
    problem: str | None = None


class RouteFiles:
    """All files of routes; `changed` is called when what they define has changed."""

    def __init__(self, daemon: Daemon, config: ConnectorConfig, changed: Callable[[], None]) -> None:
        """Take the routes of the configuration that was read. Raises ConfigError when one cannot be used."""
        self._daemon = daemon
        self._config = config
        self._changed = changed
        self._wake = asyncio.Event()
        self._is_hurried = False
        own = definitions(config.routes, _CONFIG)
        self.own_table = sound(config.routes)
        """The configuration's own routes as they were at the start."""
        path = daemon.file if daemon.reread is not None else None
        self._own = _File(
            _CONFIG, path, own, None if path is None else stamp(path), is_unread=False, is_heard=True
        )
        self._folder = None if config.routes_dir is None else Path(config.routes_dir)
        self._files: dict[str, _File] = {}
        self._folder_problem: str | None = None
        self._is_folder_heard = self._folder is None
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(f"connector.routes_dir: {self._folder}: expected a directory")

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """What all files define now."""
        return tuple(each for file in self._all() for each in file.definitions)

    @property
    def unheard(self) -> tuple[str, ...]:
        """What could never be read: what it defined when we ran before is not known."""
        files = tuple(str(file.origin) for file in self._files.values() if not file.is_heard)
        return files if self._is_folder_heard else (*files, "routes_dir")

    def reload(self) -> None:
        """Look now, and take what is there at its word: SIGHUP."""
        self._is_hurried = True
        for file in self._all():
            file.is_unread = True
        self._wake.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await wait(self._wake, POLL_SECONDS)
            self._wake.clear()

    async def look(self) -> None:
        """Read what changed since the last look."""
        before = self.definitions
        is_hurried, self._is_hurried = self._is_hurried, False
        self._find(is_hurried)
        for file in self._all():
            await self._look_at(file, is_hurried)
        ROUTE_FILES_BROKEN.set(
            sum(file.problem is not None for file in self._all()) + (self._folder_problem is not None)
        )
        if self.definitions != before:
            self._changed()

    def status(self) -> dict[str, str | None]:
        """Return what /status shows: the files that are read, and what is wrong with them."""
        found = {str(file.origin): file.problem for file in self._all() if file.path is not None}
        return found if self._folder_problem is None else found | {"routes_dir": self._folder_problem}

    def _all(self) -> tuple[_File, ...]:
        return (self._own, *self._files.values())

    def _find(self, is_hurried: bool) -> None:
        """Notice files of the folder that came and went."""
        if self._folder is None:
            return
        try:
            found = sorted(
                each.name
                for each in self._folder.iterdir()
                if each.suffix in SUFFIXES and not each.name.startswith(".")
            )
            if len(found) > FILES_MAX:
                raise ConfigError(f"{self._folder}: expected at most {FILES_MAX} files, got {len(found)}")
        except OSError as error:
            self._tell_folder(f"{self._folder}: {error.strerror}")
            return
        except ConfigError as error:
            self._tell_folder(str(error))
            return
        self._tell_folder(None)
        self._is_folder_heard = True
        for name in self._files.keys() - set(found):
            file = self._files[name]
            file.looks_bad += 1
            if is_hurried or file.looks_bad >= SETTLE_LOOKS:
                del self._files[name]
                self._tell(file, None)
                _log.info("routes_gone", file=str(file.origin), services=len(file.definitions))
        for name in found:
            if name not in self._files:
                self._files[name] = _File(Origin("file", _legible(name)), self._folder / name)
        self._files = dict(sorted(self._files.items()))

    async def _look_at(self, file: _File, is_hurried: bool) -> None:
        if file.path is None:
            return
        seen = stamp(file.path)
        if seen is None and file is not self._own:
            return  # gone, which is the folder's matter
        if seen == file.seen and not file.is_unread and not file.looks_bad:
            return
        file.seen, file.is_unread = seen, False
        try:
            # Files may be large, and folders slow: not in the loop.
            found = await asyncio.to_thread(self._read, file)
        except ConfigError as error:
            file.looks_bad += 1
            if is_hurried or file.looks_bad >= SETTLE_LOOKS:
                file.looks_bad = 0
                self._tell(file, _legible(str(error)))
            return
        file.looks_bad, file.is_heard = 0, True
        self._tell(file, None)
        if found != file.definitions:
            file.definitions = found
            ROUTE_RELOADS.labels(file.origin.kind).inc()
            _log.info("routes_read", file=str(file.origin), services=len(found))

    def _read(self, file: _File) -> tuple[Definition, ...]:
        """Return what a file defines. Raises ConfigError when any of it cannot be used."""
        assert file.path is not None
        if file is self._own:
            routes = self._reread().routes
            sound(routes)
            return definitions(routes, file.origin)
        if file.path.exists() and not file.path.is_file():
            # A pipe would be waited for for ever, and with it all other files.
            raise ConfigError(f"{file.path}: expected a regular file")
        raw = sections.read_file(file.path)
        try:
            routes = sections.build(RoutesFile, raw).routes
            sound(routes)
        except ConfigError as error:
            raise ConfigError(f"{file.path}: {str(error).removeprefix('connector.')}") from None
        return definitions(routes, file.origin)

    def _reread(self) -> ConnectorConfig:
        assert self._daemon.reread is not None
        config: Config = self._daemon.reread()
        if config.connector is None:
            raise ConfigError("connector: the configuration has no such section any more")
        fields = type(self._config).__struct_fields__
        changed = [
            key
            for key in fields
            if key != "routes" and getattr(config.connector, key) != getattr(self._config, key)
        ]
        if changed:
            _log.warning("restart_needed", keys=" ".join(f"connector.{key}" for key in changed))
        return config.connector

    def _tell(self, file: _File, problem: str | None) -> None:
        """Say once what is wrong with a file, and that it is right again."""
        if problem == file.problem:
            return
        key = f"routes {file.origin}"
        file.problem = problem
        if problem is None:
            self._daemon.readiness.unwarn(key)
            return
        kept = "what it had before is in use" if file.definitions else "nothing of it is in use"
        _log.error("routes_broken", file=str(file.origin), error=problem)
        self._daemon.readiness.warn(key, f"{problem}; {kept}")

    def _tell_folder(self, problem: str | None) -> None:
        if problem == self._folder_problem:
            return
        self._folder_problem = problem
        if problem is None:
            self._daemon.readiness.unwarn("routes_dir")
        else:
            _log.error("routes_broken", file="routes_dir", error=problem)
            self._daemon.readiness.warn("routes_dir", f"{problem}; what was there before is in use")


def _legible(text: str) -> str:
    """Return a text that may have the name of a file in it as UTF-8, which such names need not be."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
