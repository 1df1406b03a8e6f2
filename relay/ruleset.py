"""The nftables table that forwards the QUIC of bound links in the kernel, as text for nft.

    arrives at our port, byte 0 has 0x40 --> sides? --> destination from `onward_address`, `onward_port`
    leaves                               --> `sources`: source is our address and port again
    anything else (binds, who is not bound) goes on to the socket of relay.forwarder

Stateless on purpose: nothing is tracked (`notrack`), so no conntrack entry outlives its element, and a flow stops
with the transaction that takes its element out. Pure: makes text and reads what nft lists; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from relay.links import Limits
from ztna.wire.control import Address

ELEMENT_SECONDS = 60
"""Where an element leads is forgotten unless it is refreshed: a daemon that hangs forwards nothing for ever."""
PORT_ELEMENT_SECONDS = ELEMENT_SECONDS + 5
"""The port outlives its address, or a packet with the old destination would get the new port."""
UDP_HEADER_BYTES = 8
IP_HEADER_BYTES = {"ip": 20, "ip6": 40}
TOTALS = ("translated", "left", "over_rate")
_ADDRESS_TYPE = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}
_NOT_QUIC = "@th,64,8 & 0x40 == 0"


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a link: packets from `source` go to `onward`, where they come from `ours`.

    `number` is its own while the table lives: its counter is called by it.
    """

    number: int
    source: Address
    onward: Address
    ours: str

    @property
    def counter(self) -> str:
        return f"way{self.number}"


@dataclass(frozen=True, slots=True)
class Count:
    """What a counter has counted: packets (coalesced ones once), and their UDP payload."""

    packets: int
    bytes: int


class Ruleset:
    """The table of one forwarder: `family` is ip or ip6, `port` the forwarder's own."""

    def __init__(self, family: str, port: int, limits: Limits) -> None:
        self._family, self._port, self._limits = family, port, limits
        self._name = f"{family} ztna_forwarder_{port}"

    def create(self) -> str:
        """Return what makes the table; it is its maker's and goes when that does."""
        ip, port = self._family, self._port
        source = f"{ip} saddr . udp sport"
        return f"""table {self._name} {{
    flags owner
    set sides {{
        typeof {source}
    }}
    {self._paced_set(source)}
    map onward_address {{
        typeof {source} : {ip} daddr
        flags timeout
    }}
    map onward_port {{
        typeof {source} : udp dport
        flags timeout
    }}
    map sources {{
        typeof {source} . {ip} daddr . udp dport : {ip} saddr
    }}
    map tallies {{
        type {_ADDRESS_TYPE[ip]} . inet_service : counter
    }}
    counter translated {{ }}
    counter left {{ }}
    counter over_rate {{ }}
    chain onward {{
        {ip} daddr set {source} map @onward_address \
            counter name {source} map @tallies \
            udp dport set {source} map @onward_port counter name translated
    }}
    chain arrived {{
        notrack
        {_NOT_QUIC} accept
        {source} != @sides accept
        {self._paced_rules(source)}
    }}
    chain prerouting {{
        type filter hook prerouting priority raw
        udp dport {port} fib daddr type local goto arrived
    }}
    chain output {{
        type filter hook output priority raw
        udp sport {port} notrack
        {self._redirects()}
    }}
    chain postrouting {{
        type filter hook postrouting priority srcnat
        {ip} saddr set {source} . {ip} daddr . udp dport map @sources udp sport set {port} counter name left
    }}
}}
"""

    def add(self, ways: Iterable[Way]) -> str:
        """Return what adds the ways."""
        return "".join(self._lines("add", ways, known=True))

    def delete(self, ways: Iterable[Way]) -> str:
        """Return what takes them out; all of them must be there."""
        return "".join(self._lines("delete", ways, known=True))

    def refresh(self, ways: Iterable[Way]) -> str:
        """Return what keeps them for another ELEMENT_SECONDS; counters stay."""
        ways = tuple(ways)
        return "".join((*self._lines("delete", ways, known=False), *self._lines("add", ways, known=False)))

    def drop(self) -> str:
        """Return what takes the whole table away."""
        return f"delete table {self._name}\n"

    def read(self, counters: Iterable[str]) -> str:
        """Return what reads counters, and sets them back."""
        return "".join(f"reset counter {self._name} {name}\n" for name in counters)

    def counts(self, printed: str) -> dict[str, Count]:
        """Return what `read` printed by the counter's name."""
        header = IP_HEADER_BYTES[self._family] + UDP_HEADER_BYTES
        counts = {}
        for line in printed.splitlines():
            for entry in msgspec.json.decode(line)["nftables"]:
                if (counter := entry.get("counter")) is not None:
                    packets = counter["packets"]
                    counts[counter["name"]] = Count(packets, counter["bytes"] - packets * header)
        return counts

    def _lines(self, verb: str, ways: Iterable[Way], *, known: bool) -> list[str]:
        """Return a command an element: `known` ones too, which have no timeout."""
        adds = verb == "add"
        address_timeout = f" timeout {ELEMENT_SECONDS}s" if adds else ""
        port_timeout = f" timeout {PORT_ELEMENT_SECONDS}s" if adds else ""
        lines = []
        for way in ways:
            if known and adds:
                lines.append(f"add counter {self._name} {way.counter}\n")
            source, onward = f"{way.source.ip} . {way.source.port}", way.onward
            elements = [
                ("onward_address", f"{source}{address_timeout} : {onward.ip}"),
                ("onward_port", f"{source}{port_timeout} : {onward.port}"),
            ]
            if known:
                elements.append(("sides", source))
                elements.append(("tallies", f'{source} : "{way.counter}"'))
                elements.append(("sources", f"{source} . {onward.ip} . {onward.port} : {way.ours}"))
                if self._limits.rate_bytes_per_s is not None:
                    elements.append(("paced", source))
            lines += [f"{verb} element {self._name} {name} {{ {element} }}\n" for name, element in elements]
            if known and not adds:
                lines.append(f"delete counter {self._name} {way.counter}\n")
        return lines

    def _paced_set(self, source: str) -> str:
        if self._limits.rate_bytes_per_s is None:
            return ""
        rate, burst = self._limits.rate_bytes_per_s, self._limits.burst_bytes
        return f"""set paced {{
        typeof {source}
        limit rate {rate} bytes/second burst {burst} bytes
    }}"""

    def _paced_rules(self, source: str) -> str:
        if self._limits.rate_bytes_per_s is None:
            return "goto onward"
        # An element whose limit is reached does not match.
        return f"""{source} @paced goto onward
        counter name over_rate drop"""

    def _redirects(self) -> str:
        """Return the rule against what a router says of packets that leave where they came in."""
        return "icmp type redirect @th,136,8 17 drop" if self._family == "ip" else ""
