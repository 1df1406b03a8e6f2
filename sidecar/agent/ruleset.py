"""The nftables table that leads what local programs send to virtual addresses to the agent, as text for nft.

    output      a user that may not, a TCP port that nobody published: refused, whoever else listens on 0.0.0.0
    output nat  TCP to a published port: to the one listener, which asks the kernel for the original destination
    prerouting  UDP to a published port, as it comes back over lo: to the one socket, as it is (tproxy)
    input       UDP to a port that nobody published: unreachable
    forward     what other hosts and containers send, where this host routes: refused, the agent is for its programs

Prerouting and input are anyip's; in mode tun UDP goes to the device. What the agent itself sends is marked. Pure: makes
text and reads what nft lists; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import NamedTuple

import msgspec

from ztna.conflicts import AnyNetwork
from ztna.leases import Protocol

MARK = 0x5A54
"""SO_MARK of what the agent sends to programs from virtual addresses (nothing routes by it)."""
NOT_ALLOWED = "not_allowed"
ELEMENTS_PER_COMMAND_MAX = 1000
TABLE_PREFIX = "ztna_agent_"

_PRIORITY = -150
"""Before any destination NAT, ours among them: addresses are still those that programs call."""
_NAT_PRIORITY = -101
"""Just before the usual one, -100: of two that would redirect a connection the first does."""


class Spot(NamedTuple):
    """A published port at an address that programs call."""

    protocol: Protocol
    address: str
    port: int

    @property
    def set_name(self) -> str:
        """The set it is in."""
        return f"{self.protocol}{6 if ':' in self.address else 4}"


@dataclass(frozen=True, slots=True)
class Doors:
    """The agent's own ports on 127.0.0.1 and ::1 by set name, None where there is none."""

    tcp4: int
    tcp6: int | None = None
    udp4: int | None = None
    udp6: int | None = None


def table_name(pool: AnyNetwork) -> str:
    """Return the name of the table of the agent that has this pool."""
    return TABLE_PREFIX + str(pool).translate(str.maketrans("./:", "___"))


class Ruleset:
    """The table of one agent. `uids` are the users that may use it, None all."""

    def __init__(self, name: str, doors: Doors, uids: Collection[int] | None) -> None:
        self._name = f"inet {name}"
        self._doors = doors
        self._uids = uids

    def create(self) -> str:
        """Return what makes the table; it is its maker's and goes when that does, however it ends."""
        return f"""table {self._name} {{
    flags owner
    counter {NOT_ALLOWED} {{ }}
    set pools4 {{
        type ipv4_addr
        flags interval
    }}
    set pools6 {{
        type ipv6_addr
        flags interval
    }}
    {self._spot_sets()}
    chain published {{
        ip daddr . tcp dport != @tcp4 reject with tcp reset
        ip6 daddr . tcp dport != @tcp6 reject with tcp reset
    }}
    chain called {{
        tcp flags & (syn | ack) != syn accept
        icmp type != echo-request accept
        icmpv6 type != echo-request accept
        {self._uid_rules()}
    }}
    chain output {{
        type filter hook output priority {_PRIORITY}
        meta mark {MARK} accept
        ip daddr @pools4 goto called
        ip6 daddr @pools6 goto called
    }}
    chain forward {{
        type filter hook forward priority {_PRIORITY}
        ip daddr @pools4 reject
        ip6 daddr @pools6 reject
    }}
    chain onward {{
        type nat hook output priority {_NAT_PRIORITY}
        ip daddr . tcp dport @tcp4 redirect to :{self._doors.tcp4}
        {self._redirect6()}
    }}
    {self._udp_chains()}
}}
"""

    def change(self, add: Iterable[Spot], remove: Iterable[Spot]) -> list[str]:
        """Return what publishes spots and takes others back, in commands of a bounded size.

        Those that the kernel may refuse for want of room come first: to add again what is there is no error to nft, to
        delete again what is not would be.
        """
        return [*self._elements("add", add), *self._elements("delete", remove)]

    def pools(self, add: Iterable[AnyNetwork], remove: Iterable[AnyNetwork]) -> str:
        """Return what changes the networks in which nothing but what is published may be called."""
        return "".join(
            f"{verb} element {self._name} pools{4 if isinstance(pool, IPv4Network) else 6} {{ {pool} }}\n"
            for verb, pools in (("delete", remove), ("add", add))
            for pool in pools
        )

    def read_refused(self) -> str:
        """Return what reads how many packets of users that may not were refused, and begins again at 0."""
        return f"reset counter {self._name} {NOT_ALLOWED}\n"

    def refused(self, printed: str) -> int:
        """Return what `read_refused` printed."""
        return sum(
            entry["counter"]["packets"]
            for line in printed.splitlines()
            for entry in msgspec.json.decode(line)["nftables"]
            if "counter" in entry
        )

    def _elements(self, verb: str, spots: Iterable[Spot]) -> list[str]:
        by_set: dict[str, list[str]] = {}
        for spot in spots:
            by_set.setdefault(spot.set_name, []).append(f"{spot.address} . {spot.port}")
        return [
            f"{verb} element {self._name} {name} {{ {', '.join(some)} }}\n"
            for name, elements in by_set.items()
            for start in range(0, len(elements), ELEMENTS_PER_COMMAND_MAX)
            for some in (elements[start : start + ELEMENTS_PER_COMMAND_MAX],)
        ]

    def _spot_sets(self) -> str:
        kinds = [("tcp4", "ipv4_addr"), ("tcp6", "ipv6_addr"), ("udp4", "ipv4_addr"), ("udp6", "ipv6_addr")]
        return "\n    ".join(
            f"set {name} {{\n        type {address} . inet_service\n    }}" for name, address in kinds
        )

    def _uid_rules(self) -> str:
        """Allow by name: what has no user (the kernel's own) is refused too."""
        if self._uids is None:
            return "goto published"
        allowed = ", ".join(map(str, sorted(self._uids)))
        by_user = f"meta skuid {{ {allowed} }} goto published" if allowed else ""
        return f"""{by_user}
        counter name {NOT_ALLOWED}
        meta l4proto tcp reject with tcp reset
        drop"""

    def _redirect6(self) -> str:
        door = self._doors.tcp6
        return f"ip6 daddr . tcp dport @tcp6 redirect to :{door}" if door is not None else ""

    def _udp_chains(self) -> str:
        doors = self._doors
        if doors.udp4 is None:
            return ""
        six = (
            f"ip6 daddr . udp dport @udp6 tproxy ip6 to [::1]:{doors.udp6} accept"
            if doors.udp6 is not None
            else ""
        )
        return f"""chain prerouting {{
        type filter hook prerouting priority {_PRIORITY}
        iif != lo accept
        meta mark {MARK} accept
        ip daddr . udp dport @udp4 tproxy ip to 127.0.0.1:{doors.udp4} accept
        {six}
    }}
    chain unpublished {{
        ip daddr . udp dport @udp4 accept
        ip6 daddr . udp dport @udp6 accept
        meta l4proto udp reject
    }}
    chain input {{
        type filter hook input priority {_PRIORITY}
        iif != lo accept
        meta mark {MARK} accept
        ip daddr @pools4 goto unpublished
        ip6 daddr @pools6 goto unpublished
    }}"""
