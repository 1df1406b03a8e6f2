"""The certificates and configurations of the mesh that ztna.testing runs, as one archive for a volume.

Everything of it is made anew for each mesh and is worth nothing outside of it. Knows nothing of Docker.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from ipaddress import IPv4Network
from pathlib import Path

from ztna import config as configuration
from ztna.ca import Authority
from ztna.config import (
    AgentConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    DnsdConfig,
    Endpoint,
    PoolConfig,
    RelayConfig,
    RelayTarget,
    TlsConfig,
)
from ztna.names import ConnectorId, RelayName
from ztna.sections import Server

PLACE = Path("/var/lib/ztna")
"""Where the volume is mounted in every container: what the image has there gives it its owner."""
USER = 65532
"""Whom the image runs as."""
POOL = IPv4Network("127.100.0.0/16")
"""On the loopback of the agent's container, where it needs no privileges to listen."""
DNS_PORT, CONSUL_PORT, RELAY_PORT = 5533, 8500, 4433
RELAY = RelayName("relay")
CONNECTOR = "connector"
CERTIFICATE_DAYS = 2
DRAIN_SECONDS = 0.2
_DNS_SOCKET = str(PLACE / "dns.sock")


def archive() -> bytes:
    """Return a tar of what belongs into PLACE, owned by USER."""
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority.create(Path(directory) / "ca", "ztna.testing")
    issued = {
        RELAY: authority.issue(RELAY, relay=RELAY, days=CERTIFICATE_DAYS),
        CONNECTOR: authority.issue(
            CONNECTOR, connector=("*",), connector_id=CONNECTOR, days=CERTIFICATE_DAYS
        ),
        "agent": authority.issue("agent", agent=("*",), days=CERTIFICATE_DAYS),
    }
    files: dict[str, tuple[bytes, int]] = {"ca.pem": (authority.ca_pem, 0o644)}
    for name, (chain, key) in issued.items():
        files |= {f"{name}.pem": (chain, 0o644), f"{name}.key": (key, 0o600)}
    files |= {f"{name}.yaml": (configuration.dump(config).encode(), 0o644) for name, config in _configs()}
    return _tar(files)


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid, entry.gid = len(data), mode, USER, USER
            tar.addfile(entry, io.BytesIO(data))
    return whole.getvalue()


def _configs() -> list[tuple[str, Config]]:
    consul = ConsulConfig(address=f"http://consul:{CONSUL_PORT}")
    relays = (RelayTarget(address=Endpoint(RELAY, RELAY_PORT), name=RELAY),)
    dnsd = DnsdConfig(
        listen=Endpoint("0.0.0.0", DNS_PORT),
        allow=(IPv4Network("0.0.0.0/0"),),
        socket=_DNS_SOCKET,
        pool=PoolConfig(cidr=POOL),
    )
    relay = RelayConfig(
        name=RELAY, tls=_tls(RELAY), resolvers=(Server(_DNS_SOCKET, 0),), drain_s=DRAIN_SECONDS
    )
    connector = ConnectorConfig(
        id=ConnectorId(CONNECTOR),
        tls=_tls(CONNECTOR),
        relays=relays,
        api=str(PLACE / "connector.sock"),
        api_state=str(PLACE / "services.json"),
        drain_s=DRAIN_SECONDS,
    )
    agent = AgentConfig(
        tls=_tls("agent"),
        relays=relays,
        pool=POOL,
        admin_socket=str(PLACE / "agent.sock"),
        drain_s=DRAIN_SECONDS,
    )
    return [
        ("dnsd", Config(consul=consul, dnsd=dnsd)),
        (RELAY, Config(relay=relay)),
        (CONNECTOR, Config(consul=consul, connector=connector)),
        ("agent", Config(consul=consul, agent=agent)),
    ]


def _tls(name: str) -> TlsConfig:
    return TlsConfig(
        certificate=str(PLACE / f"{name}.pem"), key=str(PLACE / f"{name}.key"), ca=str(PLACE / "ca.pem")
    )
