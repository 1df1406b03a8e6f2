"""Configuration as types: file, then environment, then flags (design.md 3).

One YAML or JSON file, one top key per daemon (`relay`, `dnsd`, `connector`, `agent`) beside the shared
`domain`, `consul` and `log`. An unknown key or a bad value raises ConfigError with its path. Opens no file
that a configuration names: certificates, keys and tokens are their users'. What a connector fronts is
ztna.routes_config's.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from ztna import sections
from ztna.names import ConnectorId, RelayName, ServiceName, Zone
from ztna.routes_config import BackendConfig as BackendConfig
from ztna.routes_config import BackendTlsConfig as BackendTlsConfig
from ztna.routes_config import CheckConfig as CheckConfig
from ztna.routes_config import RouteConfig as RouteConfig
from ztna.routes_config import RoutesFile as RoutesFile
from ztna.routes_config import shown_in_consul as shown_in_consul
from ztna.sections import Count, Seconds, Section, Server, about
from ztna.sections import Endpoint as Endpoint
from ztna.wire.control import Address

DAEMON_SECTIONS = ("relay", "dnsd", "connector", "agent")

ListenPort = Annotated[int, msgspec.Meta(ge=0, le=65535)]
LinkBytes = Annotated[int, msgspec.Meta(ge=10_000, le=10**15)]


class TlsConfig(Section, frozen=True, kw_only=True):
    """A daemon's own certificate chain and key (PEM, the key 0600) and whom it trusts."""

    certificate: Annotated[
        str, about("PEM file: the daemon's leaf, then its intermediates.", "/etc/ztna/daemon.pem")
    ]
    key: Annotated[
        str, about("PEM file of the leaf's private key; mode 0600 or 0400.", "/etc/ztna/daemon.key")
    ]
    ca: Annotated[
        str, about("PEM file of the certificate authorities whose peers are believed.", "/etc/ztna/ca.pem")
    ]
    crl_file: Annotated[
        str | None,
        about("File with the CRLs (PEM or DER) of whoever issues leaves; unset: none.", "/etc/ztna/crl.pem"),
    ] = None
    crl_url: Annotated[
        str | None,
        about(
            "Where the CRL is fetched instead: http, https or file.",
            "http://vault.example.net/v1/pki/crl/pem",
        ),
    ] = None
    crl_refresh_s: Annotated[Seconds, about("How often crl_url is fetched at least, in seconds.")] = 60.0


class ConsulLoginConfig(Section, frozen=True, kw_only=True):
    """A login to Consul by a JWT, such as Nomad's workload identities; it is renewed, and ended with the daemon."""

    method: Annotated[str, about("The JWT auth method, by its name in Consul.", "nomad-workloads")]
    jwt_file: Annotated[
        str, about("File with the JWT, read at each login.", "/var/nomad/secrets/nomad_consul.jwt")
    ]


class ConsulConfig(Section, frozen=True, kw_only=True):
    """How to reach Consul's HTTP API."""

    address: Annotated[str, about("Consul's HTTP API: http://host:port or https://host:port.")] = (
        "http://127.0.0.1:8500"
    )
    token: Annotated[str | None, about("ACL token; token_file keeps it out of this file.", "6b1e...")] = None
    token_file: Annotated[
        str | None,
        about("File that holds the ACL token; a new one is taken up at once.", "/etc/ztna/consul.token"),
    ] = None
    login: Annotated[ConsulLoginConfig | None, about("Log in for the token instead (auth method jwt).")] = (
        None
    )
    datacenter: Annotated[
        str | None, about("The one datacenter whose catalog is used; unset: the agent's own.", "dc1")
    ] = None
    ca: Annotated[
        str | None,
        about("PEM file of the authorities for https; unset: the system's.", "/etc/ztna/consul-ca.pem"),
    ] = None
    certificate: Annotated[
        str | None,
        about("Client certificate for https, when Consul asks for one.", "/etc/ztna/consul-client.pem"),
    ] = None
    key: Annotated[str | None, about("Its private key.", "/etc/ztna/consul-client.key")] = None
    timeout_s: Annotated[
        Seconds, about("A request that is not a blocking query ends by then, in seconds.")
    ] = 10.0


class LogConfig(Section, frozen=True, kw_only=True):
    """`auto` is human on a terminal and JSON otherwise."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        about("The least level that is written: debug, info, warning or error."),
    ] = "info"
    format: Annotated[
        Literal["auto", "human", "json"],
        about("human, json, or auto: human on a terminal and JSON lines otherwise."),
    ] = "auto"


class TsigKeyConfig(Section, frozen=True, kw_only=True):
    """A secret that signs DNS messages (RFC 8945); both sides name it alike."""

    name: Annotated[str, about("The key's name, as the other side calls it.", "transfer.ztna")]
    secret_file: Annotated[
        str,
        about("File with the secret in base64, 16 bytes or more; mode 0600 or 0400.", "/etc/ztna/dns.key"),
    ]
    algorithm: Annotated[
        Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"],
        about("hmac-sha256, hmac-sha384 or hmac-sha512."),
    ] = "hmac-sha256"


class NotifyConfig(Section, frozen=True, kw_only=True):
    """Who is told when names change (RFC 1996)."""

    address: Annotated[Endpoint, about("Where it listens, a numeric address.", "192.0.2.53:53")]
    key: Annotated[
        str | None, about("Name of the key that signs what it is told; unset: unsigned.", "transfer.ztna")
    ] = None


class TransferConfig(Section, frozen=True, kw_only=True):
    """Other servers that serve the zone, with dnsd as their hidden primary (AXFR, IXFR, NOTIFY)."""

    allow: Annotated[
        tuple[IPv4Network, ...],
        about("Who may transfer the zone without a signature; with one of dnsd.keys anybody may."),
    ] = ()
    notify: Annotated[
        tuple[NotifyConfig, ...], about("The secondaries and relays that are told when names change.")
    ] = ()


class PoolConfig(Section, frozen=True, kw_only=True):
    """The addresses that leases are taken from."""

    cidr: Annotated[IPv4Network, about("The network that virtual addresses are leased from.")] = IPv4Network(
        "10.100.0.0/16"
    )
    more: Annotated[
        tuple[IPv4Network, ...], about("Further networks, each used once those before it are full.")
    ] = ()
    reserved: Annotated[
        tuple[IPv4Network, ...],
        about("What is never leased, a gateway for one; network and broadcast addresses never are."),
    ] = ()
    ula: Annotated[
        IPv6Network | None,
        about(
            "A /96 that gives each lease an IPv6 address in DNS; agents serve it with agent.ula; unset: IPv4 only.",
            "fd12:3456:789a::/96",
        ),
    ] = None


class RelayRecordConfig(Section, frozen=True, kw_only=True):
    """A relay that DNS names to agents and connectors."""

    name: Annotated[RelayName, about("Its name, as its certificate has it.", "edge-1")]
    address: Annotated[Address, about("Where it listens, a numeric IPv4 address.", "192.0.2.20:4433")]


class DnsdConfig(Section, frozen=True, kw_only=True):
    """ztna-dnsd."""

    listen: Annotated[Endpoint, about("Where it answers, UDP and TCP.")] = Endpoint("127.0.0.1", 5533)
    admin: Annotated[Endpoint, about("Where /metrics, /healthz, /readyz and /status are served.")] = Endpoint(
        "127.0.0.1", 9432
    )
    workers: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=64)],
        about("Processes that answer; two or more share the port beside one that keeps the names."),
    ] = 1
    socket: Annotated[
        str | None,
        about(
            "Unix socket that answers whoever may open it; its directory must be dnsd's.",
            "/run/ztna/dns.sock",
        ),
    ] = None
    allow: Annotated[tuple[IPv4Network, ...], about("Who may ask; everybody else is refused.")] = (
        IPv4Network("127.0.0.0/8"),
    )
    keys: Annotated[
        tuple[TsigKeyConfig, ...],
        about("TSIG keys; who signs with one may ask and transfer, wherever they are."),
    ] = ()
    transfer: Annotated[TransferConfig, about("Secondaries of the zone.")] = TransferConfig()
    pool: Annotated[PoolConfig, about("The addresses that leases are taken from.")] = PoolConfig()
    keeper: Annotated[bool, about("Stand for election as the keeper of the leases.")] = True
    relays: Annotated[
        tuple[RelayRecordConfig, ...],
        about("Relays to be found at _ztna-relay._udp.<domain> (SRV) by agents and connectors."),
    ] = ()
    ttl_s: Annotated[Annotated[int, msgspec.Meta(ge=0, le=86400)], about("TTL of answers, in seconds.")] = 5
    negative_ttl_s: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=86400)],
        about("How long a name that does not exist may be remembered, in seconds."),
    ] = 10
    upstreams: Annotated[
        tuple[Endpoint, ...],
        about("Who is asked for names outside the zone, in this order; empty: those are refused."),
    ] = ()
    upstream_timeout_s: Annotated[Seconds, about("How long each upstream may take, in seconds.")] = 1.5
    rate_limit: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1_000_000)],
        about("Answers a second to one address over UDP, but for valid cookies; 0: no limit."),
    ] = 2000.0
    rate_limit_loopback: Annotated[bool, about("Hold programs on this machine to rate_limit, too.")] = False
    nsid: Annotated[
        str | None, about("Name of this server, told to who asks (NSID, CH TXT id.server).", "dns-1")
    ] = None
    version_bind: Annotated[bool, about("Tell the version of ztna-dnsd to CH TXT version.bind.")] = False
    snapshot: Annotated[
        str | None,
        about(
            "File that keeps the last names over a restart; unset: none are kept.",
            "/var/lib/ztna/dnsd.names",
        ),
    ] = None
    stale_max_s: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=86400)],
        about("How long names that Consul does not confirm are served, marked as stale; a day at most."),
    ] = 86400.0
    quarantine_s: Annotated[
        Seconds, about("How long a freed address is kept from other services; more than any TTL.")
    ] = 3600.0
    grace_s: Annotated[
        Seconds, about("How long a service without instances keeps its lease, in seconds.")
    ] = 300.0
    keeper_session_ttl_s: Annotated[
        Annotated[float, msgspec.Meta(ge=10, le=86400)],
        about("TTL of the keeper's session in Consul, 10 seconds to a day."),
    ] = 10.0


class RelayConfig(Section, frozen=True, kw_only=True):
    """ztna-relay. `name` must stand in its certificate as `relay.<name>.ztna`."""

    name: Annotated[
        RelayName, about("Its name, which its certificate carries as relay.<name>.ztna.", "edge-1")
    ]
    tls: Annotated[TlsConfig, about("Its own certificate and whom it trusts.")]
    listen: Annotated[Endpoint, about("Where agents and connectors connect: UDP (QUIC) and TCP (TLS).")] = (
        Endpoint("0.0.0.0", 4433)
    )
    forwarder: Annotated[
        Endpoint, about("Where links that have no direct path are forwarded, UDP and TCP.")
    ] = Endpoint("0.0.0.0", 4434)
    forwarder_advertise: Annotated[
        Endpoint | None,
        about("The forwarder's address as peers reach it, when it is another.", "203.0.113.7:4434"),
    ] = None
    forwarding: Annotated[
        Literal["user", "kernel", "auto"],
        about("Who copies links' packets: user (this process), kernel (nftables, else user), auto (either)."),
    ] = "user"
    forwarder_workers: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=64)],
        about("Threads that copy links' packets in user space, a socket each; the kernel scales further."),
    ] = 1
    link_rate_bytes_per_s: Annotated[
        LinkBytes | None,
        about(
            "The most that a link may carry each way, over UDP and over TCP, in bytes a second.", 12_500_000
        ),
    ] = None
    link_quota_bytes: Annotated[
        LinkBytes | None,
        about("The most that one agent and one connector may exchange by forwarder in a period.", 10**11),
    ] = None
    link_quota_period_s: Annotated[Seconds, about("That period, in seconds.")] = 86_400.0
    admin: Annotated[Endpoint, about("Where /metrics, /healthz, /readyz and /status are served.")] = Endpoint(
        "127.0.0.1", 9431
    )
    resolvers: Annotated[
        tuple[Server, ...],
        about(
            "The dnsd's (or secondaries) asked for SRV records: on loopback, or unix:/path of a dnsd.socket, "
            "unless dns_key or dns_insecure."
        ),
    ] = (Server("127.0.0.1", 5533),)
    dns_key: Annotated[
        TsigKeyConfig | None, about("Signs what is asked; only answers signed with it are believed.")
    ] = None
    notify_listen: Annotated[
        Endpoint | None,
        about(
            "Where it is told that names changed (NOTIFY, UDP), by a resolver or with dns_key.",
            "127.0.0.1:5534",
        ),
    ] = None
    dns_insecure: Annotated[
        bool, about("Accept resolvers that are not on loopback: whoever answers DNS decides permission.")
    ] = False
    reset_key_file: Annotated[
        str | None,
        about(
            "File with the key of stateless resets, made when missing; unset: made from the TLS key.",
            "/var/lib/ztna/reset.key",
        ),
    ] = None
    retry: Annotated[bool, about("Make clients prove their address before a handshake (QUIC Retry).")] = True
    sessions_per_identity: Annotated[Count, about("The most sessions one identity may have.")] = 1000
    sessions_per_service: Annotated[Count, about("The most sessions with one service.")] = 20_000
    sessions_total: Annotated[Count, about("The most sessions in all.")] = 100_000
    audit_log: Annotated[
        str | None,
        about(
            "File for a JSON line of each session opened, denied or closed (0600); SIGHUP opens it anew.",
            "/var/log/ztna/audit.log",
        ),
    ] = None
    admin_socket: Annotated[
        str | None,
        about(
            "Unix socket (0600) that serves what admin does, and lets its owner close sessions.",
            "/run/ztna/relay.sock",
        ),
    ] = None
    leaving: Annotated[
        Literal["close", "move"],
        about(
            "Sessions whose connector left the SRV records: close them, or move what is new and let TCP finish."
        ),
    ] = "close"
    leave_grace_s: Annotated[
        Seconds, about("How long such sessions go on in any case, as checks may flap; in seconds.")
    ] = 10.0
    half_open_max: Annotated[
        Count, about("The most handshakes under way at once, of QUIC and of TLS each.")
    ] = 1000
    half_open_per_source: Annotated[
        Count, about("The most of them from one IPv4 address or IPv6 /64; many hosts may share a NAT.")
    ] = 250
    srv_hold_s: Annotated[
        Seconds, about("How long sessions outlive the last confirmed catalog read, in seconds.")
    ] = 600.0
    drain_s: Annotated[Seconds, about("How long sessions may go on after SIGTERM, in seconds.")] = 25.0
    others: Annotated[
        tuple[RelayName, ...], about("The names of other relays, which peers are told when this one drains.")
    ] = ()


class RelayTarget(Section, frozen=True, kw_only=True):
    """A relay that an agent or connector connects to, and the name its certificate must carry."""

    address: Annotated[Endpoint, about("Where it listens; the host may be a name.", "relay.example.net:4433")]
    name: Annotated[RelayName, about("The name its certificate must carry as relay.<name>.ztna.", "edge-1")]
    forwarders: Annotated[
        tuple[Address, ...],
        about("Where its forwarder may be beside the relay's own host (its relay.forwarder_advertise)."),
    ] = ()


class ConnectorConfig(Section, frozen=True, kw_only=True):
    """ztna-sidecar connector."""

    id: Annotated[
        ConnectorId,
        about("Its id: <name> or <name>--<instance>; its certificate carries id.<name>.ztna.", "rack-7"),
    ]
    tls: Annotated[TlsConfig, about("Its own certificate and whom it trusts.")]
    relays: Annotated[tuple[RelayTarget, ...], about("The relays it keeps a connection to.")] = ()
    resolvers: Annotated[
        tuple[Endpoint, ...],
        about(
            "DNS servers asked for more relays: SRV records of _ztna-relay._udp.<domain>, followed by TTL."
        ),
    ] = ()
    routes: Annotated[
        tuple[RouteConfig, ...], about("The services it fronts, of those that stand here.")
    ] = ()
    routes_dir: Annotated[
        str | None,
        about("A directory whose YAML and JSON files have more of them; watched.", "/etc/ztna/routes.d"),
    ] = None
    api: Annotated[
        str | None,
        about(
            "Unix socket where programs of this host add services (ztna services).",
            "/run/ztna/connector.sock",
        ),
    ] = None
    api_state: Annotated[
        str | None,
        about(
            "Where the services that came by the API are kept; required with it.",
            "/var/lib/ztna/services.json",
        ),
    ] = None
    consul_services: Annotated[
        bool,
        about("Front services too that others registered with the local Consul agent, tagged ztna."),
    ] = False
    srv_resolvers: Annotated[
        tuple[Endpoint, ...],
        about("DNS servers asked for backends that are srv://NAME; none: those of /etc/resolv.conf."),
    ] = ()
    srv_keep_s: Annotated[
        Seconds, about("So long the last answer for such a name holds while DNS does not answer, in seconds.")
    ] = 3600.0
    link: Annotated[Endpoint, about("Where agents connect directly, UDP and TCP.")] = Endpoint(
        "0.0.0.0", 4435
    )
    link_advertise: Annotated[
        Address | None, about("That address as agents reach it, when it is another.", "192.0.2.10:4435")
    ] = None
    admin: Annotated[Endpoint, about("Where /metrics, /healthz, /readyz and /status are served.")] = Endpoint(
        "127.0.0.1", 9433
    )
    deregister_critical_after_s: Annotated[
        Annotated[float, msgspec.Meta(ge=60, le=31_536_000)],
        about("Consul removes an instance that was critical for so long; at least 60 s."),
    ] = 600.0
    ttl_s: Annotated[
        Annotated[float, msgspec.Meta(ge=3, le=86400)],
        about("TTL of the checks in Consul, refreshed each third of it, in seconds."),
    ] = 15.0
    private_candidates: Annotated[
        bool, about("Offer and try private addresses (RFC 1918) too when looking for a direct path.")
    ] = False
    flows_per_agent: Annotated[
        Count, about("The most flows of one agent: so many of UDP and ICMP, and so many of TCP.")
    ] = 1000
    flows_total: Annotated[Count, about("The most flows in all, counted alike.")] = 20_000
    flow_log: Annotated[
        str | None,
        about(
            "File for a JSON line of each flow that ended, with its bytes (0600); SIGHUP opens it anew.",
            "/var/log/ztna/flows.log",
        ),
    ] = None
    drain_s: Annotated[
        Seconds, about("How long TCP flows may go on after SIGTERM, in seconds; a route may say less.")
    ] = 25.0


class Override(Section, frozen=True, kw_only=True):
    """Where one service is on this host, whatever its lease."""

    service: Annotated[ServiceName, about("The service's name.", "web-app")]
    ip: Annotated[IPv4Address, about("An address of this host; 127.0.0.0/8 is always its.", "127.53.0.80")]


AgentMode = Literal["listen", "anyip", "tun"]


class AgentConfig(Section, frozen=True, kw_only=True):
    """ztna-sidecar agent."""

    tls: Annotated[TlsConfig, about("Its own certificate and whom it trusts.")]
    relays: Annotated[
        tuple[RelayTarget, ...], about("The relays it keeps a connection to; the nearest is preferred.")
    ] = ()
    resolvers: Annotated[
        tuple[Endpoint, ...],
        about(
            "DNS servers asked for more relays: SRV records of _ztna-relay._udp.<domain>, followed by TTL."
        ),
    ] = ()
    mode: Annotated[
        AgentMode,
        about(
            "listen: a pool inside 127.0.0.0/8, no privileges; anyip: any pool, by a local route; tun: any pool, by a "
            "device of its own, and ping."
        ),
    ] = "listen"
    allow_uids: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFE)], ...] | None,
        about("The local users (numeric ids) whose programs may use the agent; unset: all.", (1000, 1001)),
    ] = None
    pool: Annotated[IPv4Network, about("The network of virtual addresses; the same as dnsd's.")] = (
        IPv4Network("10.100.0.0/16")
    )
    more_pools: Annotated[
        tuple[IPv4Network, ...], about("Further networks of virtual addresses; those of dnsd.pool.more.")
    ] = ()
    ula: Annotated[
        IPv6Network | None,
        about(
            "dnsd.pool.ula: serve the IPv6 address beside each lease too (anyip, tun).", "fd12:3456:789a::/96"
        ),
    ] = None
    overrides: Annotated[
        tuple[Override, ...],
        about("Services that are called at an address of this host instead of their lease."),
    ] = ()
    names: Annotated[
        Literal["consul", "relay"],
        about("Where it learns names and addresses: consul, or relay where Consul is out of reach."),
    ] = "consul"
    dns_listen: Annotated[
        Endpoint | None,
        about(
            "Answer this host's questions about the zone here, UDP and TCP, through the relay.",
            "127.0.0.1:5533",
        ),
    ] = None
    hosts_file: Annotated[
        str, about("Where this host's own names stand: what it says of services is compared with the leases.")
    ] = "/etc/hosts"
    direct: Annotated[bool, about("Try connectors directly before forwarding through a relay.")] = True
    private_candidates: Annotated[
        bool, about("Offer and try private addresses (RFC 1918) too when looking for a direct path.")
    ] = False
    tcp_on_punched: Annotated[
        Literal["relay", "packet"],
        about(
            "TCP where only UDP goes directly: relay (TLS through the relay, much faster) or packet (a QUIC stream on "
            "the direct path, which no relay carries)."
        ),
    ] = "relay"
    admin: Annotated[Endpoint, about("Where /metrics, /healthz, /readyz and /status are served.")] = Endpoint(
        "127.0.0.1", 9434
    )
    admin_socket: Annotated[
        str | None,
        about(
            "Unix socket (mode 0600) for `ztna ping` and `ztna trace`; unset: none.", "/run/ztna/agent.sock"
        ),
    ] = None
    flows_total: Annotated[Count, about("The most flows in all.")] = 20_000
    udp_idle_s: Annotated[Seconds, about("A UDP flow that is silent for so many seconds is forgotten.")] = (
        120.0
    )
    drain_s: Annotated[Seconds, about("How long flows may go on after SIGTERM, in seconds.")] = 5.0


class Config(Section, frozen=True, kw_only=True):
    """A whole file; a daemon reads the shared sections and its own."""

    domain: Annotated[Zone, about("The zone of the services' names.")] = Zone("ztna.local")
    consul: Annotated[ConsulConfig, about("How to reach Consul's HTTP API.")] = ConsulConfig()
    log: Annotated[LogConfig, about("What is logged and how.")] = LogConfig()
    dnsd: Annotated[DnsdConfig | None, about("The dnsd's own section.")] = None
    relay: Annotated[RelayConfig | None, about("The relay's own section.")] = None
    connector: Annotated[ConnectorConfig | None, about("The connector's own section.")] = None
    agent: Annotated[AgentConfig | None, about("The agent's own section.")] = None


def load(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str], section: str | None = None
) -> Config:
    """Read the file, then `ZTNA_<SECTION>_<KEY>` of the environment, then overrides `{"relay.listen": ...}`.

    `section` is the daemon that asks: its section is read from the environment even when the file has
    none; of other daemons only those in the file are. Raises ConfigError naming the key's path.
    """
    raw = sections.read_file(path) if path is not None else {}
    for name, text in sorted(environ.items()):
        keys = sections.environment_path(Config, name)
        if keys and (keys[0] not in DAEMON_SECTIONS or keys[0] in raw or keys[0] == section):
            sections.override(Config, raw, keys, text)
    for dotted, text in overrides.items():
        sections.override(Config, raw, sections.flag_path(Config, dotted), text)
    return sections.build(Config, raw)


def dump(config: Config, *, secrets: bool = False) -> str:
    """Return the configuration as YAML that load reads; secrets are hidden unless asked for."""
    return yaml.safe_dump(sections.plain(config, secrets=secrets), sort_keys=False)


def example(section: str) -> str:
    """Return a daemon's example file: each key with what it is for and its default, made from the types."""
    # The relay knows DNS and certificates, never Consul (design.md 2.2).
    shared = ("domain", "log") if section == "relay" else ("domain", "consul", "log")
    lines = [
        f"# Example configuration, top key `{section}`. Keys marked (required) have no default; the others",
        "# show theirs. Keys can be given as variables too (ZTNA_LOG_LEVEL) and as flags (--set log.level=debug).",
    ]
    for field in msgspec.structs.fields(Config):
        if field.name in (*shared, section):
            lines += ["", *sections.described(field)]
    return "\n".join(lines) + "\n"
