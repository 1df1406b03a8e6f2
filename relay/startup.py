"""What a relay needs before it starts: checked resolvers, credentials, keys, addresses and sockets.

Each refuses with a ConfigError, or a ZtnaError for what the machine does not give.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from relay import splicer
from relay.links import Limits
from relay.rules import Rules
from ztna import quic
from ztna.ca import write_private
from ztna.config import Endpoint, RelayConfig
from ztna.credentials import Credentials
from ztna.errors import ConfigError, ZtnaError
from ztna.runtime import Readiness
from ztna.udp import SockAddr, UdpSocket
from ztna.udp_bulk import BulkSocket
from ztna.wire.control import Address

PORT_ATTEMPTS = 20


def check_resolvers(config: RelayConfig, readiness: Readiness) -> None:
    """Refuse resolvers that somebody in between could answer for: DNS decides permission (design.md 2.2)."""
    for resolver in config.resolvers:
        try:
            local = resolver.is_unix or ip_address(resolver.host).is_loopback
        except ValueError:
            raise ConfigError(
                f"relay.resolvers: {resolver}: expected a numeric IP address and a port, or unix:/path"
            ) from None
        if local or config.dns_key is not None:
            continue
        if not config.dns_insecure:
            raise ConfigError(
                f"relay.resolvers: {resolver} is neither on loopback nor a unix socket, and whoever answers DNS "
                "decides permission; run a dnsd or a secondary here, sign with relay.dns_key, or set "
                "relay.dns_insecure: true"
            )
        readiness.warn("dns_insecure", f"unauthenticated DNS from {resolver} decides permission")


def load_credentials(config: RelayConfig) -> Credentials:
    """Return the relay's credentials. Raises ConfigError unless they carry its configured name."""
    credentials = Credentials.load(config.tls)
    check_name(config, credentials)
    return credentials


def check_name(config: RelayConfig, credentials: Credentials) -> None:
    """Raise ConfigError unless the certificate is of the relay that is configured."""
    if credentials.identity.relay != config.name:
        raise ConfigError(
            f"tls.certificate: {config.tls.certificate} carries no relay.{config.name}.ztna (relay.name)"
        )


def reset_key(path: str | None, credentials: Credentials) -> bytes:
    """Return the key of stateless resets, made and kept in the file when it is not there yet.

    Without a file it comes from the relay's private key: it must outlive a crash, or the peers of a relay that
    was restarted would notice only by its silence.
    """
    if path is None:
        return credentials.derived_key("stateless reset")
    file = Path(path)
    try:
        if not file.exists():
            write_private(file, os.urandom(quic.RESET_KEY_BYTES))
        key = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"relay.reset_key_file: {path}: {error.strerror}") from None
    if len(key) != quic.RESET_KEY_BYTES:
        raise ConfigError(f"relay.reset_key_file: {path}: expected {quic.RESET_KEY_BYTES} bytes")
    return key


def link_limits(config: RelayConfig) -> Limits:
    """Return what one link may carry."""
    return Limits(config.link_rate_bytes_per_s, config.link_quota_bytes, config.link_quota_period_s)


def rules(config: RelayConfig) -> Rules:
    """Return what the operator decided about sessions."""
    return Rules(
        config.sessions_per_identity,
        config.sessions_per_service,
        config.sessions_total,
        config.leaving,
        config.leave_grace_s,
    )


def advertised(config: RelayConfig) -> Address | None:
    """Return the forwarder's address to tell peers, None when it depends on how they reach this host."""
    endpoint = config.forwarder_advertise
    if endpoint is None:
        return None
    try:
        return Address(str(ip_address(endpoint.host)), endpoint.port)
    except ValueError:
        raise ConfigError(f"relay.forwarder_advertise: {endpoint}: expected a numeric IP address") from None


def forwarder_sockets(endpoint: Endpoint, *, shared: bool) -> tuple[socket.socket, BulkSocket]:
    """Return the TCP and UDP socket of one port; others may `share` the UDP port. Raises ZtnaError."""
    for attempt in range(PORT_ATTEMPTS):
        listener = splicer.listen((endpoint.host, endpoint.port))
        try:
            address = endpoint.host, listener.getsockname()[1]
            return listener, BulkSocket.open(address, reuse_port=shared)
        except ZtnaError:
            listener.close()
            # With port 0 the port that TCP got may be somebody's on UDP: another one then.
            if endpoint.port or attempt == PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("the loop returns or raises")


def control_sockets(
    endpoint: Endpoint, received: Callable[[list[tuple[bytes, SockAddr]]], None]
) -> tuple[UdpSocket, socket.socket]:
    """Return the UDP socket that QUIC comes to and the TCP listener of the same port. Raises ZtnaError."""
    for attempt in range(PORT_ATTEMPTS):
        udp = UdpSocket.open((endpoint.host, endpoint.port), received)
        try:
            return udp, splicer.listen((endpoint.host, udp.address[1]))
        except ZtnaError:
            udp.close()
            if endpoint.port or attempt == PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("the loop returns or raises")
