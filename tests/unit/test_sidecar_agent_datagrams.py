"""Datagrams and pings of programs as inner packets, and what comes back for exactly one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sidecar.agent.broker import Broker
from sidecar.agent.datagrams import Datagrams
from sidecar.agent.links import Link, Links
from sidecar.agent.listeners import PacketPort, VirtualPort
from ztna.leases import Protocol
from ztna.names import ServiceName
from ztna.packet import (
    Packet,
    Unreachable,
    build_echo_reply,
    build_echo_request,
    build_udp,
    icmp_error,
    parse,
)
from ztna.reasons import Reason
from ztna.telemetry import DROPS

WEB, VIP, OVERRIDE, SIX = ServiceName("web-app"), "10.100.0.2", "127.53.0.80", "fd12::2"
ASKER, PINGER = ("10.100.0.0", 40_000), ("10.100.0.0", 77)


class Ground:
    """Datagrams over one link that is there at once; `sent` went to the connector, `told` to programs."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.told: list[Packet] = []
        self.fails = False
        self.link = SimpleNamespace(
            is_ready=True,
            carries=lambda session: False,
            send=lambda service, packet: self.sent.append(packet),
        )
        numbers = itertools.count(1)
        broker = SimpleNamespace(
            number=lambda: next(numbers), want=self._want, release=lambda flow: None, settle=lambda flow: None
        )
        links = SimpleNamespace(of=lambda session, former, rode: self.link)
        self.datagrams = Datagrams(cast(Broker, broker), cast(Links, links), idle_s=60.0)

    def port(self, protocol: Protocol, port: int, at: str = VIP) -> PacketPort:
        return PacketPort(
            VirtualPort(WEB, protocol, VIP, port, at), lambda packet: self.told.append(parse(packet))
        )

    def comes(self, packet: bytes) -> None:
        self.datagrams.packet_received(cast(Link, self.link), WEB, packet)

    def _want(
        self, flow: int, service: ServiceName, ready: Callable[[Any], None], failed: Callable[[Reason], None]
    ) -> None:
        if self.fails:
            failed(Reason.NO_GRANT)
        else:
            ready(SimpleNamespace(opened=None))


def drops(why: str) -> float:
    return float(DROPS.labels("agent_udp", why)._value.get())


async def test_a_ping_goes_under_its_identifier_and_its_answer_to_who_asked() -> None:
    ground = Ground()
    pings = ground.port("icmp", 0)
    ground.datagrams.received(pings, b"\0\5data", PINGER)
    ground.datagrams.received(pings, b"\0\6data", PINGER)
    requests = [parse(packet) for packet in ground.sent]
    assert [(each.is_echo_request, each.identifier, each.sequence) for each in requests] == [
        (True, 77, 5),
        (True, 77, 6),
    ]
    ground.comes(build_echo_reply(VIP, PINGER[0], 77, 5, b"data"))
    (pong,) = ground.told
    assert (pong.is_echo_reply, pong.identifier, pong.sequence, pong.payload) == (True, 77, 5, b"data")
    before = drops("no_such_flow")
    ground.comes(build_echo_reply(VIP, PINGER[0], 78, 5, b"another's"))
    ground.comes(build_udp(VIP, 7, *ASKER, b"nobody asked"))
    assert len(ground.told) == 1 and drops("no_such_flow") == before + 2
    assert ground.datagrams.flows == 1


async def test_ipv6_programs_are_carried_as_ipv4_and_answered_as_ipv6() -> None:
    ground = Ground()
    ground.datagrams.received(ground.port("icmp", 0, SIX), b"\0\1x", ("fd12::1", 9))
    inner = parse(ground.sent[0])
    assert (inner.version, inner.destination, inner.identifier) == (4, VIP, 9)
    ground.comes(build_echo_reply(VIP, inner.source, 9, 1, b"x"))
    assert (ground.told[0].version, ground.told[0].source, ground.told[0].destination) == (6, SIX, "fd12::1")


async def test_a_socket_that_calls_a_service_at_two_addresses_is_answered_from_the_one_it_called() -> None:
    ground = Ground()
    program = ("10.100.0.0", 40_000)
    ground.datagrams.received(ground.port("udp", 7), b"first", program)
    ground.datagrams.received(ground.port("udp", 7, OVERRIDE), b"second", program)
    first, second = map(parse, ground.sent)
    assert (first.source, first.source_port) == program
    assert second.source not in (first.source, VIP)
    for asked in (second, first):
        ground.comes(build_udp(VIP, 7, asked.source, asked.source_port, asked.payload))
    assert [(each.source, each.destination, each.payload) for each in ground.told] == [
        (OVERRIDE, program[0], b"second"),
        (VIP, program[0], b"first"),
    ]


@pytest.mark.parametrize(
    ("kind", "mtu", "said"),
    [
        (Unreachable.PORT, 0, (3, 3)),
        (Unreachable.HOST, 0, (3, 1)),
        (Unreachable.PROHIBITED, 0, (3, 13)),
        (Unreachable.TOO_BIG, 1000, (3, 4)),
    ],
)
async def test_an_error_is_told_about_what_the_program_called(
    kind: Unreachable, mtu: int, said: tuple[int, int]
) -> None:
    ground = Ground()
    ground.datagrams.received(ground.port("udp", 53, OVERRIDE), b"x", ASKER)
    ground.datagrams.received(ground.port("icmp", 0, OVERRIDE), b"\0\1x", PINGER)
    for packet in ground.sent:
        ground.comes(icmp_error(packet, kind, mtu))
    for told, ends in zip(ground.told, (ASKER, PINGER), strict=True):
        assert (told.icmp_type, told.icmp_code, told.sequence) == (*said, mtu)
        assert (told.source, told.destination) == (OVERRIDE, ASKER[0])
        at = 20 if ends is ASKER else 24
        assert told.payload[at : at + 2] == ends[1].to_bytes(2, "big")


async def test_an_error_that_quotes_nobodys_packet_is_dropped() -> None:
    ground = Ground()
    ground.datagrams.received(ground.port("udp", 53), b"x", ASKER)
    before = drops("no_such_flow"), drops("malformed")
    ground.comes(icmp_error(build_udp(*ASKER, VIP, 54, b"x"), Unreachable.PORT))
    ground.comes(icmp_error(build_echo_request(ASKER[0], VIP, ASKER[1], 1, b"x"), Unreachable.PORT))
    assert drops("no_such_flow") == before[0] + 2
    quoting_tcp = bytearray(icmp_error(ground.sent[0], Unreachable.PORT))
    ground.comes(bytes(quoting_tcp[:30]))
    ground.comes(build_echo_request(VIP, ASKER[0], 1, 1, b""))
    assert drops("malformed") == before[1] + 2
    assert not ground.told


async def test_without_a_session_a_ping_has_no_host_and_a_datagram_no_port() -> None:
    ground = Ground()
    ground.fails = True
    ground.datagrams.received(ground.port("icmp", 0), b"\0\1x", PINGER)
    ground.datagrams.received(ground.port("udp", 53), b"x", ASKER)
    assert [(each.icmp_type, each.icmp_code) for each in ground.told] == [(3, 1), (3, 3)]
    assert ground.datagrams.flows == 0
