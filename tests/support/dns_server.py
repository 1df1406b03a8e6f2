"""A small real DNS server on loopback UDP: SRV records and `_fresh` as the test says.

`python -m tests.support.dns_server PORT FILE` serves as `backends` what the file says, in JSON, at each query.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from dnslib import CLASS, EDNS0, QTYPE, RR, SOA, SRV, TXT, A, DNSRecord, EDNSOption

from ztna.config import Endpoint

ZONE = "ztna.local"
EDE_OPTION = 15
STALE = (3).to_bytes(2)


class DnsServer(asyncio.DatagramProtocol):
    """`routes` is service -> [(priority, weight, connector id)]; a service without is NXDOMAIN."""

    def __init__(self) -> None:
        self.routes: dict[str, list[tuple[int, int, str]]] = {}
        self.foreign: dict[str, str] = {}
        """service -> an SRV target that is no connector."""
        self.backends: dict[str, list[tuple[int, int, int]]] = {}
        """service -> [(priority, weight, port)] at 127.0.0.1."""
        self.ttl_s = 1
        self.negative_ttl_s = 1
        self.fresh: str | None = ""
        """The text of `_fresh`: now when empty, no such record when None."""
        self.stale = False
        self.silent = False
        self.asked: list[str] = []
        self._transport: asyncio.DatagramTransport | None = None

    async def start(self, port: int = 0) -> Endpoint:
        """Listen, on a free port unless told."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", port))
        return Endpoint(*self._transport.get_extra_info("sockname"))

    def close(self) -> None:
        """Stop; harmless twice."""
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        if not self.silent:
            self._transport.sendto(self.answer(data), addr)

    def answer(self, data: bytes) -> bytes:
        """Answer one query."""
        query = DNSRecord.parse(data)
        name, kind = str(query.q.qname).rstrip("."), QTYPE[query.q.qtype]
        self.asked.append(f"{name} {kind}")
        reply = query.reply()
        reply.rr = [
            RR(name, rtype=getattr(QTYPE, kind), rclass=CLASS.IN, ttl=self.ttl_s, rdata=each)
            for each in self._records(name, kind)
        ]
        reply.ar = [
            RR(str(each.rdata.target), rtype=QTYPE.A, ttl=self.ttl_s, rdata=A("127.0.0.1"))
            for each in reply.rr
            if kind == "SRV"
        ]
        if not reply.rr:
            reply.header.rcode = 3
            times = (1, 1, 1, 1, self.negative_ttl_s)
            reply.auth = [RR(ZONE, QTYPE.SOA, ttl=self.negative_ttl_s, rdata=SOA(times=times))]
        if self.stale:
            reply.add_ar(EDNS0(opts=[EDNSOption(EDE_OPTION, STALE)]))
        return bytes(reply.pack())

    def _records(self, name: str, kind: str) -> list[object]:
        service = name.removesuffix(f".{ZONE}")
        if kind == "SRV":
            found = [
                SRV(priority, weight, 4435, f"{connector}.connector.{ZONE}")
                for priority, weight, connector in self.routes.get(service, [])
            ]
            found += [
                SRV(priority, weight, port, f"backend.{ZONE}")
                for priority, weight, port in self.backends.get(service, [])
            ]
            if service in self.foreign:
                found.append(SRV(0, 1, 1, self.foreign[service]))
            return found
        if service == "_fresh" and kind == "TXT" and self.fresh is not None:
            return [TXT(self.fresh or str(int(time.time())))]
        return []


class _FromFile(DnsServer):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def answer(self, data: bytes) -> bytes:
        self.backends = json.loads(self._file.read_text())
        return super().answer(data)


async def _serve(port: int, file: Path) -> None:
    await _FromFile(file).start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
