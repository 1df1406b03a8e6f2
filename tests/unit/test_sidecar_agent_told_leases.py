"""sidecar.agent.told_leases: leases as TXT and A records tell them."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from sidecar.agent.told_leases import listed, service_of, told
from ztna.dns import Code, Data, HostData, Message, Record, Type, decode, encode_query, encode_response
from ztna.leases import Lease, Port
from ztna.names import Zone

NAME = "web-app.ztna.local"
IP = IPv4Address("10.100.0.2")


def message(kind: Type, *data: Data, name: str = NAME) -> Message:
    query = decode(encode_query(1, name, kind, 1232))
    return decode(encode_response(query, Code.NOERROR, [Record(name, kind, 1, 30, each) for each in data]))


def lease(*strings: bytes, ip: bool = True) -> Lease | None:
    return told(NAME, message(Type.TXT, strings), message(Type.A, *((IP,) if ip else ())))


def test_a_lease_is_put_together_from_both_records() -> None:
    found = lease(b"ports=tcp:80,udp:53", b"ports=tcp:8080", b"epoch=1796045272108", b"reason=x")
    assert found == Lease(IP, 1796045272108, (Port("tcp", 80), Port("udp", 53), Port("tcp", 8080)))
    assert lease(b"ports=", b"epoch=1") == Lease(IP, 1, ())


@pytest.mark.parametrize(
    "strings",
    [
        (b"ports=tcp:80",),
        (b"ports=tcp:80", b"epoch=x"),
        (b"ports=tcp:80", b"epoch=1", b"epoch=2"),
        (b"ports=sctp:80", b"epoch=1"),
        (b"ports=tcp:x", b"epoch=1"),
        (b"ports=tcp:65536", b"epoch=1"),
        (b"ports=tcp:0", b"epoch=1"),
        (b"ports=tcp:80", b"epoch=9223372036854775808"),
        (b"problem=ports disagree",),
        (b"\xff",),
    ],
)
def test_what_tells_no_lease_is_none(strings: tuple[bytes, ...]) -> None:
    assert lease(*strings) is None


def test_without_an_address_or_of_another_name_there_is_none() -> None:
    assert lease(b"ports=tcp:80", b"epoch=1", ip=False) is None
    text, address = message(Type.TXT, (b"epoch=1",)), message(Type.A, IP)
    assert told("billing.ztna.local", text, address) is None
    assert told(NAME, message(Type.A, IP), address) is None


def test_the_list_of_services_is_read_and_what_is_no_name_left_out() -> None:
    hosts = [HostData(f"{each}.ztna.local") for each in ("_web-app._tcp", "_db._udp", "_-x-._tcp")]
    found = message(Type.PTR, *hosts, name="_services._dns-sd._udp.ztna.local")
    assert list(listed(found, Zone("ztna.local"))) == ["web-app", "db"]
    assert list(listed(message(Type.A, IP), Zone("ztna.local"))) == []


@pytest.mark.parametrize(
    ("name", "service"),
    [
        ("web-app.ztna.local", "web-app"),
        ("A.b.Web-App.ZTNA.local", "web-app"),
        ("alpha.connector.ztna.local", None),
        ("_web-app._tcp.ztna.local", None),
        ("ztna.local", None),
        ("web-app.example.org", None),
    ],
)
def test_a_name_is_of_the_service_that_it_ends_with(name: str, service: str | None) -> None:
    assert service_of(name, Zone("ztna.local")) == service
