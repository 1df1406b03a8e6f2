"""What dig is told, one row a question: the whole of what dnsd promises on the wire, by one process or several."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network

import pytest
from msgspec import Struct
from msgspec.structs import replace

from dnsd.answer import Options
from dnsd.serving import Age
from tests.support.dns import SETTINGS, catalog, instance, lease, query, zone
from tests.support.dns_serving import Served, serving_by
from ztna.leases import Port

INSTANCES = 300
NAMES = zone(
    catalog(
        instance("web", "c1", ports="tcp:8080,udp:53"),
        instance("web", "c2", ports="tcp:8080,udp:53", address="192.0.2.2"),
        instance("down", status="critical"),
        instance("wild", wildcard="true"),
        *(instance("big", f"connector-{n}", address=f"192.0.2.{n % 250 + 1}") for n in range(INSTANCES)),
    ),
    {
        "web": lease("10.100.1.2", Port("tcp", 8080), Port("udp", 53), epoch=42),
        "down": lease("10.100.1.3"),
        "wild": lease("10.100.1.4"),
        "big": lease("10.100.1.5"),
    },
)
DUAL = zone(NAMES.services, NAMES.leases, replace(SETTINGS, ula=IPv6Network("fd12:3456:789a::/96")))
TALKATIVE = Options(version=b"ztna-dnsd 1", nsid=b"dns-1", secret=b"s" * 32)


def servers(now: int) -> dict[str, Served]:
    """What is asked: names that were confirmed now, some that were not for long, and those of strangers."""
    known = Age(now, True, 3600.0)
    return {
        "plain": Served(NAMES, known),
        "talkative": Served(DUAL, known, TALKATIVE),
        "stale": Served(NAMES, Age(now, False, 3600.0)),
        "ended": Served(NAMES, Age(now - 7200, True, 3600.0)),
        "strangers": Served(NAMES, known, allow=(IPv4Network("192.0.2.0/24"),)),
    }


class Row(Struct, frozen=True):
    """What is asked, by dig's arguments, and patterns that its output must and must not hold."""

    asked: str
    must: tuple[str, ...]
    must_not: tuple[str, ...] = ()
    server: str = "plain"


NOERROR, NXDOMAIN, REFUSED = "status: NOERROR", "status: NXDOMAIN", "status: REFUSED"
AUTHORITATIVE = r"flags: qr aa rd;"
SOA = r"ztna\.local\.\s+10\s+IN\s+SOA\s+ns\.ztna\.local\. hostmaster\.ztna\.local\. 7 60 10 86400 10"
WEB_A = r"\sA\s+10\.100\.1\.2\s"
TRUNCATED = r"flags: qr aa tc rd; QUERY: 1, ANSWER: 0"
COOKIE = "+cookie=0123456789abcdef"

MATRIX = {
    "A": Row("web.ztna.local A", (NOERROR, AUTHORITATIVE, "ANSWER: 1,", WEB_A, r"\s5\s+IN\s+A")),
    "A over TCP": Row("+tcp web.ztna.local A", (NOERROR, AUTHORITATIVE, WEB_A, r"\(TCP\)")),
    "A without EDNS": Row("+noedns web.ztna.local A", (NOERROR, WEB_A), ("OPT PSEUDOSECTION",)),
    "A with 512 bytes": Row("+bufsize=512 web.ztna.local A", (NOERROR, WEB_A, "udp: 1232")),
    "A with 1232 bytes": Row("+bufsize=1232 web.ztna.local A", (NOERROR, WEB_A, "udp: 1232")),
    "A with 4096 bytes": Row("+bufsize=4096 web.ztna.local A", (NOERROR, WEB_A, "udp: 1232")),
    "case is kept": Row("WeB.zTNA.local A", (NOERROR, r"WeB\.zTNA\.local\.\s+5\s+IN" + WEB_A)),
    "no recursion is offered": Row("web.ztna.local A", ("recursion requested but not available",)),
    "none is asked for": Row("+norecurse web.ztna.local A", (r"flags: qr aa;",)),
    "DO comes back": Row("+dnssec web.ztna.local A", (WEB_A, "flags: do;")),
    "AAAA of what has only A": Row("web.ztna.local AAAA", (NOERROR, "ANSWER: 0,", SOA)),
    "AAAA beside A": Row(
        "web.ztna.local AAAA", (NOERROR, r"AAAA\s+fd12:3456:789a::a64:102"), server="talkative"
    ),
    "TXT": Row("web.ztna.local TXT", (r'"ports=tcp:8080,udp:53" "epoch=42"',)),
    "freshness": Row("_fresh.ztna.local TXT", (r'\s1\s+IN\s+TXT\s+"CONFIRMED"',)),
    "no such name": Row("nobody.ztna.local A", (NXDOMAIN, AUTHORITATIVE, "ANSWER: 0,", SOA)),
    "no such type": Row("web.ztna.local MX", (NOERROR, "ANSWER: 0,", SOA)),
    "an unknown type": Row("web.ztna.local TYPE65280", (NOERROR, "ANSWER: 0,", SOA)),
    "an empty non-terminal": Row("_tcp.ztna.local SRV", (NOERROR, "ANSWER: 0,", SOA)),
    "SRV of programs": Row(
        "_web._tcp.ztna.local SRV", (r"SRV\s+0 1 8080 web\.ztna\.local\.", WEB_A, "ADDITIONAL: 2")
    ),
    "SRV of relays": Row(
        "web.ztna.local SRV", ("ANSWER: 2,", r"4435 c1\.connector\.ztna\.local\.", r"\sA\s+192\.0\.2\.1")
    ),
    "SRV of 300 instances is truncated": Row("+ignore big.ztna.local SRV", (NOERROR, TRUNCATED)),
    "and so it is with 512 bytes": Row("+ignore +noedns big.ztna.local SRV", (NOERROR, TRUNCATED)),
    "SRV of 300 instances by TCP": Row(
        "big.ztna.local SRV",
        ("retrying in TCP mode", f"ANSWER: {INSTANCES},", f"ADDITIONAL: {INSTANCES + 1}"),
    ),
    "SRV of what is down": Row("down.ztna.local SRV", (NOERROR, "ANSWER: 0,", SOA)),
    "A of what is down": Row("down.ztna.local A", (r"\sA\s+10\.100\.1\.3",)),
    "why it is down": Row("down.ztna.local TXT", ('"reason=no_healthy_connector"',)),
    "connector": Row("c2.connector.ztna.local A", (r"\sA\s+192\.0\.2\.2",)),
    "wildcard": Row("x.wild.ztna.local A", (r"x\.wild\.ztna\.local\.\s+5\s+IN\s+A\s+10\.100\.1\.4",)),
    "no wildcard": Row("x.web.ztna.local A", (NXDOMAIN, SOA)),
    "reverse": Row("-x 10.100.1.2", (r"PTR\s+web\.ztna\.local\.",)),
    "reverse of nobody": Row("-x 10.100.9.9", (NXDOMAIN, r"100\.10\.in-addr\.arpa\.\s+10\s+IN\s+SOA")),
    "reverse of others": Row("-x 192.0.2.1", (REFUSED,)),
    "reverse of IPv6": Row("-x fd12:3456:789a::a64:102", (r"PTR\s+web\.ztna\.local\.",), server="talkative"),
    "services": Row("_services._dns-sd._udp.ztna.local PTR", (r"PTR\s+_web\._udp\.ztna\.local\.",)),
    "browsing": Row("_web._tcp.ztna.local PTR", (r"PTR\s+web\._web\._tcp\.ztna\.local\.",)),
    "where to browse": Row("lb._dns-sd._udp.ztna.local PTR", (r"PTR\s+ztna\.local\.",)),
    "apex SOA": Row("ztna.local SOA", (NOERROR, "ANSWER: 1,", r"SOA\s+ns\.ztna\.local\.")),
    "apex NS": Row("ztna.local NS", (r"NS\s+ns\.ztna\.local\.", r"\sA\s+192\.0\.2\.53")),
    "ANY is minimal": Row("+notcp web.ztna.local ANY", (NOERROR, r'HINFO\s+"RFC8482" ""'), (WEB_A,)),
    "ANY is minimal by TCP": Row("+tcp web.ztna.local ANY", (r'HINFO\s+"RFC8482" ""',), (WEB_A,)),
    "outside": Row("example.com A", (REFUSED, "flags: qr rd;", "ANSWER: 0,")),
    "the root": Row(". NS", (REFUSED,)),
    "another class": Row("web.ztna.local HS A", (REFUSED,)),
    "a transfer": Row("ztna.local AXFR", ("Transfer failed",), (WEB_A,)),
    "a transfer over UDP": Row("+notcp ztna.local IXFR=1", ("MSG SIZE  rcvd: 28",), (WEB_A,)),
    "version.bind": Row("version.bind CH TXT", (REFUSED,)),
    "version.bind, wanted": Row(
        "version.bind CH TXT", (NOERROR, r'CH\s+TXT\s+"ztna-dnsd 1"'), server="talkative"
    ),
    "id.server, wanted": Row("id.server CH TXT", (r'CH\s+TXT\s+"dns-1"',), server="talkative"),
    "NSID": Row("+nsid web.ztna.local A", (WEB_A,), ("NSID",)),
    "NSID, wanted": Row("+nsid web.ztna.local A", (WEB_A, r'NSID: .*"dns-1"'), server="talkative"),
    "a cookie is not answered without a secret": Row(f"{COOKIE} web.ztna.local A", (WEB_A,), ("COOKIE",)),
    "a cookie is answered with ours": Row(
        f"{COOKIE} web.ztna.local A",
        (WEB_A, r"COOKIE: 0123456789abcdef01000000[0-9a-f]{24} \(good\)"),
        server="talkative",
    ),
    "a cookie alone": Row(
        f"+header-only {COOKIE}",
        (NOERROR, "QUERY: 0,", r"COOKIE: 0123456789abcdef01000000"),
        server="talkative",
    ),
    "a cookie of a wrong length": Row("+ednsopt=10:0123 +nocookie web.ztna.local A", ("status: FORMERR",)),
    "keepalive by TCP": Row(
        "+tcp +keepalive web.ztna.local A", (WEB_A, "TCP.KEEPALIVE: 10.0 secs"), server="talkative"
    ),
    "keepalive by UDP": Row("+keepalive web.ztna.local A", (WEB_A,), ("TCP.KEEPALIVE:",), server="talkative"),
    "an unknown EDNS option": Row("+ednsopt=65001:cafe web.ztna.local A", (NOERROR, WEB_A), ("65001",)),
    "unknown EDNS flags": Row("+ednsflags=0x40 web.ztna.local A", (NOERROR, WEB_A), ("MBZ",)),
    "EDNS version 1": Row(
        "+edns=1 +noednsneg web.ztna.local A", ("status: BADVERS", "EDNS: version: 0", "ANSWER: 0,")
    ),
    "NOTIFY from a stranger": Row(
        "+opcode=notify ztna.local SOA", ("opcode: NOTIFY", "status: (NOTIMP|REFUSED)")
    ),
    "UPDATE": Row("+opcode=update ztna.local SOA", ("opcode: UPDATE", "status: NOTIMP")),
    "STATUS": Row("+opcode=status ztna.local SOA", ("status: NOTIMP",)),
    "no question": Row("+header-only +noedns", ("status: FORMERR",)),
    "stale": Row("web.ztna.local A", (WEB_A, r"EDE: 3 \(Stale Answer\)", r"\s5\s+IN\s+A"), server="stale"),
    "stale and not there": Row("nobody.ztna.local A", (NXDOMAIN, r"EDE: 19 "), server="stale"),
    "stale without EDNS": Row("+noedns web.ztna.local A", (WEB_A,), ("EDE",), server="stale"),
    "too old": Row("web.ztna.local A", ("status: SERVFAIL", "EDE: 22 "), server="ended"),
    "who may not ask": Row("web.ztna.local A", (REFUSED, "EDE: 18 "), server="strangers"),
    "who may not list": Row("_services._dns-sd._udp.ztna.local PTR", (REFUSED,), ("PTR\\s+_",), "strangers"),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two workers"])
def asked(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, int], int]]:
    """The ports of the servers, and when their names were confirmed."""
    now = int(time.time())
    with serving_by(request.param, servers(now)) as ports:
        yield ports, now


@pytest.fixture
def ports(asked: tuple[dict[str, int], int]) -> dict[str, int]:
    return asked[0]


@pytest.mark.parametrize("row", MATRIX.values(), ids=MATRIX.keys())
def test_dig_is_told(asked: tuple[dict[str, int], int], row: Row) -> None:
    ports, confirmed_at = asked
    argv = ["dig", "@127.0.0.1", "-p", str(ports[row.server]), "+nocmd", "+tries=1", "+time=5", "+nocookie"]
    done = subprocess.run([*argv, *row.asked.split()], capture_output=True, text=True, timeout=30)
    for pattern in row.must:
        pattern = pattern.replace("CONFIRMED", str(confirmed_at))
        assert re.search(pattern, done.stdout), f"no {pattern!r} in {done.stdout}"
    for pattern in row.must_not:
        assert not re.search(pattern, done.stdout), f"{pattern!r} in {done.stdout}"


PLAIN = query("web.ztna.local")
RAW = {
    "two questions": (PLAIN[:4] + b"\0\2" + PLAIN[6:] + PLAIN[12:], 1),
    "no question": (PLAIN[:4] + bytes(8), 1),
    "a name that points to itself": (PLAIN[:12] + b"\xc0\x0c\0\1\0\1", 1),
    "an answer": (PLAIN[:2] + b"\x80" + PLAIN[3:], None),
    "too short": (PLAIN[:11], None),
}


@pytest.mark.parametrize(("data", "code"), RAW.values(), ids=RAW.keys())
def test_what_dig_cannot_ask(ports: dict[str, int], data: bytes, code: int | None) -> None:
    """The answer's code, or none at all: the next question is answered first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(("127.0.0.1", ports["plain"]))
        sock.send(data)
        sock.send(b"\xab\xcd" + PLAIN[2:])
        answers = [sock.recv(4096)]
        if code is not None:
            assert answers[0][:2] == data[:2]
            assert answers[0][3] & 15 == code
            answers.append(sock.recv(4096))
        assert answers[-1][:2] == b"\xab\xcd"
