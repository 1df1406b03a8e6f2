"""Whether this host has what a configuration's modes want of its kernel: nftables, TUN, ping sockets.

Tried as whoever asks: the daemons may have other rights than that.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from ztna.config import AgentConfig, Config, ConnectorConfig
from ztna.findings import Finding, Verdict
from ztna.nft import LIBRARY, Nft, NftError

TUN = Path("/dev/net/tun")
PING_GROUPS = "net.ipv4.ping_group_range"


def examine(config: Config, *, tun: Path = TUN) -> Iterator[Finding]:
    """Yield what is found about what the configured modes and routes need, nothing about what they do not."""
    if config.agent is not None:
        yield from _agent(config.agent, tun)
    if config.connector is not None and _pings(config.connector):
        yield ping_sockets()


def _agent(config: AgentConfig, tun: Path) -> Iterator[Finding]:
    if config.mode == "listen":
        return
    yield nftables(config.mode)
    if config.mode == "tun":
        yield tun_device(tun)


def nftables(mode: str) -> Finding:
    """See whether rules can be set: anyip does without, for a price, tun does not."""
    check = "nftables"
    try:
        nft = Nft()
        try:
            nft.run("list tables")
        finally:
            nft.close()
    except NftError as error:
        verdict = Verdict.WARNING if mode == "anyip" else Verdict.WRONG
        todo = f"install {LIBRARY} (Debian: libnftables1), and give the agent CAP_NET_ADMIN (docs/agent-modes.md)"
        return Finding(check, verdict, f"agent.mode {mode}: {error}", todo)
    return Finding(check, Verdict.FINE, f"agent.mode {mode} can redirect")


def tun_device(path: Path) -> Finding:
    """See whether a TUN device can be asked for."""
    try:
        with path.open("r+b", buffering=0):
            pass
    except OSError as error:
        todo = f"`modprobe tun`; in a container, let it have {path} (docs/agent-modes.md)"
        return Finding("TUN", Verdict.WRONG, f"agent.mode tun: {path}: {error.strerror}", todo)
    return Finding("TUN", Verdict.FINE, f"{path} can be opened")


def ping_sockets() -> Finding:
    """See whether this user may ping without privileges (icmp(7))."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP):
            pass
    except OSError as error:
        todo = f"set {PING_GROUPS} so that it holds the connector's group (docs/health.md)"
        return Finding("ping", Verdict.WARNING, f"a route or check pings: {error.strerror}", todo)
    return Finding("ping", Verdict.FINE, f"{PING_GROUPS} lets this user's groups ping")


def _pings(config: ConnectorConfig) -> bool:
    """Say whether a route has its backend's host pinged, for agents or as a check."""
    return any(
        (route.protocol == "icmp" and route.icmp == "backend")
        or "icmp" in {check.kind for check in route.checks}
        for route in config.routes
    )
