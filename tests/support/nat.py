"""Hosts behind each kind of NAT and firewall, on one test internet; and a prober that says what each really does.

The kinds are those of RFC 4787 (mapping, filtering) under the names that people know. Linux's own masquerade is made
into each by nftables: alone it keeps the port and filters by address and port.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from tests.support.namespaces import Host, Network, run

INSIDE, GATEWAY = "192.168.77.2", "192.168.77.1"
PROBE_PORT, OTHER_PORT = 5001, 5002
PROBE_SECONDS = 5.0
TALKED_SECONDS = 120


class Kind(StrEnum):
    """What stands between a host and the internet."""

    OPEN = "no NAT"
    FULL_CONE = "full cone"
    ADDRESS = "address-restricted"
    PORT = "port-restricted"
    SYMMETRIC = "symmetric"
    BLOCKED = "UDP to the peer dropped"


class Depends(StrEnum):
    """On what of the remote end a mapping, or a filter, depends (RFC 4787 4.1, 5)."""

    NOTHING = "endpoint-independent"
    ADDRESS = "address-dependent"
    ADDRESS_AND_PORT = "address and port-dependent"
    ALL_BUT_ONE = "all but one address dropped"


@dataclass(frozen=True)
class Behaviour:
    """What a prober saw."""

    translates: bool
    mapping: Depends
    filtering: Depends


BEHAVIOURS = {
    Kind.OPEN: Behaviour(False, Depends.NOTHING, Depends.NOTHING),
    Kind.FULL_CONE: Behaviour(True, Depends.NOTHING, Depends.NOTHING),
    Kind.ADDRESS: Behaviour(True, Depends.NOTHING, Depends.ADDRESS),
    Kind.PORT: Behaviour(True, Depends.NOTHING, Depends.ADDRESS_AND_PORT),
    Kind.SYMMETRIC: Behaviour(True, Depends.ADDRESS_AND_PORT, Depends.ADDRESS_AND_PORT),
    Kind.BLOCKED: Behaviour(False, Depends.ALL_BUT_ONE, Depends.ALL_BUT_ONE),
}

# What nobody asked for is dropped before it leaves an entry in the connection table: a later packet to its sender
# would else be given another port.
_ROUTER = """
table ip nat {{
    set talked {{ type ipv4_addr . inet_service; flags dynamic,timeout; timeout {talked}s; }}
    chain talk {{ type filter hook forward priority 0; {talk}; }}
    chain pre {{ type nat hook prerouting priority dstnat; {pre}; }}
    chain post {{ type nat hook postrouting priority srcnat; oifname "eth0" {post}; }}
    chain guard {{ type filter hook input priority 0; iifname "eth0" meta l4proto udp drop; }}
}}
"""
_PRE = {
    Kind.FULL_CONE: f'iifname "eth0" meta l4proto udp dnat to {INSIDE}',
    Kind.ADDRESS: f'iifname "eth0" ip saddr . udp dport @talked dnat to {INSIDE}',
}
_TALK = {Kind.ADDRESS: 'oifname "eth0" meta l4proto udp update @talked { ip daddr . udp sport }'}
_POST = {Kind.SYMMETRIC: "masquerade random,fully-random"}


def place(network: Network, name: str, kind: Kind, reachable: str) -> tuple[Host, str]:
    """Make a host behind this kind; return it and its address as the internet sees it.

    Where UDP is dropped, `reachable` is the one address with which it is not.
    """
    if kind is Kind.OPEN:
        host = network.host(name)
        return host, host.address
    if kind is Kind.BLOCKED:
        host = network.host(name)
        host.nft(udp_only_with(reachable))
        return host, host.address
    router = network.host(f"{name}-gw")
    host = network.behind(name, router, INSIDE, GATEWAY)
    router.nft(
        _ROUTER.format(
            talked=TALKED_SECONDS,
            talk=_TALK.get(kind, ""),
            pre=_PRE.get(kind, ""),
            post=_POST.get(kind, f"snat to {router.address}"),
        )
    )
    return host, router.address


def udp_only_with(address: str, table: str = "blocked") -> str:
    """Return the rules of a host that has UDP with one address of its network and no other."""
    return f"""
table ip {table} {{
    chain in {{ type filter hook input priority -10; iifname "eth0" meta l4proto udp ip saddr != {address} drop; }}
    chain out {{ type filter hook output priority -10; oifname "eth0" meta l4proto udp ip daddr != {address} drop; }}
}}
"""


class Prober:
    """Two addresses on a host of the internet, the first with two ports, that say what a NAT does."""

    def __init__(self, host: Host, other_address: str) -> None:
        run("ip", "-n", host.namespace, "addr", "add", f"{other_address}/32", "dev", "eth0")
        self._near = self._bound(host, (host.address, PROBE_PORT))
        self._port = self._bound(host, (host.address, OTHER_PORT))
        self._far = self._bound(host, (other_address, PROBE_PORT))

    @staticmethod
    def _bound(host: Host, address: tuple[str, int]) -> socket.socket:
        made = host.socket(socket.SOCK_DGRAM)
        made.bind(address)
        made.settimeout(PROBE_SECONDS)
        return made

    def close(self) -> None:
        """Close the sockets."""
        for each in (self._near, self._port, self._far):
            each.close()

    def behaviour(self, host: Host) -> Behaviour:
        """Return what stands before a host. Packets here overtake each other nowhere, so nothing is waited for."""
        with self._inside(host) as asker:
            filtering = self._filtering(asker)
        with self._inside(host) as asker:
            seen = [self._seen(asker, each) for each in (self._far, self._port, self._near)]
            if seen[0] is None:
                mapping = Depends.ALL_BUT_ONE
            elif len(set(seen)) == 1:
                mapping = Depends.NOTHING
            elif seen[1] == seen[2]:
                mapping = Depends.ADDRESS
            else:
                mapping = Depends.ADDRESS_AND_PORT
            translates = seen[2] is None or seen[2][0] != host.address
        return Behaviour(translates, mapping, filtering)

    @staticmethod
    @contextmanager
    def _inside(host: Host) -> Iterator[socket.socket]:
        with host.socket(socket.SOCK_DGRAM) as asker:
            asker.bind(("0.0.0.0", 0))
            asker.settimeout(PROBE_SECONDS)
            yield asker

    def _filtering(self, asker: socket.socket) -> Depends:
        """Have all three answer a packet that went to one of them; the one that was asked is the last to answer."""
        asker.sendto(b"?", self._near.getsockname())
        _, mapped = self._near.recvfrom(64)
        for number, each in enumerate((self._far, self._port, self._near)):
            each.sendto(b"%d" % number, mapped)
        answers: list[bytes] = []
        while b"2" not in answers:
            answers.append(asker.recv(64))
        # The firewall knows only addresses; it is told apart by the mapping.
        if b"0" in answers:
            return Depends.NOTHING
        if b"1" not in answers:
            return Depends.ADDRESS_AND_PORT
        return Depends.ALL_BUT_ONE if self._is_barred(asker) else Depends.ADDRESS

    def _is_barred(self, asker: socket.socket) -> bool:
        """Say whether the far address still cannot answer after it was asked."""
        return self._seen(asker, self._far) is None

    def _seen(self, asker: socket.socket, server: socket.socket) -> tuple[str, int] | None:
        """Return the address under which a server sees the asker; None when it does not."""
        try:
            asker.sendto(b"?", server.getsockname())
        except PermissionError:
            return None  # dropped by its own host's rules
        source: tuple[str, int] = server.recvfrom(64)[1]
        return source
