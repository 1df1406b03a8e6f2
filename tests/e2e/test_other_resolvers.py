"""The page's configurations of other resolvers, in the resolvers: each leads to dnsd's names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from dnsd.answer import Answers, Options
from dnsd.forwarding import Forwarder
from dnsd.server import Server
from tests.support.consul import find_binary, free_ports, require_binary
from tests.support.dns import SETTINGS, catalog, instance, lease, zone
from tests.support.dns_serving import serving
from tests.support.lab import until
from ztna.config import Endpoint

PAGE = Path(__file__).resolve().parents[2] / "docs/names.md"
NAMES = zone(catalog(instance("web", "c1")), {"web": lease("10.100.1.2")})
LOOPBACK = (IPv4Network("127.0.0.0/8"),)


@pytest.fixture(scope="module")
def dnsd() -> Iterator[int]:
    assert SETTINGS.domain == "ztna.local"
    nobody = Forwarder([Endpoint("127.0.0.1", free_ports(1)[0])], 0.5)
    options = Options(forwards=True, bounds=NAMES)
    with serving({"dnsd": Server(LOOPBACK, Answers(NAMES, options=options), forwarder=nobody)}) as ports:
        yield ports["dnsd"]


def block(kind: str, dnsd: int) -> str:
    """Return the page's configuration of one resolver, for the dnsd of this run."""
    found = re.search(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1).replace("5533", str(dnsd))


def unbound(folder: Path, dnsd: int, port: int) -> list[str]:
    own = f'interface: 127.0.0.1@{port}\n    username: ""\n    chroot: ""\n    pidfile: ""\n    use-syslog: no\n    '
    text = block("unbound", dnsd).replace("server:\n    ", f"server:\n    {own}", 1)
    (folder / "unbound.conf").write_text(f"{text}\nremote-control:\n    control-enable: no\n")
    return ["unbound", "-d", "-c", str(folder / "unbound.conf")]


def dnsmasq(folder: Path, dnsd: int, port: int) -> list[str]:
    (folder / "dnsmasq.conf").write_text(block("dnsmasq", dnsd))
    own = [f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts"]
    return ["dnsmasq", "--keep-in-foreground", "--pid-file=", f"--conf-file={folder}/dnsmasq.conf", *own]


def coredns(folder: Path, dnsd: int, port: int) -> list[str]:
    program = require_binary("coredns")
    (folder / "Corefile").write_text(block("corefile", dnsd).replace(":53 ", f":{port} "))
    return [str(program), "-conf", str(folder / "Corefile")]


def consul(folder: Path, dnsd: int, port: int) -> list[str]:
    program = find_binary("newest") or require_binary("oldest")
    (folder / "recursors.json").write_text(block("consul", dnsd))
    http, serf, server, lan = free_ports(4)
    ports = [
        f"-http-port={http}",
        f"-serf-wan-port={serf}",
        f"-server-port={server}",
        f"-serf-lan-port={lan}",
    ]
    own = ["-bind=127.0.0.1", f"-dns-port={port}", *ports, "-hcl=ports { grpc = -1, grpc_tls = -1 }"]
    return [str(program), "agent", "-dev", f"-config-file={folder}/recursors.json", *own]


@pytest.mark.parametrize("resolver", [unbound, dnsmasq, coredns, consul])
def test_it_leads_to_our_names(
    tmp_path: Path, dnsd: int, resolver: Callable[[Path, int, int], list[str]]
) -> None:
    (port,) = free_ports(1)
    argv = resolver(tmp_path, dnsd, port)
    assert shutil.which(argv[0]), f"{argv[0]} is not here"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=tmp_path)
    try:

        def told(*asked: str) -> str:
            argv = ["dig", "@127.0.0.1", "-p", str(port), "+short", "+time=2", "+tries=1", *asked]
            return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout.strip()

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            return told("web.ztna.local", "A") == "10.100.1.2"

        until(f"{argv[0]} answers", answers, 30)
        assert told("_web._tcp.ztna.local", "SRV") == "0 1 8080 web.ztna.local."
        if resolver is not consul:
            # Consul answers reverse questions about private addresses by itself.
            assert told("-x", "10.100.1.2") == "web.ztna.local."
    finally:
        process.terminate()
        process.wait(30)
