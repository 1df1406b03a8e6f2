"""The addresses that may be leased: networks without their ends and without what is reserved.

Pure. Knows no lease: who has which address is dnsd.keeper's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network


class Range:
    """One network of a pool."""

    def __init__(self, cidr: IPv4Network, reserved: Iterable[IPv4Network]) -> None:
        self.cidr = cidr
        # Network and broadcast address; a /31 and a /32 have none (RFC 3021).
        ends = 1 if cidr.num_addresses > 2 else 0
        self._first = int(cidr.network_address) + ends
        self._last = int(cidr.broadcast_address) - ends
        self._blocks = self._merged(reserved)
        self._starts = [first for first, _ in self._blocks]
        self.size = self._last - self._first + 1 - sum(last - first + 1 for first, last in self._blocks)

    def __contains__(self, address: IPv4Address) -> bool:
        number = int(address)
        return self._first <= number <= self._last and self._block(number) is None

    def probe(self, name: str) -> Iterator[IPv4Address]:
        """Yield every address once, beginning where the name hashes to: a lost table grows back the same."""
        span = self._last - self._first + 1
        start = self._first + int.from_bytes(sha256(name.encode()).digest()[:8]) % span
        for first, last in ((start, self._last), (self._first, start - 1)):
            number = first
            while number <= last:
                block = self._block(number)
                if block is None:
                    yield IPv4Address(number)
                    number += 1
                else:
                    number = block[1] + 1

    def _block(self, number: int) -> tuple[int, int] | None:
        place = bisect_right(self._starts, number) - 1
        return self._blocks[place] if place >= 0 and number <= self._blocks[place][1] else None

    def _merged(self, reserved: Iterable[IPv4Network]) -> list[tuple[int, int]]:
        """Return the reserved ranges inside the network, in order, none touching another."""
        blocks: list[tuple[int, int]] = []
        for network in sorted(reserved):
            first = max(int(network.network_address), self._first)
            last = min(int(network.broadcast_address), self._last)
            if first > last:
                continue
            if blocks and first <= blocks[-1][1] + 1:
                blocks[-1] = (blocks[-1][0], max(last, blocks[-1][1]))
            else:
                blocks.append((first, last))
        return blocks


class Pool:
    """All networks that leases are taken from; a later one only once those before it are full.

    So adding one at the end changes nobody's start point.
    """

    def __init__(
        self,
        cidr: IPv4Network,
        reserved: Iterable[IPv4Network] = (),
        more: Sequence[IPv4Network] = (),
    ) -> None:
        """`cidr` and `more` must not overlap."""
        kept_out = tuple(reserved)
        self.ranges = tuple(Range(network, kept_out) for network in (cidr, *more))
        self.size = sum(each.size for each in self.ranges)

    def __contains__(self, address: IPv4Address) -> bool:
        return any(address in each for each in self.ranges)

    def __str__(self) -> str:
        return ", ".join(str(each.cidr) for each in self.ranges)

    def probe(self, name: str) -> Iterator[IPv4Address]:
        """Yield every address once, range after range."""
        for each in self.ranges:
            yield from each.probe(name)
