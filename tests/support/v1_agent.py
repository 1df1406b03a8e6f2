"""A small `ztna-v1` agent: the bytes of protocol.md on bare aioquic, CIDs of 16 bytes as the original has.

Built without our driver and without our codec, so that it proves what existing agents see. As a program,

    python -m tests.support.v1_agent HOST PORT CHAIN KEY SERVICE NAME COUNT

asks COUNT questions `NAME n` from INNER at TYPED_BY_HAND and prints every answer as `question<TAB>answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion

from tests.support.certificates import Presented
from ztna.packet import build_udp, parse

ALPN = "ztna-v1"
CID_BYTES = 16
UDP_PAYLOAD_BYTES = 1350
WAIT_SECONDS = 20.0
INNER = ("192.0.2.1", 5555)
TYPED_BY_HAND = ("10.100.0.1", 7007)
"""The virtual address that its configuration has: whatever it likes."""
AT_ONCE = 50
"""Questions under way: no queue on the way is as short."""
AGAIN_SECONDS = 5.0

Address = tuple[str, int]


class V1Agent(asyncio.DatagramProtocol):
    """One connection. Datagrams wait in `control` (QAD, ACK, NACK) or `packets` (raw IP) until they are taken."""

    def __init__(self, relay: Address, presented: Presented | None, host: str = "127.0.0.1") -> None:
        self._host = host
        self.control: list[bytes] = []
        self.packets: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self.largest_packet = 0
        self._relay = relay
        self._transport: asyncio.DatagramTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = asyncio.Event()
        config = QuicConfiguration(
            alpn_protocols=[ALPN],
            connection_id_length=CID_BYTES,
            is_client=True,
            max_datagram_size=UDP_PAYLOAD_BYTES,
            max_datagram_frame_size=65536,
            server_name="relay",
            supported_versions=[QuicProtocolVersion.VERSION_1],
            verify_mode=ssl.CERT_NONE,
        )
        if presented is not None:
            config.certificate, *config.certificate_chain = presented.chain
            config.private_key = presented.key
        self.quic = QuicConnection(configuration=config)

    async def start(self) -> None:
        """Begin to connect."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(self._host, 0))
        self.quic.connect(self._relay, time.monotonic())
        self.flush()

    def close(self) -> None:
        """Say goodbye, if there is anybody, and end."""
        self.quic.close()
        self.flush()
        self.vanish()

    def vanish(self) -> None:
        """Go without a word."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    async def move(self) -> None:
        """Go on from another port, as after a NAT rebinding."""
        assert self._transport is not None
        old, loop = self._transport, asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(self._host, 0))
        old.close()

    @property
    def address(self) -> Address:
        assert self._transport is not None
        host, port = self._transport.get_extra_info("sockname")
        return host, port

    def send(self, data: bytes) -> None:
        """Send one DATAGRAM."""
        self.quic.send_datagram_frame(data)
        self.flush()

    def register(self, service: bytes, kind: int = 0x10) -> None:
        self.send(bytes((kind, len(service))) + service)

    def send_packet(self, service: bytes, packet: bytes) -> None:
        self.send(bytes((0x2F, len(service))) + service + packet)

    async def expect(self, data: bytes) -> None:
        """Wait for this very control datagram."""
        await self.until(lambda: data in self.control)
        self.control.remove(data)

    async def registered(self, service: bytes) -> None:
        """Register and wait for the ACK."""
        self.register(service)
        await self.expect(bytes((0x12, 0, len(service))) + service)

    async def packet(self) -> bytes:
        """Wait for the next packet and take it."""
        await self.until(lambda: self.packets)
        return self.packets.pop(0)

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds, looking again whenever something was heard."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                self._heard.clear()
                await self._heard.wait()

    def flush(self) -> None:
        """Send what the connection has to send and arm its timer."""
        if self._transport is None:
            return
        for data, address in self.quic.datagrams_to_send(time.monotonic()):
            self._transport.sendto(data, address)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self.quic.get_timer()
        if at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.001, at - time.monotonic()), self._on_timer)

    def datagram_received(self, data: bytes, address: Address) -> None:
        self.largest_packet = max(self.largest_packet, len(data))
        self.quic.receive_datagram(data, address, time.monotonic())
        self._act()

    def _on_timer(self) -> None:
        self._timer = None
        self.quic.handle_timer(time.monotonic())
        self._act()

    def _act(self) -> None:
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, events.DatagramFrameReceived):
                raw = event.data[0] >> 4 in (4, 6)
                (self.packets if raw else self.control).append(event.data)
            elif isinstance(event, events.ConnectionTerminated):
                self.closed = (event.error_code, event.reason_phrase)
        self._heard.set()
        self.flush()


@contextlib.asynccontextmanager
async def v1_agent(
    relay: Address, presented: Presented | None, host: str = "127.0.0.1"
) -> AsyncIterator[V1Agent]:
    """Connect while inside; the QAD has come, or the connection was refused."""
    agent = V1Agent(relay, presented, host)
    await agent.start()
    try:
        await agent.until(lambda: agent.closed or agent.control)
        yield agent
    finally:
        agent.close()


async def ask_all(
    agent: V1Agent, service: bytes, name: bytes, count: int, to: Address = TYPED_BY_HAND
) -> list[tuple[bytes, bytes]]:
    """Ask `count` questions, each until it was answered; return question and answer of all that came back."""
    questions = {b"%s %d" % (name, number) for number in range(count)}
    answers: list[tuple[bytes, bytes]] = []
    while questions:
        asked = sorted(questions)[:AT_ONCE]
        for payload in asked:
            agent.send_packet(service, build_udp(*INNER, *to, payload))
        # One that the kernel lost under load is asked again.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN_SECONDS):
                while questions.intersection(asked):
                    packet = parse(await agent.packet())
                    assert (packet.source, packet.source_port) == to
                    assert (packet.destination, packet.destination_port) == INNER
                    question = packet.payload.rpartition(b": ")[2]
                    questions.discard(question)
                    answers.append((question, packet.payload))
    return answers


async def main() -> None:
    """Be one agent that asks."""
    host, port, chain, key, service, name, count = sys.argv[1:]
    presented = Presented.load(chain, key)
    async with v1_agent((host, int(port)), presented, "0.0.0.0") as agent:
        await agent.registered(service.encode())
        for question, answer in await ask_all(agent, service.encode(), name.encode(), int(count)):
            print(question.decode(), answer.decode(), sep="\t")


if __name__ == "__main__":
    asyncio.run(main())
