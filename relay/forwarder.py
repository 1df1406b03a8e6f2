"""The UDP half of the forwarder: a socket whose packets relay.links decides about.

Copies sealed packets between the two bound sides of a link and opens none. TCP is relay.splicer's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Hashable

from relay.links import LinkTable
from ztna import udp
from ztna.jsontypes import Secret
from ztna.udp_bulk import BulkSocket

SWEEP_SECONDS = 5.0
NONCE_KEY_BYTES = 32


class Forwarder:
    """The forwarder's UDP socket on the running loop."""

    def __init__(self, raw: BulkSocket) -> None:
        """Begin to forward on a bound socket."""
        self._raw = raw
        self._table = LinkTable(Secret(os.urandom(NONCE_KEY_BYTES)))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(raw.fileno(), self._readable)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._closed = False

    @property
    def address(self) -> udp.SockAddr:
        """The bound address."""
        return self._raw.address

    def add_link(self, key: Hashable, agent: tuple[bytes, Secret], connector: tuple[bytes, Secret]) -> None:
        """Let both sides of a link bind with their (id, secret)."""
        self._table.add(key, agent, connector)

    def remove_link(self, key: Hashable) -> None:
        """End a link. Harmless when it is not there."""
        self._table.remove(key)

    def status(self) -> dict[str, object]:
        """Return the counters and each link's, for /status."""
        raw = self._raw
        return {
            "address": f"{raw.address[0]}:{raw.address[1]}",
            "received": raw.received,
            "sent": raw.sent,
            "dropped_by_kernel": raw.dropped,
            "drops": dict(self._table.drops),
            "links": [
                {
                    side_name: {
                        "bound": side.address is not None,
                        "packets": side.packets,
                        "bytes": side.bytes,
                        "dropped": side.dropped,
                    }
                    for side_name, side in (("agent", link.agent), ("connector", link.connector))
                }
                for link in self._table.links().values()
            ],
        }

    def close(self) -> None:
        """Stop forwarding; harmless twice."""
        if not self._closed:
            self._closed = True
            self._sweeper.cancel()
            self._loop.remove_reader(self._raw.fileno())
            self._raw.close()

    def _readable(self) -> None:
        raw, handle = self._raw, self._table.handle
        now = self._loop.time()
        for _ in range(udp.BATCHES_PER_WAKEUP):
            batch = raw.receive()
            if batch:
                raw.send(handle(batch, now))
            if len(batch) < udp.BATCH_PACKETS:
                return

    def _sweep(self) -> None:
        self._table.sweep(self._loop.time())
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
