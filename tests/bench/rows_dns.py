"""dnsd's CPU time per query beside other DNS servers with the same 1,000 names, and a C echo as the floor."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Figures,
    Measure,
    Row,
    accepts,
    cpu_seconds,
    free_port,
    need,
    running,
    wait_until,
    with_children,
)
from tests.support.consul import peers_folder
from ztna import config as configuration
from ztna.cli.mesh import dev_consul_argv
from ztna.cli.processes import console_script
from ztna.config import Config, ConsulConfig, DnsdConfig, Endpoint

NAMES = 1000
SECONDS = 4
CONSUL_VERSION = "1.19.2"
_HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """Return the labels that every contender serves."""
    return [f"service-{number:04}" for number in range(NAMES)]


def addresses() -> dict[str, str]:
    """Return an address for each label, for the contenders that are given a file."""
    return {name: f"10.100.{number // 250}.{number % 250 + 1}" for number, name in enumerate(names())}


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    dns = Dns(directory)
    return Row(
        f"dnsd: CPU per query, {NAMES:,} names, one worker",
        "<= 1.0 x Knot, <= 1.3 x the C floor, <= 0.1 x Consul (CPU us per query)",
        [
            Contender("ztna-dnsd", dns.ours),
            Contender("C echo (floor)", dns.floor),
            Contender("Knot", dns.knot),
            Contender("unbound", dns.unbound),
            Contender("dnsmasq", dns.dnsmasq),
            Contender("CoreDNS", dns.coredns),
            Contender(f"Consul DNS {CONSUL_VERSION}", dns.consul_dns),
        ],
    )


def queried(pid: int, port: int, queries: Path, clients: int = 4, outstanding: int = 100) -> Measure:
    """Return what asks a server all these queries for a while and tells its CPU time for each, children included."""
    dnsperf = need("dnsperf", "dnsperf")
    argv = [dnsperf, "-s", "127.0.0.1", "-p", str(port), "-d", str(queries), "-l", str(SECONDS)]

    def measure() -> Figures:
        pids = with_children(pid)
        before = cpu_seconds(pids)
        done = subprocess.run(
            [*argv, "-c", str(clients), "-T", "1", "-q", str(outstanding)],
            capture_output=True,
            text=True,
            timeout=SECONDS + 60,
        )
        spent = cpu_seconds(pids) - before
        completed = re.search(r"Queries completed:\s+(\d+)", done.stdout)
        codes = re.search(r"Response codes:\s+(.*)", done.stdout)
        if completed is None or codes is None or "NOERROR " not in codes.group(1):
            raise CannotMeasure(f"dnsperf: {done.stdout[-400:]}{done.stderr[-400:]}")
        count = int(completed.group(1))
        return {"CPU us/query": spent / count * 1e6, "queries/s": count / SECONDS}

    return measure


def answers_at(port: int, name: str, kind: str = "A") -> bool:
    """Whether the server at a port of loopback has a record for a name."""
    argv = ["dig", "@127.0.0.1", "-p", str(port), "+short", "+time=1", "+tries=1", name, kind]
    said = subprocess.run(argv, capture_output=True, timeout=5).stdout
    return said.strip() != b"" and b";;" not in said


class Dns:
    """Starts each server with the same names and measures it with dnsperf."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "dns"
        self.directory.mkdir()
        self._queries = self._write("queries", "".join(f"{name}.ztna.local A\n" for name in names()))
        self._consul_http = self._consul_dns = 0

    def _write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    @contextlib.contextmanager
    def _serving(self, argv: list[str], port: int, log: str, **environment: str) -> Iterator[Measure]:
        with running(argv, self.directory / f"{log}.log", **environment) as pid:
            wait_until(log, lambda: answers_at(port, f"{names()[-1]}.ztna.local"))
            yield queried(pid, port, self._queries)

    @contextlib.contextmanager
    def _consul(self) -> Iterator[int]:
        """Consul with every service registered, in dev mode; yields its pid."""
        binary = peers_folder() / f"consul-{CONSUL_VERSION}"
        if not binary.exists():
            raise CannotMeasure("no Consul: run `make peers`")
        self._consul_http, self._consul_dns = free_port(), free_port()
        argv = dev_consul_argv(str(binary), CONSUL_VERSION, self._consul_http, free_port(), free_port())
        argv += ["-dns-port", str(self._consul_dns)]
        argv = [word.replace("dns = -1\n", "") for word in argv]
        with running(argv, self.directory / "consul.log") as pid:
            api = f"http://127.0.0.1:{self._consul_http}/v1"
            wait_until(
                "Consul", lambda: len(urllib.request.urlopen(f"{api}/status/leader", timeout=2).read()) > 4
            )
            for name in names():
                body = {
                    "Name": name,
                    "ID": f"{name}@c",
                    "Tags": ["ztna"],
                    "Address": "192.0.2.1",
                    "Port": 4435,
                }
                body["Meta"] = {"ztna-connector": "c", "ztna-ports": "tcp:8080"}
                put = urllib.request.Request(
                    f"{api}/agent/service/register", data=json.dumps(body).encode(), method="PUT"
                )
                urllib.request.urlopen(put, timeout=10).close()
            yield pid

    @contextlib.contextmanager
    def ours(self) -> Iterator[Measure]:
        """ztna-dnsd on a real Consul: leases taken, zone compiled."""
        port, admin = free_port(), free_port()
        with self._consul():
            section = DnsdConfig(listen=Endpoint("127.0.0.1", port), admin=Endpoint("127.0.0.1", admin))
            consul = ConsulConfig(address=f"http://127.0.0.1:{self._consul_http}")
            file = self._write("dnsd.yaml", configuration.dump(Config(consul=consul, dnsd=section)))
            argv = [console_script("ztna-dnsd"), "--config", str(file)]
            with self._serving(argv, port, "dnsd") as measure:
                yield measure

    @contextlib.contextmanager
    def floor(self) -> Iterator[Measure]:
        """A C program that echoes."""
        gcc, port, binary = need("gcc", "gcc"), free_port(), self.directory / "echo"
        subprocess.run([gcc, "-O2", "-o", str(binary), str(_HERE / "echo_floor.c")], check=True, timeout=60)
        with running([str(binary), str(port)], self.directory / "echo.log") as pid:
            yield queried(pid, port, self._queries)

    def _zone(self) -> Path:
        head = "$ORIGIN ztna.local.\n@ 5 SOA ns admin 1 60 60 60 5\n@ 5 NS ns\nns 5 A 127.0.0.1\n"
        return self._write("zone", head + "".join(f"{name} 5 A {ip}\n" for name, ip in addresses().items()))

    @contextlib.contextmanager
    def knot(self) -> Iterator[Measure]:
        """Knot with one UDP worker."""
        port, zone = free_port(), self._zone()
        storage = self.directory / "knot"
        storage.mkdir()
        text = (
            f"server:\n  rundir: {storage}\n  listen: 127.0.0.1@{port}\n  udp-workers: 1\n  tcp-workers: 1\n"
            f"database:\n  storage: {storage}\n"
            f"zone:\n  - domain: ztna.local\n    storage: {self.directory}\n    file: {zone}\n"
        )
        argv = [need("knotd", "knot"), "-c", str(self._write("knot.conf", text))]
        with self._serving(argv, port, "knot") as measure:
            yield measure

    @contextlib.contextmanager
    def unbound(self) -> Iterator[Measure]:
        """unbound with local data and one thread."""
        port = free_port()
        data = "".join(f'  local-data: "{name}.ztna.local. 5 A {ip}"\n' for name, ip in addresses().items())
        text = (
            f'server:\n  interface: 127.0.0.1@{port}\n  num-threads: 1\n  username: ""\n  chroot: ""\n'
            f'  pidfile: ""\n  use-syslog: no\n  do-daemonize: no\n  local-zone: "ztna.local." static\n{data}'
            "remote-control:\n  control-enable: no\n"
        )
        argv = [need("unbound", "unbound"), "-d", "-c", str(self._write("unbound.conf", text))]
        with self._serving(argv, port, "unbound") as measure:
            yield measure

    @contextlib.contextmanager
    def dnsmasq(self) -> Iterator[Measure]:
        """dnsmasq with host records."""
        port = free_port()
        hosts = self._write("hosts", "".join(f"{ip} {name}.ztna.local\n" for name, ip in addresses().items()))
        argv = [
            *(need("dnsmasq", "dnsmasq-base"), "--keep-in-foreground", f"--port={port}", "--bind-interfaces"),
            *(
                "--listen-address=127.0.0.1",
                "--no-resolv",
                "--no-hosts",
                f"--addn-hosts={hosts}",
                "--user=root",
            ),
            "--conf-file=/dev/null",
        ]
        with self._serving(argv, port, "dnsmasq") as measure:
            yield measure

    @contextlib.contextmanager
    def coredns(self) -> Iterator[Measure]:
        """CoreDNS with the file plugin, on one processor."""
        binary, port = peers_folder() / "coredns-1.14.3", free_port()
        if not binary.exists():
            raise CannotMeasure("no CoreDNS: run `make peers-bench`")
        corefile = self._write(
            "Corefile", f"ztna.local:{port} {{\n  bind 127.0.0.1\n  file {self._zone()}\n}}\n"
        )
        with self._serving([str(binary), "-conf", str(corefile)], port, "coredns", GOMAXPROCS="1") as measure:
            yield measure

    @contextlib.contextmanager
    def consul_dns(self) -> Iterator[Measure]:
        """Consul's own DNS for the same registered services."""
        queries = self._write("consul-queries", "".join(f"{name}.service.consul A\n" for name in names()))
        with self._consul() as pid:
            wait_until("Consul DNS", lambda: accepts(self._consul_dns))
            yield queried(pid, self._consul_dns, queries)
