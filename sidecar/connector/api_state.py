"""The services that came by the local API, kept in a file over restarts.

Written as a whole in one step (a new file, synced, put in the old one's place). A file that cannot be read is never
written over: the connector does not start, and says what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sidecar.connector.sources import Definition, Origin, definitions
from ztna import sections
from ztna.config import RoutesFile
from ztna.errors import ConfigError, ZtnaError
from ztna.names import ServiceName

SCHEMA = 1
STATE_MODE = 0o600
STATE_BYTES_MAX = 64 * 1024 * 1024
ORIGIN = Origin("api")


class StateError(ZtnaError):
    """The state file cannot be written; nothing was changed."""


def read(path: Path) -> dict[ServiceName, Definition]:
    """Return the services of the file, none when there is none. Raises ConfigError saying what to do."""
    try:
        with path.open("rb") as file:
            data = file.read(STATE_BYTES_MAX + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"connector.api_state: {path}: {error.strerror}") from None
    advice = "mend it, or move it away to begin with no services from the API"
    if len(data) > STATE_BYTES_MAX:
        raise ConfigError(f"connector.api_state: {path}: over {STATE_BYTES_MAX} bytes; {advice}")
    try:
        raw: Any = msgspec.json.decode(data)
        schema = raw["schema"]
        if schema == SCHEMA:
            made = sections.build(RoutesFile, {"routes": raw["routes"]})
            return {each.service: each for each in definitions(made.routes, ORIGIN)}
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
        TypeError,
        KeyError,
        ConfigError,
    ) as error:
        raise ConfigError(f"connector.api_state: {path}: {_said(error)}; {advice}") from None
    raise ConfigError(
        f"connector.api_state: {path}: expected schema {SCHEMA}, got {schema!r}; a newer version wrote it: "
        "run that one, or move the file away"
    )


def write(path: Path, services: Mapping[ServiceName, Definition]) -> None:
    """Put the services into the file. Raises StateError, and then the file is as it was."""
    routes = [sections.plain(route, secrets=True) for each in services.values() for route in each.routes]
    data = msgspec.json.format(msgspec.json.encode({"schema": SCHEMA, "routes": routes}), indent=2)
    if len(data) >= STATE_BYTES_MAX:
        raise StateError(f"{path}: would be over {STATE_BYTES_MAX} bytes; nothing was changed")
    fresh = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, STATE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()  # on a full disk it would keep the room it took
        raise StateError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from None


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"expected a key {error.args[0]}"
    return str(error)
