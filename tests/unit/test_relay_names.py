"""relay.names: what an agent may ask of DNS through a relay, and what of the answer it sees."""

from __future__ import annotations

from ipaddress import IPv4Address

import msgspec
import pytest

from relay.names import Asked, answer, judge
from tests.support.identities import grants
from ztna.dns import (
    Code,
    HostData,
    Message,
    Record,
    SoaData,
    SrvData,
    Type,
    decode,
    encode_query,
    encode_response,
)
from ztna.errors import ProtocolError
from ztna.names import Zone
from ztna.wire.control import DNS_RESPONSE_BYTES_MAX

ZONE = Zone("ztna.local")
MAY_USE = grants(["web-app"]).allows
SOA = Record("ztna.local", Type.SOA, 1, 10, SoaData("ns.ztna.local", "h.ztna.local", 7, 1, 2, 3, 10))


def asked(name: str, kind: Type = Type.A) -> Asked | bytes:
    return judge(encode_query(7, name, kind, 1232), ZONE, MAY_USE)


def found(code: int = Code.NOERROR, *records: Record, stale: bool = False) -> Message:
    """Return what a resolver answered, to whatever was asked."""
    query = decode(encode_query(1, "x", Type.A, 1232))
    return decode(encode_response(query, code, records, (SOA,), stale=stale))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("web-app.ztna.local", Type.A),
        ("WEB-app.ztna.LOCAL", Type.AAAA),
        ("web-app.ztna.local", Type.TXT),
        ("x.y.web-app.ztna.local", Type.A),
        ("_web-app._tcp.ztna.local", Type.SRV),
        ("web-app._web-app._udp.ztna.local", Type.SRV),
        ("ztna.local", Type.SOA),
        ("_fresh.ztna.local", Type.TXT),
        ("_services._dns-sd._udp.ztna.local", Type.PTR),
        ("2.0.100.10.in-addr.arpa", Type.PTR),
        ("1.0.0.0.ip6.arpa", Type.PTR),
    ],
)
def test_what_is_granted_or_everybodys_may_be_asked(name: str, kind: Type) -> None:
    judged = asked(name, kind)
    assert isinstance(judged, Asked)
    assert (judged.name, judged.kind) == (name.lower(), kind)


@pytest.mark.parametrize(
    "name",
    [
        "billing.ztna.local",
        "no-such-name.ztna.local",
        "web-app.billing.ztna.local",
        "alpha.connector.ztna.local",
        "_billing._tcp.ztna.local",
        "_tcp.ztna.local",
        "a._tcp.ztna.local",
        "_dns-sd._udp.ztna.local",
        "_ztna-relay._udp.ztna.local",
        "example.org",
        "web-app.ztna.local.example.org",
        "local",
        "arpa",
    ],
)
def test_everything_else_is_refused_alike(name: str) -> None:
    refused = asked(name)
    assert isinstance(refused, bytes)
    message = decode(refused)
    assert (message.id, message.code, message.answers) == (7, Code.REFUSED, ())
    assert message.questions[0].name == name


def test_what_is_no_query_of_ours_is_said() -> None:
    assert isinstance(asked(".", Type.NS), bytes)
    for kind in (Type.ANY, Type.AXFR):
        judged = asked("web-app.ztna.local", kind)
        assert isinstance(judged, bytes) and decode(judged).code == Code.NOTIMP
    query = encode_query(7, "web-app.ztna.local", Type.A, 1232)
    for place, byte in ((2, 0x20), (len(query) - 12, 3)):  # an opcode of NOTIFY's kind, class CH
        data = bytearray(query)
        data[place] = byte
        judged = judge(bytes(data), ZONE, MAY_USE)
        assert isinstance(judged, bytes) and decode(judged).code == Code.NOTIMP
    with pytest.raises(ProtocolError):
        judge(encode_response(decode(query), Code.NOERROR), ZONE, MAY_USE)
    with pytest.raises(ProtocolError):
        judge(b"\x00\x07" + bytes(10), ZONE, MAY_USE)
    with pytest.raises(ProtocolError):
        judge(b"nonsense", ZONE, MAY_USE)


def test_an_answer_comes_back_whole_with_the_querys_own_id() -> None:
    judged = asked("web-app.ztna.local")
    assert isinstance(judged, Asked)
    record = Record("web-app.ztna.local", Type.A, 1, 30, IPv4Address("10.100.0.2"))
    message = decode(answer(judged, found(Code.NOERROR, record), ZONE, MAY_USE))
    assert (message.id, message.code, message.answers) == (7, Code.NOERROR, (record,))
    assert not message.stale
    message = decode(answer(judged, found(Code.NXDOMAIN, stale=True), ZONE, MAY_USE))
    assert (message.code, message.authority, message.stale) == (Code.NXDOMAIN, (SOA,), True)


def ptr(owner: str, host: str) -> Record:
    return Record(owner, Type.PTR, 1, 30, HostData(host))


def test_the_list_of_services_has_only_the_granted_ones() -> None:
    name = "_services._dns-sd._udp.ztna.local"
    judged = asked(name, Type.PTR)
    assert isinstance(judged, Asked)
    records = [
        ptr(name, host)
        for host in (
            "_web-app._tcp.ztna.local",
            "_billing._tcp.ztna.local",
            "_web-app._tcp.example.org",
            "_tcp.ztna.local",
            "web-app.ztna.local",
        )
    ]
    records.append(Record(name, Type.SRV, 1, 30, SrvData(0, 0, 1, "web-app.ztna.local")))
    message = decode(answer(judged, found(Code.NOERROR, *records), ZONE, MAY_USE))
    hosts = [each.data.host for each in message.answers if isinstance(each.data, HostData)]
    assert hosts == ["_web-app._tcp.ztna.local", "web-app.ztna.local"]
    message = decode(answer(judged, found(Code.NOERROR, records[1]), ZONE, MAY_USE))
    assert (message.code, message.answers) == (Code.NOERROR, ())


@pytest.mark.parametrize("count", [10, 3_000])
def test_a_list_that_fits_no_message_is_truncated_and_says_so(count: int) -> None:
    """Names of different lengths, so that what fits is not just a share."""
    name = "_services._dns-sd._udp.ztna.local"
    services = [f"s{number}" + "x" * (50 * (number % 2)) for number in range(count)]
    records = [Record(name, Type.PTR, 1, 10, HostData(f"_{each}._tcp.ztna.local")) for each in services]
    judged = judge(encode_query(7, name, Type.PTR, 1232), ZONE, grants(["*"]).allows)
    assert isinstance(judged, Asked)
    plain = found(Code.NOERROR)
    for truncated in (False, True):
        whole = msgspec.structs.replace(plain, answers=tuple(records), truncated=truncated)
        response = answer(judged, whole, ZONE, grants(["*"]).allows)
        message = decode(response)
        assert len(response) <= DNS_RESPONSE_BYTES_MAX
        assert (message.id, message.code) == (7, Code.NOERROR)
        assert message.truncated is (truncated or count == 3_000)
        if count == 10:
            assert len(message.answers) == count
        else:
            assert DNS_RESPONSE_BYTES_MAX / 100 < len(message.answers) < count


def test_an_address_of_somebody_else_is_refused_like_one_that_nobody_has() -> None:
    name = "2.0.100.10.in-addr.arpa"
    judged = asked(name, Type.PTR)
    assert isinstance(judged, Asked)
    own = decode(answer(judged, found(Code.NOERROR, ptr(name, "web-app.ztna.local")), ZONE, MAY_USE))
    assert own.code == Code.NOERROR and len(own.answers) == 1
    others = answer(judged, found(Code.NOERROR, ptr(name, "billing.ztna.local")), ZONE, MAY_USE)
    nobody = answer(judged, found(Code.NXDOMAIN), ZONE, MAY_USE)
    assert others == nobody
    assert decode(nobody).code == Code.REFUSED
