"""Has the kernel forward the QUIC of bound links, where this machine lets it (nftables, see relay.ruleset).

relay.forwarder tells which source goes where; what the kernel does not forward still reaches its socket, so that
nothing depends on this. Gives up with KernelRefused, and then everything goes through user space.
"""

from __future__ import annotations

import itertools
import socket
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from relay.links import Limits, RawAddress, address_of
from relay.ruleset import ELEMENT_SECONDS, TOTALS, Ruleset, Way
from ztna.errors import ZtnaError
from ztna.nft import Nft, NftError
from ztna.telemetry import dropped
from ztna.udp import SockAddr

WHERE = "forwarder"
WAYS_MAX = 2048
"""What is more goes through user space."""
CHANGES_PER_TRANSACTION_MAX = 64
"""The loop waits while a transaction runs: 40 to 100 us for each."""
REFRESHES_PER_TRANSACTION_MAX = 128
"""A second: WAYS_MAX in less than REFRESH_SECONDS."""
COUNTERS_PER_READ_MAX = 512
"""About 10 us each."""
REFRESH_SECONDS = ELEMENT_SECONDS / 3
BLOCKED_PACKETS = 64
"""So many packets given a way, and none that left: something here drops what is forwarded."""
_FORWARDING = {"ip": "/proc/sys/net/ipv4/ip_forward", "ip6": "/proc/sys/net/ipv6/conf/all/forwarding"}


Heard = list[tuple[RawAddress, int, int]]
"""Sources, with the packets and the bytes that they sent."""


class KernelRefused(ZtnaError):
    """The kernel cannot forward here, or can no longer."""


class KernelForwarder:
    """The links that the kernel forwards now. The address and namespace are those of the forwarder's socket."""

    def __init__(self, address: SockAddr, limits: Limits) -> None:
        """Make the table. Raises KernelRefused saying what is missing."""
        host, port = address
        family = "ip6" if ":" in host else "ip"
        self._host = None if host in ("0.0.0.0", "::") else host
        if _is_loopback(host):
            raise KernelRefused(f"{host}: what comes over the loopback is not forwarded")
        _require_forwarding(family)
        self._rules = Ruleset(family, port, limits)
        self._ways: dict[RawAddress, Way] = {}
        self._refreshed: OrderedDict[RawAddress, float] = OrderedDict()
        """When each way was refreshed, the oldest first."""
        self._uncounted: list[RawAddress] = []
        """Whose counters are to be read before anyone's are read again."""
        self._numbers = itertools.count()
        try:
            self._nft = Nft()
            self._nft.run(self._rules.create())
        except NftError as error:
            raise KernelRefused(str(error)) from None

    @property
    def ways(self) -> int:
        """How many directions of links the kernel forwards."""
        return len(self._ways)

    def forwards(self, source: RawAddress) -> bool:
        """Whether the kernel forwards what comes from there."""
        return source in self._ways

    def change(self, changes: Mapping[RawAddress, RawAddress | None], now: float) -> Heard:
        """Let the sources go where they go now; at once, and all in one transaction. Raises KernelRefused.

        Return what was heard of those whose way ended, as `count` does.
        """
        gone = {source: way for source in changes if (way := self._ways.pop(source, None)) is not None}
        for source in gone:
            del self._refreshed[source]
        heard = self._read(gone)
        new: dict[RawAddress, Way] = {}
        for source, onward in changes.items():
            way = None if onward is None else self._way(source, onward)
            if way is None:
                continue
            if len(self._ways) + len(new) >= WAYS_MAX:
                dropped(WHERE, "kernel_full")
                continue
            new[source] = way
        self._ways |= new
        self._refreshed |= dict.fromkeys(new, now)
        if gone or new:
            self._commit(self._rules.delete(gone.values()) + self._rules.add(new.values()), now)
        return heard

    def refresh(self, now: float) -> None:
        """Keep what is there alive; call it every second. Raises KernelRefused."""
        due = itertools.takewhile(lambda each: now - each[1] >= REFRESH_SECONDS, self._refreshed.items())
        sources = [source for source, _ in itertools.islice(due, REFRESHES_PER_TRANSACTION_MAX)]
        if not sources:
            return
        for source in sources:
            self._refreshed[source] = now
            self._refreshed.move_to_end(source)
        self._commit(self._rules.refresh(self._ways[source] for source in sources), now)

    def count(self) -> Heard:
        """Return the sources that were heard since they were read last, with packets and bytes.

        With very many it takes several calls to read all of them. Raises KernelRefused.
        """
        if not self._uncounted:
            self._uncounted = list(self._ways)
        some = self._uncounted[-COUNTERS_PER_READ_MAX:]
        del self._uncounted[-COUNTERS_PER_READ_MAX:]
        return self._read({source: self._ways[source] for source in some if source in self._ways})

    def watch(self) -> int:
        """Return how many packets the rate limit took since the last call.

        Raises KernelRefused when what is forwarded does not get out, a firewall's doing for one.
        """
        totals = self._rules.counts(self._run(self._rules.read(TOTALS)))
        if totals["translated"].packets >= BLOCKED_PACKETS and not totals["left"].packets:
            raise KernelRefused("what is forwarded does not get out: does a firewall drop it?")
        return totals["over_rate"].packets

    def close(self) -> None:
        """Take the table away; harmless twice."""
        self._ways.clear()
        self._nft.close()

    def _way(self, source: RawAddress, onward: RawAddress) -> Way | None:
        """Return the way between two remote addresses; None for one on this host, whom the kernel does not route."""
        near, far = address_of(source), address_of(onward)
        ours = [self._host or _local_address_towards(each.ip) for each in (near, far)]
        if None in ours or near.ip == ours[0] or far.ip == ours[1] or _is_loopback(near.ip, far.ip):
            return None
        return Way(next(self._numbers), near, far, str(ours[1]))

    def _read(self, ways: Mapping[RawAddress, Way]) -> Heard:
        if not ways:
            return []
        counts = self._rules.counts(self._run(self._rules.read(way.counter for way in ways.values())))
        return [
            (source, count.packets, count.bytes)
            for source, way in ways.items()
            if (count := counts[way.counter]).packets
        ]

    def _commit(self, commands: str, now: float) -> None:
        """Run the commands; where the table is not what we think (elements timed out), make it so."""
        try:
            self._nft.run(commands)
        except NftError:
            dropped(WHERE, "kernel_rebuilt")
            self._refreshed = OrderedDict.fromkeys(self._ways, now)
            self._run(self._rules.drop())
            self._run(self._rules.create() + self._rules.add(self._ways.values()))

    def _run(self, commands: str) -> str:
        try:
            return self._nft.run(commands)
        except NftError as error:
            raise KernelRefused(str(error)) from None


def local_address_towards(peer: str) -> str:
    """Return this host's address on the interface that a peer is reached through. Raises OSError."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a UDP socket sends nothing: it only asks the routing table.
        probe.connect((peer, 9))
        address: str = probe.getsockname()[0]
        return address


def _local_address_towards(peer: str) -> str | None:
    try:
        return local_address_towards(peer)
    except OSError:
        return None


def _is_loopback(*hosts: str) -> bool:
    return any(host == "::1" or host.startswith("127.") for host in hosts)


def _require_forwarding(family: str) -> None:
    """Raise KernelRefused unless the machine routes: that is its administrator's to allow."""
    path = _FORWARDING[family]
    try:
        if Path(path).read_text().strip() == "1":
            return
    except OSError:
        pass
    raise KernelRefused(f"{path} is not 1")
