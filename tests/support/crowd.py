"""Thousands of agents in a process of their own: `python -m tests.support.crowd HOST PORT CHAIN KEY COUNT`.

Says `ready` when all are connected and have said hello, then does as each line of its input says: `close` (all say
goodbye at once) or nothing more (end of input: they vanish). Bare aioquic, one socket, no event loop.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time

from aioquic.quic.connection import QuicConnection

from tests.support.certificates import Presented
from tests.support.hostile import client_connection
from ztna.wire import control

AT_ONCE = 16
"""Handshakes under way: fewer than any cap, more than a core has to do."""
ALPN = "ztna-v2"
TIMER_SECONDS = 1.0


class Crowd:
    """All connections, found by their CIDs."""

    def __init__(self, relay: tuple[str, int], presented: Presented) -> None:
        self._relay = relay
        self._presented = presented
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self._all: list[QuicConnection] = []
        self._by_cid: dict[bytes, QuicConnection] = {}
        self._timers_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def gather(self, count: int) -> None:
        """Connect so many and have each say hello."""
        under_way: list[QuicConnection] = []
        while len(self._all) < count or under_way:
            while len(self._all) < count and len(under_way) < AT_ONCE:
                under_way.append(self._begin())
            self.turn(0.01)
            under_way = [each for each in under_way if not self._is_in(each)]

    def close(self) -> None:
        """Everybody leaves at once."""
        for each in self._all:
            each.close()
        packets = [packet for each in self._all for packet, _ in each.datagrams_to_send(time.monotonic())]
        for packet in packets:
            self._send(packet)

    def turn(self, seconds: float) -> None:
        """Take what comes in, wait at most so long for it, and do what time asks for."""
        if self._selector.select(seconds):
            for _ in range(1000):
                try:
                    data = self._socket.recv(2048)
                except BlockingIOError:
                    break
                connection = self._by_cid.get(data[6 : 6 + data[5]] if data[0] & 0x80 else data[1:9])
                if connection is not None:
                    connection.receive_datagram(data, self._relay, time.monotonic())
                    self._flush(connection)
        now = time.monotonic()
        if now < self._timers_at:
            return
        # All timers of a crowd take a while to look at, and none of them is urgent on loopback.
        self._timers_at = now + TIMER_SECONDS
        for connection in self._all:
            at = connection.get_timer()
            if at is not None and at <= now:
                connection.handle_timer(now)
                self._flush(connection)

    def _begin(self) -> QuicConnection:
        connection = client_connection(ALPN, self._presented)
        connection.connect(self._relay, time.monotonic())
        self._all.append(connection)
        self._by_cid[connection.host_cid] = connection
        self._flush(connection)
        return connection

    def _is_in(self, connection: QuicConnection) -> bool:
        if connection._close_event is not None:
            raise SystemExit(f"refused: {connection._close_event}")
        if not connection._handshake_confirmed:
            return False
        connection.send_stream_data(0, control.encode(control.Hello()))
        self._flush(connection)
        return True

    def _flush(self, connection: QuicConnection) -> None:
        for cid in connection._host_cids:
            self._by_cid[cid.cid] = connection
        for packet, _ in connection.datagrams_to_send(time.monotonic()):
            self._send(packet)

    def _send(self, packet: bytes) -> None:
        while True:
            try:
                self._socket.sendto(packet, self._relay)
            except BlockingIOError:
                time.sleep(0.001)
            else:
                return


def main() -> None:
    """Connect, then obey."""
    host, port, chain, key, count = sys.argv[1:]
    crowd = Crowd((host, int(port)), Presented.load(chain, key))
    crowd.gather(int(count))
    print("ready", flush=True)
    commands = selectors.DefaultSelector()
    commands.register(sys.stdin, selectors.EVENT_READ)
    while True:
        crowd.turn(0.05)
        if commands.select(0):
            if sys.stdin.readline() != "close\n":
                return
            crowd.close()
            print("closed", flush=True)


if __name__ == "__main__":
    main()
