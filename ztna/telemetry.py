"""Logs and metrics of every daemon: event names with fields on stderr, counters on one Prometheus registry.

All metrics of the project are defined here, so that this list is what `/metrics` has. Decides nothing
and serves nothing; ztna.runtime serves the registry.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics

from ztna.config import LogConfig
from ztna.jsontypes import Secret, to_json
from ztna.reasons import Reason

# A `_created` series beside every counter would double the page for nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

REFUSALS = Counter(
    "ztna_refusals", "What was refused, by the place and the reason.", ("where", "reason"), registry=REGISTRY
)
DROPS = Counter(
    "ztna_drops",
    "Packets, messages and bytes thrown away: malformed, too large, or over a bound.",
    ("where", "why"),
    registry=REGISTRY,
)
UNEXPECTED = Counter(
    "ztna_unexpected_errors", "Errors nobody foresaw; each is logged with its traceback.", registry=REGISTRY
)
READY = Gauge("ztna_ready", "1 when /readyz says ready.", registry=REGISTRY)
BUILD = Gauge("ztna_build_info", "Always 1.", ("daemon", "version"), registry=REGISTRY)

CERTIFICATE_EXPIRES = Gauge(
    "ztna_certificate_expires_seconds",
    "Unix time when the daemon's own certificate, or one that vouches for it, expires.",
    registry=REGISTRY,
)
CERTIFICATE_EXPIRING = Gauge(
    "ztna_certificate_expiring", "1 when less than a third of its lifetime is left.", registry=REGISTRY
)
CRL_NEXT_UPDATE = Gauge(
    "ztna_crl_next_update_seconds", "Unix time when the CRL in use is out of date.", registry=REGISTRY
)
CREDENTIALS_BROKEN = Gauge(
    "ztna_credentials_broken",
    "1 while the newest of the certificate, the CA file or the CRL cannot be used, and the one before it is.",
    ("what",),
    registry=REGISTRY,
)
CREDENTIAL_RELOADS = Counter(
    "ztna_credential_reloads", "Certificates, CA files and CRLs taken into use.", ("what",), registry=REGISTRY
)

KEEPER = Gauge("ztna_keeper", "1 while this dnsd is the keeper of the leases.", registry=REGISTRY)
LEASE_CHANGES = Counter(
    "ztna_lease_changes", "What the keeper has done to leases, by kind.", ("kind",), registry=REGISTRY
)
UNLEASED = Gauge(
    "ztna_services_without_lease",
    "Services the keeper could not give an address, or that are not served.",
    registry=REGISTRY,
)
POOL = Gauge(
    "ztna_pool_addresses",
    "Addresses of the pool, by state: leased, resting (not yet free again) or free; only on the keeper.",
    ("state",),
    registry=REGISTRY,
)
DNS_QUERIES = Counter("ztna_dns_queries", "DNS queries taken.", ("transport",), registry=REGISTRY)
DNS_FORWARDED = Counter(
    "ztna_dns_forwarded",
    "DNS queries handed on to upstreams: answered, failed, or too_many at once.",
    ("outcome",),
    registry=REGISTRY,
)
DNS_CONNECTIONS = Gauge("ztna_dns_tcp_connections", "Open DNS connections over TCP.", registry=REGISTRY)
WORKERS = Gauge("ztna_dns_workers", "Processes beside dnsd's own that answer on its port.", registry=REGISTRY)
WORKER_ENDS = Counter(
    "ztna_dns_worker_ends", "Workers that ended and were to be started again.", registry=REGISTRY
)
WORKER_CPU = Counter(
    "ztna_dns_worker_cpu_seconds", "Processor time of all workers, those that ended too.", registry=REGISTRY
)
WORKER_MEMORY = Gauge(
    "ztna_dns_worker_resident_bytes", "Resident memory of all workers, summed.", registry=REGISTRY
)
NOTIFIES = Counter(
    "ztna_dns_notifies", "NOTIFY messages by what became of them.", ("outcome",), registry=REGISTRY
)
TRANSFERS = Counter(
    "ztna_dns_transfers", "Zone transfers by kind: axfr, ixfr or refused.", ("kind",), registry=REGISTRY
)
CONFIRMED = Gauge(
    "ztna_catalog_confirmed_seconds",
    "Unix time when Consul last confirmed the names served.",
    registry=REGISTRY,
)
SERVED = Gauge(
    "ztna_dns_served",
    "Whether names are served: 2 confirmed, 1 stale (Consul is away), 0 not.",
    registry=REGISTRY,
)
FORWARDED = Counter(
    "ztna_forwarded_packets",
    "UDP packets that the relay's forwarder passed on, by who did it: user (space) or kernel.",
    ("by",),
    registry=REGISTRY,
)
FORWARDING_IN_KERNEL = Gauge(
    "ztna_forwarding_in_kernel", "1 while the kernel forwards for the relay.", registry=REGISTRY
)

SESSIONS_OPENED = Counter("ztna_relay_sessions_opened", "Sessions that a relay opened.", registry=REGISTRY)
SESSION_ENDS = Counter(
    "ztna_relay_sessions_closed",
    "Sessions of a relay that ended, by the reason.",
    ("reason",),
    registry=REGISTRY,
)
RELAY_SIZES = Gauge(
    "ztna_relay_live",
    "What a relay holds: connections (of them over TLS), sessions, services registered, srv names, links, tcp pairs.",
    ("what",),
    registry=REGISTRY,
)
SRV_AGE = Gauge(
    "ztna_relay_catalog_age_seconds",
    "How long ago the catalog behind the SRV answers was confirmed; -1: never.",
    registry=REGISTRY,
)

SERVICES_DEFINED = Gauge(
    "ztna_connector_services",
    "Services of a connector: fronted, kept (fronted as before: what they have now is not usable), refused (defined, "
    "but not usable), shadowed (defined again elsewhere).",
    ("state",),
    registry=REGISTRY,
)
CONSUL_REFUSED = Gauge(
    "ztna_consul_refused",
    "Instances that Consul does not let a connector register, report or remove.",
    ("what",),
    registry=REGISTRY,
)
ROUTE_FILES_BROKEN = Gauge(
    "ztna_route_files_broken",
    "Files of routes whose newest content cannot be used, and what they had before is.",
    registry=REGISTRY,
)
ROUTE_RELOADS = Counter(
    "ztna_route_reloads",
    "Files of routes taken into use while running, by kind: config, or file (of routes_dir).",
    ("kind",),
    registry=REGISTRY,
)
SRV_BACKENDS_AGE = Gauge(
    "ztna_srv_backends_age_seconds",
    "How old the answer is that the backends of a name come from: 0 while DNS answers.",
    ("name",),
    registry=REGISTRY,
)

TCP_FLOWS = Counter(
    "ztna_tcp_flows",
    "TCP flows whose carrier broke, by what became of them: detached, then resumed or forsaken.",
    ("outcome",),
    registry=REGISTRY,
)

HIDDEN = "***"

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m"}
_ROOTS = ("ztna", "sidecar", "dnsd", "relay")


def refused(where: str, reason: Reason) -> None:
    """Count one refusal."""
    REFUSALS.labels(where, reason.value).inc()


def dropped(where: str, why: str, count: int = 1) -> None:
    """Count what was thrown away. Hot paths keep the child of DROPS.labels instead."""
    DROPS.labels(where, why).inc(count)


def counted() -> dict[str, dict[str, int]]:
    """Return what was refused and dropped since the start, `{"refused": {"where reason": count}, ...}`."""
    return {"refused": _counts(REFUSALS), "dropped": _counts(DROPS)}


def _counts(counter: Counter) -> dict[str, int]:
    return {
        " ".join(sample.labels.values()): int(sample.value)
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }


class Logger:
    """Writes one event with its fields; the event is a snake_case name, never a sentence."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        """Write what only a developer wants."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Write what an operator may want: a connection opens, a connection ends."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write what an operator should look at."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Write what keeps the daemon from doing its work."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, exception: BaseException | None, **fields: object) -> None:
        """Write an error that nobody foresaw, with its traceback."""
        self._logger.error(event, extra={"fields": fields}, exc_info=exception)

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields})


def logger(name: str) -> Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return Logger(name)


def configure(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send all logs to the stream (stderr), human on a terminal and JSON lines otherwise unless told.

    Of libraries only warnings and errors are written, whatever our level.
    """
    out = stream if stream is not None else sys.stderr
    human = config.format == "human" or (config.format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Human(colour=out.isatty()) if human else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _ROOTS:
        logging.getLogger(name).setLevel(_LEVELS[config.level])


class _Json(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record, self).items():
            line.setdefault(name, value)
        return msgspec.json.encode(line).decode()


class _Human(logging.Formatter):
    """Local time, level, event and `key=value`; what could break a line is escaped."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record, self)
        traceback = fields.pop("traceback", None)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {_one_line(record.getMessage())}"
        text += "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
        if self._colour and record.levelname in _COLOURS:
            text = f"{_COLOURS[record.levelname]}{text}\x1b[0m"
        return f"{text}\n{traceback}" if traceback else text


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, object]:
    """Return the event's fields as JSON has them, and the traceback when there is one."""
    fields = {name: _told(value) for name, value in getattr(record, "fields", {}).items()}
    if record.exc_info:
        fields["traceback"] = formatter.formatException(record.exc_info)
    return fields


def _told(value: object) -> object:
    if isinstance(value, Secret):
        return HIDDEN
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return to_json(text).decode()


def _one_line(text: str) -> str:
    return text if text.isprintable() else to_json(text).decode()


def utc(seconds: float) -> str:
    """Return Unix seconds as RFC 3339 in UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
