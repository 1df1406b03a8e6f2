"""Who said what to whom: backends that note it, programs that ask, and the ledger of what came out wrong.

A payload is `<agent> <nonce> <service>`, its answer the same and ` from <service>`: whatever reaches another program
or another service than it is for tells of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ASK_SECONDS = 10.0
UDP_SECONDS = 5.0
LINE_BYTES_MAX = 4096


@dataclass
class Ledger:
    """What was answered, what was not, and what came where it does not belong."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    misdelivered: list[str] = field(default_factory=list)
    nonces: itertools.count[int] = field(default_factory=itertools.count)
    amid: str = "churn alone"
    """What was disturbed last: failures are counted by it."""

    def fail(self, how: str) -> None:
        """Count a question that was not answered."""
        self.failed[f"{how} ({self.amid})"] += 1


class Witness:
    """A backend of one service."""

    def __init__(self, service: str, ledger: Ledger) -> None:
        self.service = service
        self._ledger = ledger
        self._closing: list[Any] = []
        self._streams: set[asyncio.StreamWriter] = set()

    async def start(self, kind: str) -> int:
        """Listen and return the port."""
        loop = asyncio.get_running_loop()
        if kind == "tcp":
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
            self._closing.append(server)
            return int(server.sockets[0].getsockname()[1])
        transport, _ = await loop.create_datagram_endpoint(lambda: _Echo(self), local_addr=("127.0.0.1", 0))
        self._closing.append(transport)
        return int(transport.get_extra_info("sockname")[1])

    def answer(self, said: bytes) -> bytes:
        """Note what was said and return the answer."""
        if said and said.split()[-1:] != [self.service.encode()]:
            self._ledger.misdelivered.append(f"{self.service} was told {said[:80]!r}")
        return said + b" from " + self.service.encode()

    async def close(self) -> None:
        """Stop."""
        for each in self._closing:
            each.close()
        for stream in tuple(self._streams):
            stream.close()
            with contextlib.suppress(OSError):
                await stream.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._streams.add(writer)
        try:
            while line := await reader.readline():
                writer.write(self.answer(line.rstrip(b"\n")) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            self._streams.discard(writer)
            writer.close()


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self._transport.sendto(self._witness.answer(data), address)


class Conversation:
    """A TCP flow that a program holds for several questions."""

    def __init__(self, agent: str, service: str, ledger: Ledger) -> None:
        self._who = (agent, service)
        self._ledger = ledger
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, address: str, port: int) -> bool:
        """Connect; False when that failed."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                self._reader, self._writer = await asyncio.open_connection(address, port)
        except (OSError, TimeoutError):
            self._ledger.fail("tcp connect")
        return self._writer is not None

    async def ask(self) -> bool:
        """Ask once; False when the flow is over."""
        assert self._writer is not None
        payload, expected = question(self._ledger, *self._who)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                self._writer.write(payload + b"\n")
                answer = await self._reader.readline()
        except TimeoutError:
            self._ledger.fail("tcp in time")
            return False
        except (OSError, RuntimeError):  # uvloop says so of a transport that was reset
            self._ledger.fail("tcp reset")
            return False
        if not answer.endswith(b"\n"):
            self._ledger.fail("tcp ended")
            return False
        if answer != expected + b"\n":
            self._ledger.misdelivered.append(f"{self._who} asked {payload!r} and heard {answer[:80]!r}")
        self._ledger.answered["tcp"] += 1
        return True

    async def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


async def ask_udp(agent: str, service: str, address: str, port: int, ledger: Ledger) -> bool:
    """Ask from a fresh socket, whose port may be one that asked the same before: that late answer is passed over."""
    payload, expected = question(ledger, agent, service)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.setblocking(False)
        asker.connect((address, port))
        try:
            asker.send(payload)
            async with asyncio.timeout(UDP_SECONDS):
                while (answer := await loop.sock_recv(asker, LINE_BYTES_MAX)) != expected:
                    said = answer.split()
                    if said[:1] + said[2:] != [agent.encode(), service.encode(), b"from", service.encode()]:
                        ledger.misdelivered.append(f"{agent} asked {payload!r} and heard {answer[:80]!r}")
        except (OSError, TimeoutError):
            ledger.fail("udp")
            return False
    ledger.answered["udp"] += 1
    return True


def question(ledger: Ledger, agent: str, service: str) -> tuple[bytes, bytes]:
    """Return a payload that nobody else sends, and its answer."""
    payload = f"{agent} {next(ledger.nonces)} {service}".encode()
    return payload, payload + b" from " + service.encode()
