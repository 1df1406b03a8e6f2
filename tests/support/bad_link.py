"""A link between a host and its network that loses, repeats and delays frames, so that they overtake each other.

`bad_link` puts it before a host of a lab. It is a program of its own: `python -m tests.support.bad_link A B --lose P
--repeat P --delay P`, which passes every frame from one device to the other; the shares are of IPv4 frames. At SIGTERM
it tells as JSON what it did.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tests.support.lab import Lab, until
from tests.support.namespaces import Host, Network

DELAY_SECONDS = (0.002, 0.02)
"""Between these by chance: dozens of packets overtake a delayed one."""
SEED = 20
FRAME_BYTES = 1 << 17
FRAMES_PER_WAKEUP = 64
BUFFER_BYTES = 8 << 20
_ALL_PROTOCOLS, _IPV4 = 0x0003, b"\x08\x00"
_SOL_PACKET, _PACKET_VNET_HDR, _VNET_HDR_BYTES = 263, 15, 10
"""packet(7): with it a frame keeps its unfinished checksum from one veth to the other."""
_ETHERTYPE = slice(_VNET_HDR_BYTES + 12, _VNET_HDR_BYTES + 14)


@dataclass
class Did:
    """How many frames."""

    passed: int = 0
    lost: int = 0
    repeated: int = 0
    delayed: int = 0


class BadLink:
    """Passes frames between two devices of this namespace."""

    def __init__(self, devices: tuple[str, str], *, lose: float, repeat: float, delay: float) -> None:
        self.did = Did()
        self._lose, self._repeat, self._delay = lose, repeat, delay
        self._chance = random.Random(SEED)
        self._sockets = [_opened(device) for device in devices]
        self._held: list[tuple[float, int, socket.socket, bytes]] = []
        self._numbers = itertools.count()
        self._is_over = False

    def end(self) -> None:
        """Pass no more."""
        self._is_over = True

    def run(self) -> None:
        """Pass frames until the end."""
        one, other = self._sockets
        with selectors.DefaultSelector() as selector:
            selector.register(one, selectors.EVENT_READ, other)
            selector.register(other, selectors.EVENT_READ, one)
            while not self._is_over:
                wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else 0.2
                for key, _ in selector.select(wait):
                    self._drain(key.fileobj, key.data)  # type: ignore[arg-type]
                self._let_go()

    def _drain(self, source: socket.socket, onward: socket.socket) -> None:
        for _ in range(FRAMES_PER_WAKEUP):
            try:
                frame = source.recv(FRAME_BYTES)
            except BlockingIOError:
                return
            self._take(frame, onward)

    def _take(self, frame: bytes, onward: socket.socket) -> None:
        is_ip = frame[_ETHERTYPE] == _IPV4
        if is_ip and self._chance.random() < self._lose:
            self.did.lost += 1
        elif is_ip and self._chance.random() < self._delay:
            self.did.delayed += 1
            due = time.monotonic() + self._chance.uniform(*DELAY_SECONDS)
            heapq.heappush(self._held, (due, next(self._numbers), onward, frame))
        else:
            self._pass(frame, onward)
            if is_ip and self._chance.random() < self._repeat:
                self.did.repeated += 1
                self._pass(frame, onward)

    def _let_go(self) -> None:
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            _, _, onward, frame = heapq.heappop(self._held)
            self._pass(frame, onward)

    def _pass(self, frame: bytes, onward: socket.socket) -> None:
        try:
            onward.send(frame)
        except (BlockingIOError, OSError):
            self.did.lost += 1  # a queue is full
        else:
            self.did.passed += 1


def _opened(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    made.bind((device, _ALL_PROTOCOLS))
    made.setblocking(False)
    return made


@contextmanager
def bad_link(made: Lab, host: Host, **shares: float) -> Iterator[Callable[[], Did]]:
    """Put a bad link before a host while inside; returns what tells, once outside, what it did."""
    network = made.network
    assert isinstance(network, Network)
    near, far = network.interpose(host)
    argv = ["-m", "tests.support.bad_link", near, far, *(f"--{k}={v}" for k, v in shares.items())]
    link = made.python(f"bad-link-{host.name}", network.switch, *argv)
    before = len(link.output().splitlines())

    def told() -> Did:
        return Did(**json.loads(link.output().splitlines()[before + 1]))

    try:
        until("the link passes frames", lambda: len(link.output().splitlines()) > before)
        yield told
    finally:
        link.stop()
        made.running.remove(link)
        network.reunite(host)


def main() -> None:
    """Parse, and pass frames until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", nargs=2)
    for share in ("lose", "repeat", "delay"):
        parser.add_argument(f"--{share}", type=float, default=0.0)
    arguments = parser.parse_args()
    link = BadLink(
        tuple(arguments.devices), lose=arguments.lose, repeat=arguments.repeat, delay=arguments.delay
    )
    signal.signal(signal.SIGTERM, lambda *_: link.end())
    print("passing", flush=True)
    link.run()
    print(json.dumps(asdict(link.did)), flush=True)


if __name__ == "__main__":
    main()
