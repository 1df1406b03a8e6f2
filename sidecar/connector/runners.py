"""Which checks Consul's agent can run for us, and as what: by its version, its settings, and what a check wants.

Pure. Who registers them is sidecar.connector.registrar's business, who follows what Consul finds is
sidecar.connector.delegation's. Gates are the versions of Consul's changelog; a field that an agent does not know makes
it refuse the whole registration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from sidecar.connector.checks import Check, Kind
from sidecar.connector.health import CheckKey, Verdict
from ztna.catalog import Probe, ProbeDefinition, ProbeKind

INTERVAL_SECONDS_MIN = 1.0
"""Consul raises anything shorter to it."""
ID_DIGITS = 8

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_EMBEDDED = "embedded"
_DEFAULT_STATUSES = (range(200, 300),)
_KINDS: Mapping[Kind, ProbeKind] = {
    "tcp": "tcp",
    "udp": "udp",
    "http": "http",
    "grpc": "grpc",
    "script": "script",
}
_UDP = (1, 14, 0)
_TLS_NAME = (1, 10, 0)
_FAILURES_BEFORE_WARNING = (1, 11, 0)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What is to be known of a Consul agent: its node's name, its version, whether it runs scripts that it is sent."""

    node: str
    version: tuple[int, int, int]
    is_embedded: bool = False
    runs_scripts: bool = False

    @property
    def text(self) -> str:
        """Its version as people write it."""
        return ".".join(map(str, self.version))


def capabilities(told: Mapping[str, Any]) -> Capabilities:
    """Read /v1/agent/self. Raises ValueError when it is no account of a Consul agent."""
    try:
        config = told["Config"]
        node, version = config["NodeName"], config["Version"]
        match = _VERSION.match(version)
        runs_scripts = bool(told.get("DebugConfig", {}).get("EnableRemoteScriptChecks", False))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("Consul's account of its agent has an unknown shape") from None
    if match is None:
        raise ValueError(f"Consul's version {version!r} is none")
    numbers = (int(match[1]), int(match[2]), int(match[3]))
    return Capabilities(node, numbers, _EMBEDDED in version, runs_scripts)


def why_not(check: Check, can: Capabilities, *, is_only_backend: bool = True) -> str | None:
    """Return why this agent cannot run the check, None when it can.

    One of several backends may fail without its service: Consul would take a check of it for the service's.
    """
    if not is_only_backend:
        return "its port has several backends"
    if can.is_embedded:
        return "the embedded Consul runs no checks but TTL"
    if check.config.interval_s < INTERVAL_SECONDS_MIN:
        return "Consul asks once a second at most"
    if check.config.failures_before_warning is not None and can.version < _FAILURES_BEFORE_WARNING:
        return f"Consul {can.text} knows no failures_before_warning"
    return _why_not_kind(check, can)


def _why_not_kind(check: Check, can: Capabilities) -> str | None:
    match check.kind:
        case "icmp" | "none" | "ttl":
            return f"Consul has no check of kind {check.kind}"
        case "tcp" | "udp" if check.send or check.expect is not None:
            return "Consul sends and expects nothing"
        case "udp" if can.version < _UDP:
            return f"Consul {can.text} has no check of kind udp"
        case "script" if not can.runs_scripts:
            return "Consul runs no scripts: enable_script_checks is off"
        case "script" if not _is_numeric(check.target.host):
            return "a script is told the backend's address, which Consul would not look up"
        case "http" if check.body is not None or check.expect_headers or check.statuses != _DEFAULT_STATUSES:
            return "Consul looks at no body and no header of the answer, and takes 200 to 299 alone"
    return _why_not_tls(check, can)


def _why_not_tls(check: Check, can: Capabilities) -> str | None:
    if check.config.ca is not None:
        return "Consul believes its own authorities alone"
    if check.config.tls_name is not None and (check.kind == "grpc" or can.version < _TLS_NAME):
        return f"Consul {can.text} takes no tls_name"
    return None


def definition(
    check: Check, key: CheckKey, own_check: str, verdict: Verdict, deregister_after_s: float
) -> ProbeDefinition:
    """Return a check as Consul's agent is to run it; `own_check` is the id of the service's TTL check."""
    probe = _probe(check)
    digest = hashlib.sha256(repr(probe).encode()).hexdigest()[:ID_DIGITS]
    return ProbeDefinition(
        check_id=f"{own_check}:{key.port.protocol}:{key.port.port}:{key.number}:{digest}",
        name=f"{check.kind} {check.target}",
        probe=probe,
        status=verdict,
        deregister_after_s=deregister_after_s,
    )


def _probe(check: Check) -> Probe:
    config, target = check.config, str(check.target)
    if check.kind == "http":
        target = check.url
    elif check.kind == "grpc" and config.grpc_service:
        target = f"{target}/{config.grpc_service}"
    command: tuple[str, ...] = ()
    if check.kind == "script":
        told = (f"ZTNA_BACKEND={check.target}", f"ZTNA_BACKEND_IP={check.target.host}")
        command = ("env", *told, *config.command)
    return Probe(
        kind=_KINDS[check.kind],
        target=target,
        interval_s=config.interval_s,
        timeout_s=config.timeout_s,
        success_before_passing=config.success_before_passing,
        failures_before_critical=config.failures_before_critical,
        failures_before_warning=config.failures_before_warning,
        tls=config.tls,
        tls_name=config.tls_name,
        tls_skip_verify=config.tls_skip_verify,
        method=config.method,
        headers=check.headers,
        command=command,
    )


def _is_numeric(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
