"""The UDP half of the forwarder: a socket whose packets relay.links decides about, and the kernel in front of it.

Copies sealed packets between the two bound sides of a link and opens none. What relay.kernel forwards never gets
here; it is counted all the same. With several workers there is a thread for each further one, with a socket of its
own on the same port: system calls, which are most of the work, then run side by side. TCP is relay.splicer's.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Literal

from relay.kernel import CHANGES_PER_TRANSACTION_MAX, Heard, KernelForwarder, KernelRefused
from relay.links import Limits, Link, LinkTable, RawAddress, Side, Traffic
from ztna import udp
from ztna.jsontypes import Secret
from ztna.telemetry import FORWARDED, FORWARDING_FELL_BACK, FORWARDING_IN_KERNEL, dropped, logger
from ztna.udp_bulk import BulkSocket
from ztna.udp_kernel import bind_udp

SWEEP_SECONDS = 1.0
SWEEP_SHARE = 0.05
"""With very many links a sweep takes long: it never takes more of the loop's time than this."""
NONCE_KEY_BYTES = 32
WHERE = "forwarder"

Forwarding = Literal["user", "kernel", "auto"]

_log = logger(__name__)


class Forwarder:
    """The forwarder's UDP socket on the running loop."""

    def __init__(
        self,
        raw: BulkSocket,
        limits: Limits | None = None,
        forwarding: Forwarding = "user",
        workers: int = 1,
    ) -> None:
        """Begin to forward on a bound socket; in the kernel where `forwarding` wants that and it can be had.

        For several workers the socket was bound to share its port. Raises ZtnaError when the others cannot.
        """
        self._raw = raw
        self._lock = threading.Lock()
        """Held by who uses the table; without further workers nobody waits for it."""
        self._table = LinkTable(Secret(os.urandom(NONCE_KEY_BYTES)), limits or Limits())
        self._wanted = forwarding
        self._why_user = "configured"
        self._kernel: KernelForwarder | None = None
        self._pending: dict[RawAddress, RawAddress | None] = {}
        self._kernels: dict[RawAddress, Side] = {}
        """The sides whose packets the kernel forwards, as it was last told."""
        self._following = False
        self._told: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        if forwarding != "user":
            self._try_kernel()
        FORWARDING_IN_KERNEL.set(self._kernel is not None)
        FORWARDING_FELL_BACK.set(self.problem is not None)
        self._workers = [_Worker(self, raw.address) for _ in range(workers - 1)]
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
        with self._lock:
            self._table.add(key, agent, connector, key if peers is None else peers, self._loop.time())

    def remove_link(self, key: Hashable) -> None:
        """End a link. Harmless when it is not there."""
        with self._lock:
            self._table.remove(key)
        # Many may end at once: the kernel hears of all in this turn together.
        self._follow_soon()

    def charge(self, key: Hashable, size: int) -> bool:
        """Take what was spliced for a link off its quota; False when that is used up."""
        with self._lock:
            return self._table.charge(key, size)

    @property
    def links(self) -> int:
        """How many links may bind."""
        return len(self._table)

    @property
    def passed_bytes(self) -> int:
        """How many bytes were passed on so far; the kernel's share is at most a sweep old."""
        return self._table.passed_bytes

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
            "workers": 1 + len(self._workers),
            "received": sum(each.received for each in self._sockets),
            "sent": sum(each.sent for each in self._sockets),
            "dropped_by_kernel": sum(each.dropped for each in self._sockets),
            "drops": dict(self._table.drops),
            "links": [self._shown(link) for link in self._table.links().values()],
        }

    def close(self) -> None:
        """Stop forwarding; harmless twice."""
        if not self._closed:
            self._closed = True
            self._sweeper.cancel()
            self._loop.remove_reader(self._raw.fileno())
            for worker in self._workers:
                worker.stop()
            self._raw.close()
            if self._kernel is not None:
                self._kernel.close()

    @property
    def _sockets(self) -> list[BulkSocket]:
        return [self._raw, *(each.raw for each in self._workers if each.raw is not None)]

    def _readable(self) -> None:
        self.serve(self._raw, self._loop.time(), self._follow)

    def serve(self, raw: BulkSocket, now: float, follow: Callable[[], None]) -> None:
        """Do with what has arrived on a socket what the table says; `follow` when ways have changed."""
        handle = self._table.handle
        for _ in range(udp.BATCHES_PER_WAKEUP):
            batch = raw.receive()
            if batch:
                with self._lock:
                    answers = handle(batch, now)
                if self._table.has_changed:
                    # First, so that who hears that it is bound finds the kernel ready.
                    follow()
                raw.send(answers)
            if len(batch) < udp.BATCH_PACKETS:
                return

    def tell_loop(self) -> None:
        """Have the loop's thread follow the table (from a worker's)."""
        self._loop.call_soon_threadsafe(self._follow)

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

    def _follow_soon(self) -> None:
        if not self._following:
            self._following = True
            self._loop.call_soon(self._follow)

    def _follow(self) -> None:
        """Let the kernel forward what the table says now."""
        self._following = False
        with self._lock:
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
            self._credit(kernel.change(some, self._loop.time()))
        except KernelRefused as error:
            self._give_up(kernel, error)
        for source in some:
            side = self._table.side_at(source) if kernel.forwards(source) else None
            if side is not None:
                self._kernels[source] = side
            else:
                self._kernels.pop(source, None)
        if pending:
            # Many links ended at once: others are served between.
            self._loop.call_soon(self._apply)

    def _look_at_kernel(self, kernel: KernelForwarder) -> None:
        try:
            self._credit(kernel.count())
            if over := kernel.watch():
                self._table.drops["link_rate"] += over
            kernel.refresh(self._loop.time())
        except KernelRefused as error:
            self._give_up(kernel, error)

    def _credit(self, heard: Heard) -> None:
        """Count what the kernel passed on for the sides that were at these addresses when it did."""
        with self._lock:
            for source, packets, size in heard:
                FORWARDED.labels("kernel").inc(packets)
                if (side := self._kernels.get(source)) is not None:
                    self._table.counted(side, packets, size)

    def _give_up(self, kernel: KernelForwarder, error: KernelRefused) -> None:
        self._why_user = str(error)
        _log.warning("forwarding_in_user_space", why=self._why_user)
        FORWARDING_IN_KERNEL.set(0)
        FORWARDING_FELL_BACK.set(1)
        self._kernel = None
        self._pending.clear()
        self._kernels.clear()
        kernel.close()

    # Time.

    def _sweep(self) -> None:
        started = self._loop.time()
        if self._kernel is not None:
            self._look_at_kernel(self._kernel)
        with self._lock:
            self._table.sweep(started)
        self._follow()
        self._tell()
        took = self._loop.time() - started
        self._sweeper = self._loop.call_later(max(SWEEP_SECONDS, took / SWEEP_SHARE), self._sweep)

    def _tell(self) -> None:
        """Bring the metrics up to date: the hot path counts for itself."""
        sent = sum(each.sent for each in self._sockets)
        with self._lock:
            drops = self._table.drops.copy()
        now = drops + Counter(sent=sent, kernel_socket=sum(each.dropped for each in self._sockets))
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


class _Worker:
    """A thread that forwards on a socket of its own; the kernel gives each source address to one socket."""

    def __init__(self, forwarder: Forwarder, address: udp.SockAddr) -> None:
        self.raw: BulkSocket | None = None
        self._forwarder = forwarder
        self._socket = bind_udp(address, reuse_port=True)
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait until it has."""
        os.close(self._stop_writer)
        self._thread.join()
        os.close(self._stop_reader)
        self._socket.close()

    def _run(self) -> None:
        # Made here, because a thread's sockets share that thread's buffers.
        raw = self.raw = BulkSocket(self._socket)
        poll = select.poll()
        for fd in (raw.fileno(), self._stop_reader):
            poll.register(fd, select.POLLIN)
        while all(fd != self._stop_reader for fd, _ in poll.poll()):
            self._forwarder.serve(raw, time.monotonic(), self._forwarder.tell_loop)
