"""What a connector fronts, as types: routes, their backends, how these are reached, balanced and checked.

Part of ztna.config. What does not go together is sidecar.connector.routes' to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Annotated, Literal

import msgspec

from ztna.leases import Protocol
from ztna.names import ServiceName
from ztna.sections import Backend, Count, Endpoint, PortNumber, Seconds, Section, about

UDP_IDLE_SECONDS = 120.0
"""RFC 4787, REQ-5: a UDP mapping lives for at least two minutes."""
TCP_IDLE_SECONDS = 7_440.0
"""RFC 5382, REQ-5: an established connection lives for at least two hours and four minutes."""


SECRET_HEADER = re.compile(r"auth|cookie|token|secret|key|passw|credential", re.IGNORECASE)
"""Names of headers whose values are worth to be kept: Authorization, Cookie, X-Api-Key and their like."""


class CheckConfig(Section, frozen=True, kw_only=True):
    """How a backend's health is found out. Texts to send and to expect may be `hex:00ff...`."""

    kind: Annotated[
        Literal["auto", "tcp", "udp", "http", "grpc", "icmp", "script", "ttl", "none"],
        about(
            "tcp (connect), udp (ICMP errors fail), http, grpc (its health service), icmp (ping), script, "
            "ttl (the program tells connector.api), none (passing) or auto (by protocol)."
        ),
    ] = "auto"
    runner: Annotated[
        Literal["sidecar", "consul"],
        about(
            "Who asks: sidecar, the connector itself, or consul, its agent, where it can (docs/consul.md): headers, "
            "paths and commands can then be read in Consul."
        ),
    ] = "sidecar"
    port: Annotated[
        PortNumber | None, about("Ask this port of the backend's host instead of its own.", 8081)
    ] = None
    tls: Annotated[bool, about("Ask by TLS (http, grpc).")] = False
    ca: Annotated[
        str | None,
        about("PEM file of the authorities for that; unset: the system's.", "/etc/ztna/backend-ca.pem"),
    ] = None
    tls_name: Annotated[
        str | None, about("The name in its certificate; unset: the backend's host.", "web.internal")
    ] = None
    tls_skip_verify: Annotated[bool, about("Take any certificate: what answers may be anybody.")] = False
    method: Annotated[Literal["GET", "HEAD", "POST"], about("How an http check asks.")] = "GET"
    path: Annotated[str, about("What an http check asks for.")] = "/"
    headers: Annotated[
        tuple[str, ...], about("Headers an http check sends, each `Name: value`.", ["Host: web.internal"])
    ] = ()
    status: Annotated[tuple[str, ...], about("What may answer an http check: statuses and ranges.")] = (
        "200-299",
    )
    expect_headers: Annotated[
        tuple[str, ...],
        about(
            "Headers its answer must have, each `Name: regular expression`; several: all of them.",
            ["Content-Type: json"],
        ),
    ] = ()
    body: Annotated[
        str | None, about("Regular expression that the first 64 KiB of the answer must match.", "ready")
    ] = None
    send: Annotated[str | None, about("What a udp or tcp check sends.", "ping")] = None
    expect: Annotated[str | None, about("What the reply to it must contain; unset: anything.", "pong")] = None
    grpc_service: Annotated[str, about("The service that a grpc check asks about; empty: the server.")] = ""
    command: Annotated[
        tuple[str, ...],
        about("What a script check runs, no shell: 0 passes, 1 warns.", ["/usr/lib/checks/web", "--fast"]),
    ] = ()
    ttl_s: Annotated[
        Seconds, about("A ttl check is critical when its program says nothing for so long, in seconds.")
    ] = 30.0
    interval_s: Annotated[Seconds, about("Seconds from one check to the next.")] = 5.0
    jitter: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=0.5)],
        about("Each wait is up to this part of it longer or shorter."),
    ] = 0.1
    timeout_s: Annotated[Seconds, about("A check that takes longer has failed, in seconds.")] = 2.0
    success_before_passing: Annotated[Count, about("Successes in a row before the service is passing.")] = 1
    failures_before_warning: Annotated[
        Count | None, about("Failures in a row before it is warning; unset: it never is.", 1)
    ] = None
    failures_before_critical: Annotated[Count, about("Failures in a row before the service is critical.")] = 2
    flaps_max: Annotated[
        Count, about("After it was critical so many times in 300 s it has to prove itself for flap_hold_s.")
    ] = 5
    flap_hold_s: Annotated[Seconds, about("That time without a failure, in seconds.")] = 60.0


class BackendTlsConfig(Section, frozen=True, kw_only=True):
    """How connections to a backend are made by TLS."""

    ca: Annotated[
        str | None,
        about(
            "PEM file of the authorities it is verified with; unset: the system's.",
            "/etc/ztna/backend-ca.pem",
        ),
    ] = None
    name: Annotated[
        str | None,
        about("The name in its certificate, sent as SNI; unset: the backend's host.", "web.internal"),
    ] = None
    certificate: Annotated[
        str | None, about("PEM file of our client certificate, if it asks for one.", "/etc/ztna/to-web.pem")
    ] = None
    key: Annotated[
        str | None, about("PEM file of its private key; mode 0600 or 0400.", "/etc/ztna/to-web.key")
    ] = None


class BackendConfig(Section, frozen=True, kw_only=True):
    """One of several backends behind a route."""

    address: Annotated[Endpoint, about("Where it really listens.", "10.0.0.11:8080")]
    weight: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=65535)], about("Its part among the route's backends.")
    ] = 1
    priority: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=65535)],
        about("It gets flows only while none of a lower priority can serve (RFC 2782)."),
    ] = 0
    checks: Annotated[
        tuple[CheckConfig, ...] | None,
        about(
            "How its health is found out; unset: as the route says.", ({"kind": "http", "path": "/ready"},)
        ),
    ] = None


class RouteConfig(Section, frozen=True, kw_only=True):
    """One published port of a service: where its backends listen, how they are chosen, reached and checked."""

    service: Annotated[ServiceName, about("The service's name: one lower-case label.", "web-app")]
    backend: Annotated[
        Backend | None,
        about(
            "Where it really listens, if that is one place; or srv://NAME, which DNS knows.", "127.0.0.1:8080"
        ),
    ] = None
    backends: Annotated[
        tuple[BackendConfig, ...], about("Where it really listens, if there are several.")
    ] = ()
    balance: Annotated[
        Literal["round_robin", "least_connections", "source_hash"],
        about("Which backend gets a flow: round_robin, least_connections, or source_hash: the agent's own."),
    ] = "round_robin"
    eject_after: Annotated[
        Count, about("Connections in a row that a backend fails before it is passed over.")
    ] = 3
    eject_s: Annotated[
        Seconds, about("For how long, in seconds; doubled each time while it goes on failing, up to 300.")
    ] = 10.0
    port: Annotated[
        PortNumber | None,
        about("The port on its virtual address; required, but for icmp, which has none.", 80),
    ] = None
    protocol: Annotated[Protocol, about("tcp, udp or icmp (ping, from agents in mode tun).")] = "tcp"
    icmp: Annotated[
        Literal["backend", "connector"],
        about("Who answers pings of a route of protocol icmp: the backend's host, or the connector."),
    ] = "backend"
    checks: Annotated[
        tuple[CheckConfig, ...], about("How a backend's health is found out: it is the worst of these.")
    ] = (CheckConfig(),)
    slow_start_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=86_400)],
        about("Its weight grows for so long after it was critical, in seconds; 0: at once."),
    ] = 0.0
    connect_timeout_s: Annotated[
        Seconds, about("How long a connection to the backend may take, in seconds.")
    ] = 5.0
    tcp_idle_s: Annotated[
        Seconds, about("A TCP flow on which nothing moves for so many seconds is reset.")
    ] = TCP_IDLE_SECONDS
    udp_idle_s: Annotated[Seconds, about("A UDP flow that is silent for so many seconds is forgotten.")] = (
        UDP_IDLE_SECONDS
    )
    drain_s: Annotated[
        Seconds | None,
        about("How long its TCP flows may go on after SIGTERM, in seconds; unset: connector.drain_s.", 10.0),
    ] = None
    proxy_protocol: Annotated[
        Literal["none", "v1", "v2"],
        about("Tell the backend who connects (HAProxy's PROXY protocol, tcp): v1, v2, or none."),
    ] = "none"
    backend_tls: Annotated[
        BackendTlsConfig | None, about("Connect to the backend by TLS (tcp); unset: plainly.")
    ] = None
    allow_v1: Annotated[bool, about("Take packets of ztna-v1 agents, which the relay can read.")] = False
    weight: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=65535)],
        about("Weight among the service's instances (RFC 2782)."),
    ] = 1
    wildcard: Annotated[bool, about("Let every name under the service's lead to it, too.")] = False
    virtual_ip: Annotated[
        IPv4Address | None,
        about("The virtual address it asks for; given if nobody else has it.", "10.100.0.80"),
    ] = None


class RoutesFile(Section, frozen=True, kw_only=True):
    """A file of connector.routes_dir, and what the local API takes."""

    routes: Annotated[tuple[RouteConfig, ...], about("The services it fronts.")] = ()


def shown_in_consul(routes: Iterable[RouteConfig]) -> dict[ServiceName, str]:
    """Return the services whose checks of `runner: consul` put secrets into Consul, and what of them, in words.

    Consul keeps a check's definition where whoever may read the service, or its node, reads it too.
    """
    found: dict[ServiceName, set[str]] = {}
    for route in routes:
        checks = [*route.checks, *(check for each in route.backends for check in each.checks or ())]
        names = {
            name
            for check in checks
            if check.runner == "consul"
            for name in (header.partition(":")[0].strip() for header in check.headers)
            if SECRET_HEADER.search(name)
        }
        if names:
            found.setdefault(route.service, set()).update(names)
    return {
        service: f"{service}: checks.headers: {', '.join(sorted(names))} can be read in Consul by whoever may "
        "read the service there, as Consul runs the check; use runner: sidecar to keep it here"
        for service, names in found.items()
    }
