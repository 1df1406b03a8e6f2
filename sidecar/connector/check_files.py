"""Files that checks need of this host: the authorities they believe, taken up as they change, and their programs.

Whether a route may be taken into use without them is sidecar.connector.sources' to decide.
"""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sidecar.connector.checks import Check
from sidecar.connector.routes import RouteTable
from ztna.errors import ConfigError
from ztna.telemetry import logger
from ztna.watching import Stamp, stamp

_H2 = "h2"

_log = logger(__name__)


class _Trust(NamedTuple):
    """Whom a check believes, and what it speaks."""

    ca: str | None
    is_http2: bool
    believes_all: bool


@dataclass(slots=True)
class _Made:
    seen: Stamp
    context: ssl.SSLContext


class CheckTls:
    """One TLS context for all checks that believe the same authorities, made anew when their file changes."""

    def __init__(self) -> None:
        self._made: dict[_Trust, _Made] = {}

    def __len__(self) -> int:
        return len(self._made)

    def context(self, check: Check) -> ssl.SSLContext:
        """Return the context; while a changed file cannot be used, the one before. Raises ConfigError without one."""
        trust = _trust(check)
        known = self._made.get(trust)
        seen = None if trust.ca is None else stamp(trust.ca)
        if known is not None and known.seen == seen:
            return known.context
        try:
            context = _context(trust)
        except ConfigError as error:
            if known is None:
                raise
            known.seen = seen  # told once: what is looked at again is another file
            _log.error("check_ca_not_reloaded", error=error)
            return known.context
        self._made[trust] = _Made(seen, context)
        return context

    def keep_only(self, checks: Iterable[Check]) -> None:
        """Forget what none of these checks needs: who changes routes often would fill our memory."""
        wanted = {_trust(check) for check in checks if check.config.tls}
        self._made = {trust: made for trust, made in self._made.items() if trust in wanted}


def require(table: RouteTable) -> None:
    """Raise ConfigError, naming the service and the file, when this host lacks one that a check of the table names."""
    for service in table.services.values():
        for route in service.routes:
            for backend in route.backends:
                for check in backend.checks:
                    try:
                        _require(check)
                    except ConfigError as error:
                        raise ConfigError(f"connector.routes: {service.service}: checks.{error}") from None


def _require(check: Check) -> None:
    config = check.config
    if config.tls and config.ca is not None:
        _context(_trust(check))
    # What Consul's agent runs may be on its host alone.
    if check.kind == "script" and config.runner == "sidecar":
        program = config.command[0]
        try:
            found = shutil.which(program)
        except ValueError:  # a NUL
            found = None
        if found is None:
            raise ConfigError(f"command: {program}: expected a program that the connector may run")


def _trust(check: Check) -> _Trust:
    return _Trust(check.config.ca, check.kind == "grpc", check.config.tls_skip_verify)


def _context(trust: _Trust) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if trust.ca is None else Path(trust.ca))
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise ConfigError(f"ca: {trust.ca}: {getattr(error, 'strerror', None) or error}") from None
    if trust.is_http2:
        context.set_alpn_protocols([_H2])
    if trust.believes_all:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
