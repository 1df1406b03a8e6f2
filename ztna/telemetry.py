"""Metrics and events of every daemon: counters on one Prometheus registry, event names with fields on stderr.

All metrics of the project are defined here, each with who sets it and how many values its labels can have, so that
this list is what `/metrics` has and what docs/reference/metrics.md says. Decides nothing and
serves nothing; ztna.admin serves the registry, ztna.log_lines writes the events.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric

from ztna.reasons import Reason

# A `_created` series beside every counter would double the page for nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

AGENT, CONNECTOR, DNSD, RELAY = "agent", "connector", "dnsd", "relay"
EVERY = (AGENT, CONNECTOR, DNSD, RELAY)
SIDECARS = (AGENT, CONNECTOR)
WITH_TLS = (AGENT, CONNECTOR, RELAY)
WITH_CONSUL = (AGENT, CONNECTOR, DNSD)


class Documented(msgspec.Struct, frozen=True):
    """One metric as docs/reference/metrics.md has it: `labels` says of each how many values it can have, and which."""

    name: str
    kind: str
    help: str
    daemons: tuple[str, ...]
    labels: Mapping[str, str]


METRICS: dict[str, Documented] = {}
"""The one list, by the name of the family."""


def _counter(name: str, help_: str, daemons: tuple[str, ...], /, **labels: str) -> Counter:
    METRICS[name] = Documented(f"{name}_total", "counter", help_, daemons, labels)
    return Counter(name, help_, tuple(labels), registry=REGISTRY)


def _gauge(name: str, help_: str, daemons: tuple[str, ...], /, **labels: str) -> Gauge:
    METRICS[name] = Documented(name, "gauge", help_, daemons, labels)
    return Gauge(name, help_, tuple(labels), registry=REGISTRY)


def _histogram(
    name: str, help_: str, daemons: tuple[str, ...], buckets: tuple[float, ...], /, **labels: str
) -> Histogram:
    METRICS[name] = Documented(name, "histogram", help_, daemons, labels)
    return Histogram(name, help_, tuple(labels), buckets=buckets, registry=REGISTRY)


_REASON = f"{len(Reason)}: the reasons of the runbook"
_WHERE = "about 25: a part of the daemon"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# Every daemon.

REFUSALS = _counter(
    "ztna_refusals",
    "What was refused, by the place and the reason.",
    EVERY,
    where=_WHERE,
    reason=_REASON,
)
DROPS = _counter(
    "ztna_drops",
    "Packets, messages and bytes thrown away: malformed, too large, or over a bound.",
    EVERY,
    where=_WHERE,
    why="at most 20 a place, fixed in the code",
)
UNEXPECTED = _counter(
    "ztna_unexpected_errors", "Errors nobody foresaw; each is logged with its traceback.", EVERY
)
READY = _gauge("ztna_ready", "1 when /readyz says ready.", EVERY)
WARNINGS = _gauge(
    "ztna_warnings",
    "How many things /readyz warns of: they are wrong or risky, though the daemon works.",
    EVERY,
)
BUILD = _gauge(
    "ztna_build_info", "Always 1.", EVERY, daemon="1: the command that runs", version="1: that of ztna-mesh"
)
LOOP_LAG = _histogram(
    "ztna_event_loop_lag_seconds",
    "By how much the daemon's loop was late, asked once a second: what every packet and query waits beside.",
    EVERY,
    (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)

# Who has a certificate.

CERTIFICATE_EXPIRES = _gauge(
    "ztna_certificate_expires_seconds",
    "Unix time when the daemon's own certificate, or one that vouches for it, expires.",
    WITH_TLS,
)
CERTIFICATE_EXPIRING = _gauge(
    "ztna_certificate_expiring", "1 when less than a third of its lifetime is left.", WITH_TLS
)
CRL_NEXT_UPDATE = _gauge(
    "ztna_crl_next_update_seconds", "Unix time when the CRL in use is out of date; 0 without one.", WITH_TLS
)
CREDENTIALS_BROKEN = _gauge(
    "ztna_credentials_broken",
    "1 while the newest of the certificate, the CA file or the CRL cannot be used, and the one before it is.",
    WITH_TLS,
    what="3: certificate, ca, crl",
)
CREDENTIAL_RELOADS = _counter(
    "ztna_credential_reloads",
    "Certificates, CA files and CRLs taken into use.",
    WITH_TLS,
    what="3: certificate, ca, crl",
)
HANDSHAKES = _histogram(
    "ztna_handshake_seconds",
    "Handshakes, begun by either end, after which the peer's certificate stood: QUIC by where, and TLS over TCP. Those "
    "that were refused are in ztna_refusals_total.",
    WITH_TLS,
    _SHORT,
    where="4: relay, relay_client, packet_carrier, tls",
)

# Who talks to Consul.

CONSUL_REQUESTS = _counter(
    "ztna_consul_requests",
    "Requests to Consul: answered, rejected (it said no), or failed (no answer in time, or a server error); each "
    "try counts.",
    WITH_CONSUL,
    outcome="3: answered, rejected, failed",
)
CONSUL_SECONDS = _histogram(
    "ztna_consul_request_seconds",
    "How long Consul took to answer requests that it need not hold back (blocking queries are not in it).",
    WITH_CONSUL,
    _SHORT,
)

# dnsd.

KEEPER = _gauge("ztna_keeper", "1 while this dnsd is the keeper of the leases.", (DNSD,))
LEASE_CHANGES = _counter(
    "ztna_lease_changes",
    "What the keeper has done to leases, by kind.",
    (DNSD,),
    kind="12, fixed in the code",
)
UNLEASED = _gauge(
    "ztna_services_without_lease",
    "Services the keeper could not give an address, or that are not served.",
    (DNSD,),
)
POOL = _gauge(
    "ztna_pool_addresses",
    "Addresses of the pool, by state: leased, resting (not yet free again) or free; only on the keeper.",
    (DNSD,),
    state="3: leased, resting, free",
)
DNS_QUERIES = _counter("ztna_dns_queries", "DNS queries taken.", (DNSD,), transport="2: udp, tcp")
DNS_FORWARDED = _counter(
    "ztna_dns_forwarded",
    "DNS queries handed on to upstreams: answered, failed, or too_many at once.",
    (DNSD,),
    outcome="3: answered, failed, too_many",
)
DNS_CONNECTIONS = _gauge("ztna_dns_tcp_connections", "Open DNS connections over TCP.", (DNSD,))
WORKERS = _gauge("ztna_dns_workers", "Processes beside dnsd's own that answer on its port.", (DNSD,))
WORKER_ENDS = _counter("ztna_dns_worker_ends", "Workers that ended and were to be started again.", (DNSD,))
WORKER_CPU = _counter(
    "ztna_dns_worker_cpu_seconds", "Processor time of all workers, those that ended too.", (DNSD,)
)
WORKER_MEMORY = _gauge("ztna_dns_worker_resident_bytes", "Resident memory of all workers, summed.", (DNSD,))
NOTIFIES = _counter(
    "ztna_dns_notifies",
    "NOTIFY messages by what became of them.",
    (DNSD,),
    outcome="at most 5, fixed in the code",
)
TRANSFERS = _counter("ztna_dns_transfers", "Zone transfers by kind.", (DNSD,), kind="3: axfr, ixfr, refused")
CONFIRMED = _gauge(
    "ztna_catalog_confirmed_seconds",
    "Unix time when Consul last confirmed the names served; 0: never.",
    (DNSD,),
)
SERVED = _gauge(
    "ztna_dns_served",
    "Whether names are served: 2 confirmed, 1 stale (Consul is away), 0 not.",
    (DNSD,),
)
ZONE_SERVICES = _gauge("ztna_dns_services", "Services in the zone that dnsd serves.", (DNSD,))

# Relays.

FORWARDED = _counter(
    "ztna_forwarded_packets",
    "UDP packets that the relay's forwarder passed on, by who did it.",
    (RELAY,),
    by="2: user (space), kernel",
)
FORWARDED_BYTES = _counter(
    "ztna_forwarded_bytes",
    "Sealed bytes that the relay passed on in both directions: of UDP links, of spliced TCP, or opened for ztna-v1. "
    "What goes directly is not seen.",
    (RELAY,),
    carrier="3: udp, tcp, v1",
)
FORWARDING_IN_KERNEL = _gauge(
    "ztna_forwarding_in_kernel", "1 while the kernel forwards for the relay.", (RELAY,)
)
FORWARDING_FELL_BACK = _gauge(
    "ztna_forwarding_fell_back",
    "1 while the kernel does not forward though it was to (relay.forwarding kernel), or did before.",
    (RELAY,),
)
SESSIONS_OPENED = _counter("ztna_relay_sessions_opened", "Sessions that a relay opened.", (RELAY,))
SESSION_ENDS = _counter(
    "ztna_relay_sessions_closed",
    "Sessions of a relay that ended, by the reason.",
    (RELAY,),
    reason=_REASON,
)
SESSION_OPEN_SECONDS = _histogram(
    "ztna_relay_session_open_seconds",
    "From an agent's `open` to the connector's `accepted`; with the session as exemplar.",
    (RELAY,),
    _SHORT,
)
RELAY_SIZES = _gauge(
    "ztna_relay_live",
    "What a relay holds: connections (of them over TLS), sessions, services registered, srv names, links, tcp pairs.",
    (RELAY,),
    what="7: connections, tls_connections, sessions, services, srv_names, links, tcp_pairs",
)
SRV_AGE = _gauge(
    "ztna_relay_catalog_age_seconds",
    "How long ago the catalog behind the SRV answers was confirmed; -1: never.",
    (RELAY,),
)

# Agents and connectors.

RELAYS = _gauge(
    "ztna_relays",
    "Relays that are configured or found by DNS, by whether the connection to each stands.",
    SIDECARS,
    state="2: connected, away",
)
RELAY_RTT = _gauge(
    "ztna_relay_rtt_seconds",
    "Round trip time to each connected relay.",
    SIDECARS,
    relay="as many as relays are configured; found by DNS, at most 8",
)
SESSIONS_LIVE = _gauge("ztna_sessions", "Sessions that are open at this end.", SIDECARS)
FLOWS_LIVE = _gauge(
    "ztna_flows",
    "Flows that run now: TCP connections of programs, and UDP or ICMP flows that are not idle.",
    SIDECARS,
    protocol="2: tcp, udp (ICMP too)",
)
LINKS_LIVE = _gauge(
    "ztna_links",
    "Packet links to other ends, by their path.",
    SIDECARS,
    path="4: direct, forwarded, dialling, spare",
)
LINK_BYTES = _counter(
    "ztna_link_bytes",
    "Bytes of flows carried to and from the other ends, by carrier: packet (QUIC over UDP) or stream (TLS over TCP).",
    SIDECARS,
    carrier="2: packet, stream",
    direction="2: sent, received",
)
TCP_FLOWS = _counter(
    "ztna_tcp_flows",
    "TCP flows whose carrier broke, by what became of them: detached, then resumed or forsaken.",
    SIDECARS,
    outcome="3: detached, resumed, forsaken",
)

# Agents.

FLOW_OPEN_SECONDS = _histogram(
    "ztna_flow_open_seconds",
    "From a program's TCP connection to the answer of the connector, session and carrier included; with the session "
    "as exemplar.",
    (AGENT,),
    _SHORT,
)
FLOWS_FAILED = _counter(
    "ztna_flows_failed", "TCP connections of programs that could not be carried and were reset.", (AGENT,)
)
LEASES_KNOWN = _gauge("ztna_agent_services", "Services whose address this agent serves.", (AGENT,))

# Connectors.

SERVICES_DEFINED = _gauge(
    "ztna_connector_services",
    "Services of a connector: fronted, kept (fronted as before: what they have now is not usable), refused (defined, "
    "but not usable), shadowed (defined again elsewhere).",
    (CONNECTOR,),
    state="4: fronted, kept, refused, shadowed",
)
CONSUL_REFUSED = _gauge(
    "ztna_consul_refused",
    "Instances that Consul does not let a connector register, report or remove.",
    (CONNECTOR,),
    what="3: register, report, remove",
)
SERVICE_HEALTH = _gauge(
    "ztna_connector_service_health",
    "The verdict on each service that is fronted: 2 passing, 1 warning, 0 critical.",
    (CONNECTOR,),
    service="as many as services are fronted",
)
VERDICT_AGE = _gauge(
    "ztna_connector_verdict_age_seconds",
    "For how long each service has had its verdict.",
    (CONNECTOR,),
    service="as many as services are fronted",
)
ROUTE_FILES_BROKEN = _gauge(
    "ztna_route_files_broken",
    "Files of routes whose newest content cannot be used, and what they had before is.",
    (CONNECTOR,),
)
ROUTE_RELOADS = _counter(
    "ztna_route_reloads",
    "Files of routes taken into use while running, by kind: config, or file (of routes_dir).",
    (CONNECTOR,),
    kind="2: config, file",
)
SRV_BACKENDS_AGE = _gauge(
    "ztna_srv_backends_age_seconds",
    "How old the answer is that the backends of a name come from: 0 while DNS answers.",
    (CONNECTOR,),
    name="as many as routes have srv:// backends",
)


class Tallied:
    """A number that a hot path counts for itself; `settle` brings its counter up to it when somebody asks."""

    __slots__ = ("_counter", "_told", "count")

    def __init__(self, counter: Counter) -> None:
        self.count = 0
        self._counter = counter
        self._told = 0

    def settle(self) -> None:
        """Bring the counter up to the number."""
        self._counter.inc(self.count - self._told)
        self._told = self.count


LINK_TALLIES: Mapping[tuple[str, str], Tallied] = {
    (carrier, direction): Tallied(LINK_BYTES.labels(carrier, direction))
    for carrier in ("packet", "stream")
    for direction in ("sent", "received")
}


class Page:
    """The registry as one daemon shows it: without what only others set, which would be noughts that mean nothing."""

    def __init__(self, daemon: str) -> None:
        """`daemon` is its command, such as `ztna-sidecar agent`; another shows everything."""
        role = daemon.removeprefix("ztna-").removeprefix("sidecar ")
        self._role = role if role in EVERY else None

    def collect(self) -> Iterator[Metric]:
        """Return the families."""
        for tallied in LINK_TALLIES.values():
            tallied.settle()
        for family in REGISTRY.collect():
            told = METRICS.get(family.name)
            if told is None or self._role is None or self._role in told.daemons:
                yield family


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
