"""The UDP half of the forwarder: a socket whose packets relay.links decides about, and the kernel in front of it.

Copies sealed packets between the two bound sides of a link and opens none. What relay.kernel forwards never gets
here; it is counted all the same. TCP is relay.splicer's.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Hashable
from typing import Literal

from relay.kernel import CHANGES_PER_TRANSACTION_MAX, KernelForwarder, KernelRefused
from relay.links import Limits, Link, LinkTable, RawAddress, Side, Traffic
from ztna import udp
from ztna.jsontypes import Secret
from ztna.telemetry import FORWARDED, FORWARDING_IN_KERNEL, dropped, logger
from ztna.udp_bulk import BulkSocket

SWEEP_SECONDS = 1.0
SWEEP_SHARE = 0.02
"""With very many links a sweep takes long: it never takes more of the loop's time than this."""
NONCE_KEY_BYTES = 32
WHERE = "forwarder"

Forwarding = Literal["user", "kernel", "auto"]

_log = logger(__name__)


class Forwarder:
    """The forwarder's UDP socket on the running loop."""

    def __init__(
        self, raw: BulkSocket, limits: Limits | None = None, forwarding: Forwarding = "user"
    ) -> None:
        """Begin to forward on a bound socket; in the kernel where `forwarding` wants that and it can be had."""
        self._raw = raw
        self._table = LinkTable(Secret(os.urandom(NONCE_KEY_BYTES)), limits or Limits())
        self._wanted = forwarding
        self._why_user = "configured"
        self._kernel: KernelForwarder | None = None
        self._pending: dict[RawAddress, RawAddress | None] = {}
        self._told: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        if forwarding != "user":
            self._try_kernel()
        FORWARDING_IN_KERNEL.set(self._kernel is not None)
        self._loop.add_reader(raw.fileno(), self._readable)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._closed = False

    @property
    def address(self) -> udp.SockAddr:
        """The bound address."""
        return self._raw.address

    @property
    def problem(self) -> str | None:
        """Why the kernel does not forward though it was told to; None when all is as configured."""
        return self._why_user if self._wanted == "kernel" and self._kernel is None else None

    def add_link(
        self,
        key: Hashable,
        agent: tuple[bytes, Secret],
        connector: tuple[bytes, Secret],
        peers: Hashable = None,
    ) -> None:
        """Let both sides of a link bind with their (id, secret); links between the same `peers` share a quota."""
        self._table.add(key, agent, connector, key if peers is None else peers, self._loop.time())

    def remove_link(self, key: Hashable) -> None:
        """End a link. Harmless when it is not there."""
        self._table.remove(key)
        self._follow()

    @property
    def links(self) -> int:
        """How many links may bind."""
        return len(self._table)

    def traffic(self, key: Hashable) -> Traffic | None:
        """Return what was passed on for a link; the kernel's share is at most a sweep old."""
        return self._table.traffic(key)

    def status(self) -> dict[str, object]:
        """Return the counters and each link's, for /status."""
        raw = self._raw
        return {
            "address": f"{raw.address[0]}:{raw.address[1]}",
            "forwarding": {
                "wanted": self._wanted,
                "in_use": "user" if self._kernel is None else "kernel",
                "why_user": None if self._kernel is not None else self._why_user,
                "in_kernel": 0 if self._kernel is None else self._kernel.ways,
            },
            "received": raw.received,
            "sent": raw.sent,
            "dropped_by_kernel": raw.dropped,
            "drops": dict(self._table.drops),
            "links": [self._shown(link) for link in self._table.links().values()],
        }

    def close(self) -> None:
        """Stop forwarding; harmless twice."""
        if not self._closed:
            self._closed = True
            self._sweeper.cancel()
            self._loop.remove_reader(self._raw.fileno())
            self._raw.close()
            if self._kernel is not None:
                self._kernel.close()

    def _readable(self) -> None:
        raw, table = self._raw, self._table
        now = self._loop.time()
        for _ in range(udp.BATCHES_PER_WAKEUP):
            batch = raw.receive()
            if batch:
                answers = table.handle(batch, now)
                if table.has_changed:
                    # First, so that who hears that it is bound finds the kernel ready.
                    self._follow()
                raw.send(answers)
            if len(batch) < udp.BATCH_PACKETS:
                return

    # The kernel's share.

    def _try_kernel(self) -> None:
        try:
            self._kernel = KernelForwarder(self._raw.address, self._table.limits)
        except KernelRefused as error:
            self._why_user = str(error)
            log = _log.warning if self._wanted == "kernel" else _log.info
            log("forwarding_in_user_space", why=self._why_user)
        else:
            _log.info("forwarding_in_kernel")

    def _follow(self) -> None:
        """Let the kernel forward what the table says now."""
        changes = self._table.take_changed()
        if self._kernel is not None:
            self._pending |= changes
            self._apply()

    def _apply(self) -> None:
        kernel, pending = self._kernel, self._pending
        if kernel is None or not pending or self._closed:
            return
        some = {source: pending.pop(source) for source in list(pending)[:CHANGES_PER_TRANSACTION_MAX]}
        try:
            kernel.change(some, self._loop.time())
        except KernelRefused as error:
            self._give_up(kernel, error)
        if pending:
            # Many links ended at once: others are served between.
            self._loop.call_soon(self._apply)

    def _look_at_kernel(self, kernel: KernelForwarder) -> None:
        try:
            for source, packets, size in kernel.count():
                self._table.counted(source, packets, size)
                FORWARDED.labels("kernel").inc(packets)
            if over := kernel.watch():
                self._table.drops["link_rate"] += over
            kernel.refresh(self._loop.time())
        except KernelRefused as error:
            self._give_up(kernel, error)

    def _give_up(self, kernel: KernelForwarder, error: KernelRefused) -> None:
        self._why_user = str(error)
        _log.warning("forwarding_in_user_space", why=self._why_user)
        FORWARDING_IN_KERNEL.set(0)
        self._kernel = None
        self._pending.clear()
        kernel.close()

    # Time.

    def _sweep(self) -> None:
        started = self._loop.time()
        if self._kernel is not None:
            self._look_at_kernel(self._kernel)
        self._table.sweep(started)
        self._follow()
        self._tell()
        took = self._loop.time() - started
        self._sweeper = self._loop.call_later(max(SWEEP_SECONDS, took / SWEEP_SHARE), self._sweep)

    def _tell(self) -> None:
        """Bring the metrics up to date: the hot path counts for itself."""
        now = self._table.drops + Counter(sent=self._raw.sent, kernel_socket=self._raw.dropped)
        for what, count in (now - self._told).items():
            if what == "sent":
                FORWARDED.labels("user").inc(count)
            else:
                dropped(WHERE, what, count)
        self._told = now

    def _shown(self, link: Link) -> dict[str, object]:
        return {
            name: {
                "bound": side.address is not None,
                "in_kernel": self._in_kernel(side),
                "packets": side.packets,
                "bytes": side.bytes,
                "dropped": side.dropped,
            }
            for name, side in (("agent", link.agent), ("connector", link.connector))
        }

    def _in_kernel(self, side: Side) -> bool:
        return self._kernel is not None and side.address is not None and self._kernel.forwards(side.address)
