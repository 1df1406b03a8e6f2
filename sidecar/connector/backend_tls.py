"""TLS contexts for connections to backends, made from their route's files and made anew when these change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from sidecar.connector.routes import RouteTable
from ztna import secret_files
from ztna.config import BackendTlsConfig
from ztna.errors import ConfigError
from ztna.telemetry import logger

_log = logger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Made:
    stamp: _Stamp
    context: ssl.SSLContext


class BackendTls:
    """One context for each configuration that routes have."""

    def __init__(self) -> None:
        self._made: dict[BackendTlsConfig, _Made] = {}

    def check(self, table: RouteTable) -> None:
        """Raise ConfigError, naming the service and the file, when a route's files cannot be used."""
        for service in table.services.values():
            for route in service.routes:
                if route.backend_tls is not None:
                    try:
                        self._made[route.backend_tls] = _make(route.backend_tls)
                    except ConfigError as error:
                        raise ConfigError(
                            f"connector.routes: {service.service}: backend_tls.{error}"
                        ) from None

    def keep_only(self, table: RouteTable) -> None:
        """Forget what no route of the table has: who changes routes often would fill our memory."""
        routes = [route for service in table.services.values() for route in service.routes]
        wanted = {route.backend_tls for route in routes if route.backend_tls is not None}
        self._made = {config: made for config, made in self._made.items() if config in wanted}

    def context(self, config: BackendTlsConfig) -> ssl.SSLContext:
        """Return the context; while changed files cannot be used, the one before. Raises ConfigError without one."""
        known = self._made.get(config)
        try:
            if known is None or known.stamp != _stamp(config):
                known = self._made[config] = _make(config)
        except ConfigError as error:
            if known is None:
                raise
            _log.error("backend_tls_not_reloaded", error=error)
        return known.context


def _make(config: BackendTlsConfig) -> _Made:
    stamp = _stamp(config)
    try:
        context = ssl.create_default_context(cafile=config.ca)
    except OSError as error:
        raise ConfigError(f"ca: {config.ca}: {error.strerror or error}") from None
    if config.certificate is not None and config.key is not None:
        wrong = secret_files.complaint(Path(config.key))
        if wrong:
            raise ConfigError(f"key: {wrong}")
        try:
            context.load_cert_chain(config.certificate, config.key)
        except OSError as error:
            raise ConfigError(f"certificate: {config.certificate}: {error.strerror or error}") from None
    if config.name:
        try:
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=config.name)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"name: expected the name of a host, got {config.name!r} ({error})") from None
    return _Made(stamp, context)


def _stamp(config: BackendTlsConfig) -> _Stamp:
    """Return what changes when a file is replaced or written. Raises ConfigError."""
    found = []
    for key in ("ca", "certificate", "key"):
        path = getattr(config, key)
        if path is None:
            continue
        try:
            seen = Path(path).stat()
        except OSError as error:
            raise ConfigError(f"{key}: {path}: {error.strerror}") from None
        except ValueError as error:  # a NUL, or what no path can be encoded from
            raise ConfigError(f"{key}: expected the path of a file, got {path!r} ({error})") from None
        found.append((seen.st_ino, seen.st_mtime_ns, seen.st_size))
    return tuple(found)
