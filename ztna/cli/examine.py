"""Look at everything on this host that can keep a daemon from working: what `ztna doctor` does.

Looks and asks; changes nothing. What is found is judged by ztna.findings.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ztna import findings
from ztna.cli import admin, examine_kernel
from ztna.config import (
    DAEMON_SECTIONS,
    AgentConfig,
    Config,
    ConnectorConfig,
    Endpoint,
    RelayConfig,
    RelayTarget,
)
from ztna.consul.client import ConsulClient, Right
from ztna.credentials import Credentials
from ztna.dns_keys import load_key
from ztna.errors import BadName, ConfigError, ConsulAclsOff, ConsulError, ProtocolError, ZtnaError
from ztna.findings import Finding, Verdict
from ztna.identity import require_relay
from ztna.jsontypes import from_json
from ztna.listening import LOW_PORTS
from ztna.names import RelayName, Zone
from ztna.quic import Client, Connection, Settings
from ztna.resolver import Resolver
from ztna.sections import Server
from ztna.udp import SockAddr, UdpSocket
from ztna.wire import datagram

IMPORT_NAMES = ("ztna", "sidecar", "dnsd", "relay")
DISTRIBUTION = "ztna-mesh"
RELAY_SECONDS = 5.0
QAD_SECONDS = 2.0
PAYLOAD_SECONDS = 3.0
POLL_SECONDS = 0.02
CONSUL_SECONDS = 5.0
FRESH_SECONDS_MAX = 180.0
RELAY_SRV = "_ztna-relay._udp"
_ALPN = "ztna-v2"
_CONSUL_DAEMONS = ("dnsd", "connector", "agent")


async def examine(configs: Sequence[Config]) -> AsyncIterator[Finding]:
    """Yield what is found, as it is found, about each daemon whose section a configuration has."""
    yield _packages()
    asked: set[str] = set()
    for config in configs:
        daemons = [name for name in DAEMON_SECTIONS if getattr(config, name) is not None]
        for name in daemons:
            credentials = None
            for found in _certificate(config, name):
                if isinstance(found, Credentials):
                    credentials = found
                else:
                    yield found
            for finding in _ports(config, name):
                yield finding
            if name in ("connector", "agent") and credentials is not None:
                async for finding in _relays(name, await _targets(config, name), credentials):
                    yield finding
        for finding in examine_kernel.examine(config):
            yield finding
        async for finding in _consul(config, [name for name in daemons if name in _CONSUL_DAEMONS], asked):
            yield finding
        async for finding in _resolvers(config):
            yield finding


def _packages() -> Finding:
    found: dict[str, str | None] = {}
    for name in IMPORT_NAMES:
        spec = find_spec(name)
        origin = spec.origin if spec is not None else None
        found[name] = str(Path(origin).resolve().parent.parent) if origin else None
    by_name = packages_distributions()
    others = {name: {by for by in by_name.get(name, ()) if by != DISTRIBUTION} for name in IMPORT_NAMES}
    ours = found["ztna"] or ""
    return findings.distributions(found, ours, others)


def _certificate(config: Config, name: str) -> Iterator[Finding | Credentials]:
    """Yield what is found, and the credentials when they can be used."""
    tls = getattr(getattr(config, name), "tls", None)
    if tls is None:
        return
    try:
        credentials = Credentials.load(tls)
    except ConfigError as error:
        yield Finding(f"{name} certificate", Verdict.WRONG, str(error), "see docs/certificates.md")
        return
    yield findings.certificate(credentials.identity, datetime.now(UTC), name)
    yield credentials


# --- ports


def _ports(config: Config, name: str) -> Iterator[Finding]:
    """Find out whether the daemon runs, or else whether it could have its ports."""
    section = getattr(config, name)
    try:
        status = from_json(admin.fetch(str(section.admin), "/status")[1], dict[str, Any])
        if name in str(status.get("daemon")):
            yield Finding(f"{name} ports", Verdict.FINE, f"it runs, process {status.get('pid')}")
            return
    except ZtnaError:
        pass  # it does not run, or somebody else has the port: what binding says is told
    taken = [text for key, kind, at in _listens(name, section) if (text := _taken(key, kind, at))]
    if not taken:
        yield Finding(f"{name} ports", Verdict.FINE, "it does not run, and its ports are free")
    for text in taken:
        yield Finding(f"{name} ports", Verdict.WRONG, *text)


def _listens(name: str, section: object) -> Iterator[tuple[str, socket.SocketKind, Endpoint]]:
    both = {"dnsd": ("listen",), "relay": ("listen", "forwarder"), "connector": ("link",)}.get(name, ())
    for key in both:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            yield f"{name}.{key}", kind, getattr(section, key)
    yield f"{name}.admin", socket.SOCK_STREAM, section.admin  # type: ignore[attr-defined]


def _taken(key: str, kind: socket.SocketKind, at: Endpoint) -> tuple[str, str] | None:
    """Say why an address cannot be had and what to do about it, None when it can."""
    if at.port == 0:
        return None
    protocol = "udp" if kind is socket.SOCK_DGRAM else "tcp"
    with socket.socket(socket.AF_INET6 if ":" in at.host else socket.AF_INET, kind) as sock:
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((at.host, at.port))
        except OSError as error:
            told = f"{key} {at} ({protocol}): "
            if error.errno == errno.EADDRINUSE:
                advice = "`ss -lntup` shows who has it: end that, or set another port"
                return f"{told}somebody else has it", advice
            advice = (
                LOW_PORTS if isinstance(error, PermissionError) else "`ip addr` shows this host's addresses"
            )
            return f"{told}{error.strerror}", advice
    return None


# --- Consul


async def _consul(config: Config, daemons: Sequence[str], asked: set[str]) -> AsyncIterator[Finding]:
    """Ask a Consul how it is, unless that was `asked` before, and what each daemon's token may."""
    if not daemons:
        return
    try:
        async with ConsulClient(config.consul) as client:
            if client.address not in asked:
                asked.add(client.address)
                yield await _leader(client)
                yield findings.clock(time.time() - await client.clock(), "Consul")
            for name in daemons:
                yield await _rights(client, config, name)
    except (ConsulError, ConfigError) as error:
        todo = "see consul.address, its TLS files and its token in the configuration"
        yield Finding("Consul", Verdict.WRONG, str(error), todo)


async def _leader(client: ConsulClient) -> Finding:
    leader = await client.leader()
    if leader is None:
        told, todo = f"{client.address} has no leader", "see `consul operator raft list-peers`"
        return Finding("Consul", Verdict.WRONG, told, todo)
    return Finding("Consul", Verdict.FINE, f"{client.address} answers, its leader is {leader}")


async def _rights(client: ConsulClient, config: Config, daemon: str) -> Finding:
    wanted = rights(config, daemon)
    try:
        allowed = await client.may(wanted)
    except ConsulAclsOff:
        told = "Consul has ACLs off: whoever reaches it may write leases and services"
        todo = "set acl.default_policy = deny there, and give each daemon its policy (docs/policies)"
        return Finding(f"{daemon} token", Verdict.WARNING, told, todo)
    lacking = [str(right) for right, has in zip(wanted, allowed, strict=True) if not has]
    return findings.rights(lacking, daemon, len(wanted))


def rights(config: Config, daemon: str) -> list[Right]:
    """Return what a daemon's token must allow: what docs/policies/<daemon>.hcl gives."""
    read = [Right("service", "any", "read"), Right("node", "any", "read")]
    if daemon == "dnsd":
        keeper = config.dnsd is not None and config.dnsd.keeper
        lease = "write" if keeper else "read"
        found = [
            *read,
            Right("key", "ztna/schema", lease),
            Right("key", "ztna/vip/service/any", lease),
            Right("key", "ztna/vip/ip/192.0.2.1", lease),
        ]
        return [*found, Right("session", "any", "write")] if keeper else found
    found = [Right("key", "ztna/schema", "read"), Right("key", "ztna/vip/service/any", "read")]
    if daemon == "agent":
        return [*read, *found, Right("session", "any", "write")]
    services = (
        sorted({str(route.service) for route in config.connector.routes})
        if config.connector is not None
        else []
    )
    return [*found, *(Right("service", name, "write") for name in services)]


# --- DNS


async def _resolvers(config: Config) -> AsyncIterator[Finding]:
    """Ask what a relay's decisions hang on."""
    if config.relay is None:
        return
    for resolver in config.relay.resolvers:
        yield await _fresh(resolver, config.domain, config.relay)


async def _fresh(resolver: Server, domain: Zone, config: RelayConfig) -> Finding:
    check, name = f"resolver {resolver}", f"_fresh.{domain}"
    try:
        key = load_key(config.dns_key, "relay.dns_key") if config.dns_key else None
        answer = await Resolver((resolver,), timeout_s=QAD_SECONDS, key=key).txt(name)
        confirmed = float(next(iter(answer.strings)))
    except (ZtnaError, StopIteration, ValueError) as error:
        todo = "a dnsd, or a secondary of it, must answer there (docs/names.md); relays authorise by what it says"
        return Finding(check, Verdict.WRONG, f"no {name}: {error}", todo)
    age = time.time() - confirmed
    if age > FRESH_SECONDS_MAX:
        todo = (
            "see whether dnsd reaches Consul: relays end sessions when this grows older than relay.srv_hold_s"
        )
        return Finding(check, Verdict.WARNING, f"its catalog was confirmed {age:.0f} s ago", todo)
    return Finding(check, Verdict.FINE, f"its catalog was confirmed {max(age, 0):.0f} s ago")


# --- relays


async def _targets(config: Config, daemon: str) -> Sequence[RelayTarget]:
    """Return the relays that a daemon knows: those listed, or else those that DNS names."""
    section: ConnectorConfig | AgentConfig = getattr(config, daemon)
    if section.relays or not section.resolvers:
        return section.relays
    try:
        answer = await Resolver(section.resolvers, timeout_s=QAD_SECONDS).srv(f"{RELAY_SRV}.{config.domain}")
    except ZtnaError:
        return ()
    targets = []
    for record in sorted(answer.records):
        with suppress(BadName):  # the sidecars pass it over, too
            name = RelayName(record.target.partition(".")[0].lower())
            targets += [
                RelayTarget(name=name, address=Endpoint(host, record.port)) for host in record.addresses[:1]
            ]
    return targets


async def _relays(
    daemon: str, targets: Sequence[RelayTarget], credentials: Credentials
) -> AsyncIterator[Finding]:
    """Connect to each relay from one socket, as the daemon would, and see what it sees."""
    if not targets:
        told = f"no relay is known: none is listed, and {daemon}.resolvers name none"
        yield Finding(
            "relay", Verdict.WRONG, told, f"set {daemon}.relays, or look at what DNS says of {RELAY_SRV}"
        )
        return
    clients: dict[SockAddr, Client] = {}

    def received(packets: list[tuple[bytes, SockAddr]]) -> None:
        for packet in packets:
            if packet[1] in clients:
                clients[packet[1]].packets_received([packet])

    try:
        sock = UdpSocket.open(("0.0.0.0", 0), received)
    except ZtnaError as error:
        yield Finding("UDP", Verdict.WRONG, str(error))
        return
    seen: dict[str, SockAddr] = {}
    hosts: set[str] = set()
    try:
        for target in targets:
            async for finding in _relay(daemon, target, credentials, sock, clients, seen):
                yield finding
            hosts |= _own_address(target)
        yield findings.mapping(sock.address, hosts, seen)
    finally:
        for client in clients.values():
            client.close()
        sock.close()


async def _relay(
    daemon: str,
    target: RelayTarget,
    credentials: Credentials,
    sock: UdpSocket,
    clients: dict[SockAddr, Client],
    seen: dict[str, SockAddr],
) -> AsyncIterator[Finding]:
    where = f"relay {target.name} at {target.address}"
    try:
        address = await _address(target.address)
    except (OSError, UnicodeError) as error:
        told = f"{where}: {getattr(error, 'strerror', None) or error}"
        yield Finding("relay", Verdict.WRONG, told, f"see {daemon}.relays")
        return
    yield await _tcp(where, address)
    observer = _Observer()
    client = clients[address] = Client(
        sock,
        address,
        target.name,
        credentials,
        Settings(
            alpn=(_ALPN,),
            udp_payload=1200,
            udp_payload_probe=findings.ETHERNET_PAYLOAD_BYTES,
            ping_interval_s=1.0,
        ),
        check=lambda identity: require_relay(identity, target.name),
        factory=lambda _: observer,
    )
    try:
        connection = await client.connect(RELAY_SECONDS)
    except ZtnaError as error:
        todo = "let UDP through to it, and see in its log which certificate it refused"
        yield Finding("UDP", Verdict.WRONG, f"{where}: {error}", todo)
        return
    rtt = f", round trip {1000 * connection.rtt_s:.0f} ms" if connection.rtt_s is not None else ""
    yield Finding("UDP", Verdict.FINE, f"{where} accepts this certificate{rtt}")
    with suppress(TimeoutError):
        async with asyncio.timeout(QAD_SECONDS):
            seen[target.name] = await observer.seen
    yield findings.payload(await _payload(connection), target.name)


class _Observer:
    """Hears what address a relay sees, and nothing else."""

    def __init__(self) -> None:
        self.seen: asyncio.Future[SockAddr] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes) -> None:
        with suppress(ProtocolError):
            message = datagram.decode(data)
            if isinstance(message, datagram.Qad) and not self.seen.done():
                self.seen.set_result((str(message.ip), message.port))

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        pass

    def peer_address_changed(self, address: SockAddr) -> None:
        pass

    def connection_closed(self, code: int, reason: str) -> None:
        self.seen.cancel()


async def _payload(connection: Connection) -> int:
    """Return the largest UDP payload that was acknowledged, once a larger one was or the time for it is over."""
    small = connection.udp_payload
    for _ in range(int(PAYLOAD_SECONDS / POLL_SECONDS)):
        if connection.udp_payload != small:
            break
        await asyncio.sleep(POLL_SECONDS)
    return connection.udp_payload


async def _tcp(where: str, address: SockAddr) -> Finding:
    started = time.monotonic()
    try:
        async with asyncio.timeout(RELAY_SECONDS):
            _, writer = await asyncio.open_connection(*address)
    except TimeoutError:
        said = f"no answer within {RELAY_SECONDS:g} s"
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
    else:
        writer.close()
        return Finding(
            "TCP", Verdict.FINE, f"{where} is reached in {1000 * (time.monotonic() - started):.0f} ms"
        )
    return Finding(
        "TCP", Verdict.WARNING, f"{where}: {said}", "let TCP through to it: TCP flows are slower without"
    )


async def _address(endpoint: Endpoint) -> SockAddr:
    """Return the first address, IPv4 preferred. Raises OSError, or UnicodeError for what is no name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
    host, port = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][:2]
    return str(host), int(port)


def _own_address(target: RelayTarget) -> set[str]:
    """Return the address that this host would send from to a relay."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError, UnicodeError):
        sock.connect((target.address.host, target.address.port))
        return {sock.getsockname()[0]}
    return set()
