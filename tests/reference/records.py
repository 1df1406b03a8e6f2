"""What dnsd answers, from a zone of one service and the code that answers: name, type, TTL and data."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dnsd.answer import STALE_TTL_SECONDS
from dnsd.services import describe
from dnsd.zone import FRESH_TTL_SECONDS, Outcome, RelayHost, Settings, ZoneData
from tests.reference import markdown
from ztna.catalog import MESH_TAG, Instance
from ztna.config import DnsdConfig
from ztna.dns import Data, HostData, SoaData, SrvData, Type
from ztna.leases import Lease, Port
from ztna.names import Zone
from ztna.published import META_CONNECTOR, META_PORTS, META_WILDCARD

EPOCH = 1_796_045_272_108
FRESH_AT = 1_796_045_300
DEFAULTS = DnsdConfig()
SETTINGS = Settings(
    Zone("ztna.local"),
    IPv4Network("10.100.0.0/16"),
    DEFAULTS.ttl_s,
    DEFAULTS.negative_ttl_s,
    IPv4Address("192.0.2.53"),
    ula=IPv6Network("fd12:3456:789a::/96"),
    relays=(RelayHost("edge-1", IPv4Address("192.0.2.20"), 4433),),
)
INSTANCE = Instance(
    service="web-app",
    instance_id="web-app@rack-7",
    node="host-7",
    address="192.0.2.10",
    port=4435,
    tags=(MESH_TAG,),
    meta={META_CONNECTOR: "rack-7", META_PORTS: "tcp:80", META_WILDCARD: "true"},
    status="passing",
)
NAMES = (
    "web-app",
    "any.name.web-app",
    "rack-7.connector",
    "_web-app._tcp",
    "web-app._web-app._tcp",
    "_services._dns-sd._udp",
    "b._dns-sd._udp",
    "_ztna-relay._udp",
    "edge-1.relay",
    "ns",
    "_fresh",
    "",
)
INTRODUCTION = f"""What dnsd answers for a zone `ztna.local` in which the connector `rack-7` serves `web-app`
on port 80, with `dnsd.pool.ula`, one relay in `dnsd.relays` and `wildcard: true`. [Names](../names.md) says
what each is for and who may ask.

TTLs are those of the defaults (`dnsd.ttl_s`); while Consul confirms nothing they are {STALE_TTL_SECONDS} s
at most. A name that exists without the type that was asked is answered NOERROR without records, and one
that does not exist NXDOMAIN, each with the SOA under `dnsd.negative_ttl_s` ({SETTINGS.negative_ttl_s} s).
ANY is one HINFO (RFC 8482). What lies outside the zone is REFUSED, or an upstream's answer."""


def page() -> str:
    """Return the page."""
    zone = ZoneData(
        SETTINGS,
        {"web-app": describe("web-app", (INSTANCE,))},
        {"web-app": Lease(IPv4Address("10.100.0.2"), EPOCH, (Port("tcp", 80),))},
        FRESH_AT,
        FRESH_AT,
    )
    names = [f"{name}.ztna.local".lstrip(".") for name in NAMES]
    names += [IPv4Address("10.100.0.2").reverse_pointer, IPv6Address("fd12:3456:789a::a64:2").reverse_pointer]
    rows = [row for name in names for row in _rows(zone, name)]
    return markdown.page(
        "DNS records", "`dnsd/zone.py`", INTRODUCTION, markdown.table(("Name", "Type", "TTL", "Data"), rows)
    )


def _rows(zone: ZoneData, name: str) -> Iterator[tuple[str, str, str, str]]:
    for kind in (Type.SOA, Type.NS, Type.A, Type.AAAA, Type.SRV, Type.TXT, Type.PTR):
        found = zone.find(tuple(name.split(".")), kind)
        if found.outcome is Outcome.FRESH:
            yield markdown.code(name), kind.name, str(FRESH_TTL_SECONDS), markdown.code(f'"{zone.fresh_at}"')
        for data in found.records:
            yield markdown.code(name), kind.name, str(SETTINGS.ttl_s), markdown.code(_data(data))


def _data(data: Data) -> str:
    match data:
        case SrvData(priority, weight, port, target):
            return f"{priority} {weight} {port} {target}."
        case SoaData(mname, rname, serial, refresh, retry, expire, minimum):
            return f"{mname}. {rname}. {serial} {refresh} {retry} {expire} {minimum}"
        case HostData(host):
            return f"{host}."
        case tuple():
            return " ".join(f'"{part.decode()}"' for part in data)
        case _:
            return str(data)
