"""Packets of programs as the device brings them, without a device."""

from __future__ import annotations

from collections import Counter

import pytest

from sidecar.agent.listeners import Datagrammed, VirtualPort
from sidecar.agent.tunnel import Tunnel
from tests.unit.test_sidecar_agent_fragments import cut
from ztna.leases import Protocol
from ztna.names import ServiceName
from ztna.packet import Packet, build_echo_reply, build_echo_request, build_udp, parse
from ztna.telemetry import DROPS
from ztna.udp import SockAddr

WEB = ServiceName("web-app")
VIP, ASKER = "10.100.0.2", ("10.100.0.0", 40_000)


def at(protocol: Protocol, port: int, address: str = VIP) -> VirtualPort:
    return VirtualPort(WEB, protocol, VIP, port, address)


class Ground:
    """A tunnel, what it handed on, and what programs got from it."""

    def __init__(self, *wanted: VirtualPort) -> None:
        self.told: list[Packet] = []
        self.received: list[tuple[Datagrammed, bytes, SockAddr]] = []
        self.tunnel = Tunnel(
            lambda packet: self.told.append(parse(packet)), lambda *args: self.received.append(args)
        )
        self.tunnel.apply(wanted)


def drops() -> Counter[str]:
    return Counter({why: DROPS.labels("agent_tun", why)._value.get() for why in ("not_carried", "fragments")})


async def test_datagrams_and_pings_are_handed_on_and_answered() -> None:
    ground = Ground(at("tcp", 80), at("udp", 53), at("icmp", 0))
    assert ground.tunnel.bound == {at("udp", 53), at("icmp", 0)}
    ground.tunnel.received(build_udp(*ASKER, VIP, 53, b"question"))
    ground.tunnel.received(build_echo_request(ASKER[0], VIP, 77, 5, b"ping"))
    (dns, question, source), (pings, ping, pinger) = ground.received
    assert (dns.at, question, source) == (at("udp", 53), b"question", ASKER)
    assert (pings.at, ping, pinger) == (at("icmp", 0), b"\0\5ping", (ASKER[0], 77))
    dns.send(b"answer", source)
    pings.send(ping, pinger)
    pings.tell(build_udp(*ASKER, VIP, 53, b"whole"))
    answer, pong, whole = ground.told
    assert (answer.payload, answer.source, answer.source_port) == (b"answer", VIP, 53)
    assert (answer.destination, answer.destination_port) == ASKER
    assert pong.is_echo_reply and (pong.identifier, pong.sequence, pong.payload) == (77, 5, b"ping")
    assert whole.payload == b"whole"


async def test_what_nobody_published_is_answered_by_icmp() -> None:
    ground = Ground(at("udp", 53))
    for packet, code in (
        (build_udp(*ASKER, VIP, 54, b"x"), 3),
        (build_echo_request(ASKER[0], VIP, 1, 1, b""), 13),
        (build_udp(*ASKER, "10.100.0.3", 53, b"x"), 1),
    ):
        ground.tunnel.received(packet)
        assert (ground.told[-1].icmp_type, ground.told[-1].icmp_code) == (3, code)
    assert not ground.received


async def test_ipv6_has_its_own_addresses() -> None:
    ground = Ground(at("udp", 53, "fd12::2"), at("icmp", 0, "fd12::2"))
    ground.tunnel.received(build_udp("fd12::1", 40_000, "fd12::2", 53, b"question"))
    ground.tunnel.received(build_echo_request("fd12::1", "fd12::2", 7, 1, b"ping"))
    for port, data, source in ground.received:
        port.send(data, source)
    assert [each.version for each in ground.told] == [6, 6] and ground.told[1].is_echo_reply


async def test_fragments_are_put_together() -> None:
    ground = Ground(at("udp", 53))
    payload = bytes(5000)
    for piece in reversed(cut(build_udp(*ASKER, VIP, 53, payload))):
        ground.tunnel.received(piece)
    assert [len(data) for _, data, _ in ground.received] == [5000]
    before = drops()
    first = cut(build_udp(*ASKER, VIP, 53, payload))[0]
    ground.tunnel.received(first)
    ground.tunnel.received(first)
    assert drops() - before == Counter({"fragments": 1})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45" + bytes(30),
        build_echo_reply(ASKER[0], VIP, 1, 1, b""),
        build_udp(*ASKER, "224.0.0.251", 5353, b"who is there"),
    ],
)
async def test_other_traffic_is_dropped_without_a_word(packet: bytes) -> None:
    ground, before = Ground(at("udp", 53), at("icmp", 0)), drops()
    ground.tunnel.received(packet)
    assert drops() - before == Counter({"not_carried": 1})
    assert not ground.told and not ground.received


async def test_a_port_that_stays_keeps_its_flows_and_one_that_goes_says_nothing_more() -> None:
    ground = Ground(at("udp", 53), at("icmp", 0))
    ground.tunnel.received(build_udp(*ASKER, VIP, 53, b"x"))
    ground.tunnel.received(build_echo_request(ASKER[0], VIP, 1, 1, b""))
    (dns, *_), (pings, *_) = ground.received
    ground.tunnel.apply([at("udp", 53)])
    assert (dns.is_closed, pings.is_closed) == (False, True)
    pings.send(b"\0\1late", (ASKER[0], 1))
    assert ground.told == []
    dns.send(bytes(65_535), ASKER)
    assert ground.told == [], "larger than a packet"
    ground.tunnel.received(build_udp(*ASKER, VIP, 53, b"x"))
    assert ground.received[-1][0] is dns
