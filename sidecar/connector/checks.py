"""Checks as their route asks for them, parsed: kinds, statuses, patterns and payloads ready for use.

Pure. Who asks the backend is sidecar.connector.probes; what an outcome means is sidecar.connector.health's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import AnyStr, Literal

import msgspec

from ztna.config import CheckConfig, Endpoint
from ztna.errors import ConfigError
from ztna.leases import Protocol

CHECKS_PER_ROUTE_MAX = 16
SENT_BYTES_MAX = 1200
"""What a check sends is one datagram, or one small write."""
SHOWN_CHARACTERS_MAX = 200
"""What a failed check says of a header."""

Kind = Literal["tcp", "udp", "http", "grpc", "icmp", "script", "ttl", "none"]

_STATUS = re.compile(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 5.6.2
_HEX = "hex:"
# Which keys mean something to which kinds: one that means nothing is a mistake, not a wish to be dropped.
_KINDS_OF: Mapping[str, frozenset[Kind]] = {
    "tls": frozenset({"http", "grpc"}),
    "ca": frozenset({"http", "grpc"}),
    "tls_name": frozenset({"http", "grpc"}),
    "tls_skip_verify": frozenset({"http", "grpc"}),
    "method": frozenset({"http"}),
    "path": frozenset({"http"}),
    "headers": frozenset({"http"}),
    "status": frozenset({"http"}),
    "expect_headers": frozenset({"http"}),
    "body": frozenset({"http"}),
    "send": frozenset({"tcp", "udp"}),
    "expect": frozenset({"tcp", "udp"}),
    "grpc_service": frozenset({"grpc"}),
    "command": frozenset({"script"}),
    "ttl_s": frozenset({"ttl"}),
}
_DEFAULTS = CheckConfig()


@dataclass(frozen=True, slots=True)
class Check:
    """One way to ask a backend; `target` is where, and `config` has its times and thresholds."""

    kind: Kind
    target: Endpoint
    config: CheckConfig
    statuses: tuple[range, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    expect_headers: tuple[tuple[str, re.Pattern[str]], ...] = ()
    body: re.Pattern[bytes] | None = None
    send: bytes = b""
    introduction: bytes = b""
    """What a tcp check says before that: the PROXY header of a backend that wants one."""
    expect: bytes | None = None

    @property
    def url(self) -> str:
        """What an http check gets."""
        return f"{'https' if self.config.tls else 'http'}://{self.target}{self.config.path}"

    def misses(self, headers: Sequence[tuple[str, str]]) -> str | None:
        """Return which header an http check misses in an answer's, None when it is content."""
        for name, pattern in self.expect_headers:
            values = [value for each, value in headers if each.lower() == name.lower()]
            if not any(map(pattern.search, values)):
                found = f"has {', '.join(values)[:SHOWN_CHARACTERS_MAX]!r}" if values else "has none"
                return f"{name} does not match {pattern.pattern!r}: the answer {found}"
        return None

    def takes(self, status: int) -> bool:
        """Whether an http check is content with a status."""
        return any(status in statuses for statuses in self.statuses)


def parse(config: CheckConfig, protocol: Protocol, backend: Endpoint, where: str) -> Check:
    """Return the check of a backend. Raises ConfigError naming the key under `where` and what was expected."""
    kind: Kind = protocol if config.kind == "auto" else config.kind
    for key, kinds in _KINDS_OF.items():
        if kind not in kinds and getattr(config, key) != getattr(_DEFAULTS, key):
            raise ConfigError(f"{where}.{key}: only a check of kind {' or '.join(sorted(kinds))} has one")
    if kind == "script" and not config.command:
        raise ConfigError(f"{where}.command: expected what to run, and its arguments")
    if not config.path.startswith("/"):
        raise ConfigError(f"{where}.path: expected one that begins with /, got {config.path!r}")
    for key in ("ca", "tls_name", "tls_skip_verify"):
        if getattr(config, key) and not config.tls:
            raise ConfigError(f"{where}.{key}: set tls too, or nothing is asked by TLS")
    warns = config.failures_before_warning
    if warns is not None and warns > config.failures_before_critical:
        raise ConfigError(f"{where}.failures_before_warning: expected no more than failures_before_critical")
    if kind == "ttl":
        # What a program says of itself is no sample to be taken twice.
        config = msgspec.structs.replace(config, success_before_passing=1, failures_before_critical=1)
    return Check(
        kind=kind,
        target=Endpoint(backend.host, config.port or backend.port),
        config=config,
        statuses=tuple(_statuses(text, f"{where}.status") for text in config.status),
        headers=tuple(_header(text, f"{where}.headers") for text in config.headers),
        expect_headers=tuple(_expected(text, f"{where}.expect_headers") for text in config.expect_headers),
        body=_pattern(config.body, f"{where}.body"),
        send=_payload(config.send or "", f"{where}.send"),
        expect=None if config.expect is None else _payload(config.expect, f"{where}.expect"),
    )


def _statuses(text: str, where: str) -> range:
    match = _STATUS.fullmatch(text)
    if match is None or (match[2] or match[1]) < match[1]:
        raise ConfigError(f"{where}: expected statuses such as 204 and 200-299, got {text!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _header(text: str, where: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not _HEADER_NAME.fullmatch(name) or not value.strip().isprintable():
        raise ConfigError(f"{where}: expected Name: value, got {text!r}")
    return name, value.strip()


def _expected(text: str, where: str) -> tuple[str, re.Pattern[str]]:
    name, value = _header(text, where)
    return name, _compiled(value, value, where)


def _pattern(text: str | None, where: str) -> re.Pattern[bytes] | None:
    return None if text is None else _compiled(text.encode(), text, where)


def _compiled(pattern: AnyStr, text: str, where: str) -> re.Pattern[AnyStr]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: expected a regular expression, got {text!r} ({error})") from None


def _payload(text: str, where: str) -> bytes:
    try:
        data = bytes.fromhex(text.removeprefix(_HEX)) if text.startswith(_HEX) else text.encode()
    except ValueError:
        raise ConfigError(f"{where}: expected hexadecimal digits after hex:, got {text!r}") from None
    if len(data) > SENT_BYTES_MAX:
        raise ConfigError(f"{where}: expected at most {SENT_BYTES_MAX} bytes, got {len(data)}")
    return data
