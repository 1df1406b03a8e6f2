r"""HAProxy's PROXY protocol: what a backend is told first about who connects. Written only; nothing is read here.

    v1: PROXY TCP4 <source> <destination> <source port> <destination port>\r\n
    v2: signature(12), version and command(1), family(1), length(2), addresses, then TLVs: type(1), length(2), value

Addresses are the inner ones: the source is what the agent says, the destination what the program called. In v2 three
TLVs follow: the service (PP2_TYPE_AUTHORITY), the flow's id (PP2_TYPE_UNIQUE_ID), and the agent's name as its
certificate proved it (0xE0, the first of the custom ones). Pure. Source: haproxy/doc/proxy-protocol.txt, 2.1 and 2.2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Literal

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
TYPE_AUTHORITY = 0x02
TYPE_UNIQUE_ID = 0x05
TYPE_AGENT = 0xE0

Version = Literal["v1", "v2"]

_HEADER = struct.Struct(">12sBBH")
_TLV = struct.Struct(">BH")
_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED, _TCP4, _TCP6 = 0x00, 0x11, 0x21


@dataclass(frozen=True, slots=True)
class Caller:
    """Who connects: inner addresses with their ports, the agent's proved name, the service and the flow's id."""

    source: tuple[str, int]
    destination: tuple[str, int]
    agent: str
    service: str
    flow: str


def header(version: Version, caller: Caller) -> bytes:
    """Return what goes before the first byte of a flow."""
    source, destination = ip_address(caller.source[0]), ip_address(caller.destination[0])
    is_ipv6 = 6 in (source.version, destination.version)
    if is_ipv6:
        source, destination = _mapped(str(source)), _mapped(str(destination))
    ports = (caller.source[1], caller.destination[1])
    if version == "v1":
        line = f"PROXY TCP{6 if is_ipv6 else 4} {source} {destination} {ports[0]} {ports[1]}\r\n"
        return line.encode("ascii")
    body = source.packed + destination.packed + struct.pack(">HH", *ports)
    for kind, value in (
        (TYPE_AUTHORITY, caller.service),
        (TYPE_UNIQUE_ID, caller.flow),
        (TYPE_AGENT, caller.agent),
    ):
        data = value.encode()
        body += _TLV.pack(kind, len(data)) + data
    return _HEADER.pack(SIGNATURE, _PROXY, _TCP6 if is_ipv6 else _TCP4, len(body)) + body


def own_header(version: Version) -> bytes:
    """Return what goes before a connection of our own, such as a check."""
    if version == "v1":
        return b"PROXY UNKNOWN\r\n"
    return _HEADER.pack(SIGNATURE, _LOCAL, _UNSPECIFIED, 0)


def _mapped(address: str) -> IPv6Address:
    """Return an address as IPv6, since both of a header are of one family."""
    return IPv6Address(address if ":" in address else f"::ffff:{address}")
