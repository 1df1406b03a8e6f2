"""A mesh of real processes on test hosts: Consul, dnsd's, relays, connectors, agents, as a test wants them.

Every daemon is its own console script with a written configuration, as people run it. Nothing here knows
what is right; the tests do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import yaml
from cryptography import x509

from tests.support.consul import (
    MANAGEMENT_TOKEN,
    POLICIES,
    ServerTls,
    free_ports,
    require_binary,
    server_argv,
)
from tests.support.consul_tls import ConsulPki
from tests.support.namespaces import Host, LocalNetwork, Network
from ztna import config as configuration
from ztna.ca import Authority, replace_file, write_private
from ztna.cli.processes import console_script
from ztna.config import (
    AgentConfig,
    CheckConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    DnsdConfig,
    Endpoint,
    PoolConfig,
    RelayConfig,
    RelayTarget,
    RouteConfig,
    TlsConfig,
)
from ztna.names import ConnectorId, ServiceName
from ztna.sections import Section, plain
from ztna.wire.control import Address

CONSUL_PORT, CONSUL_TLS_PORT = 8500, 8510
READY_SECONDS = 30.0
POLL_SECONDS = 0.05
STOP_SECONDS = 10.0
UNEXPECTED = "ztna_unexpected_errors_total"
_open: list[Lab] = []
"""Those a test is in: what their processes said belongs to the report when it fails."""
_SERVICE_RULE = re.compile(r'^service "[^"]+" \{\n.*?^\}\n', re.MULTILINE | re.DOTALL)


def until(what: str, condition: Callable[[], Any], seconds: float = 20.0, every: float = POLL_SECONDS) -> Any:
    """Wait for a condition that is not ours to signal and return its first true value, or AssertionError."""
    deadline = time.monotonic() + seconds
    last: Any = None
    while True:
        try:
            last = condition()
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            last = error
        else:
            if last:
                return last
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s; last seen: {last!r}"
        time.sleep(every)


@dataclass
class Running:
    """One process on a host, its output in a file."""

    name: str
    host: Host
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Running:
        """Start it (again)."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.host.prefix, *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Its pid: `ip netns exec` replaces itself with the command."""
        assert self.process is not None, f"{self.name} was not started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; its children too would be somebody else's."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with -9."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(STOP_SECONDS)

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """End it with SIGTERM and return its status; AssertionError when it takes longer than `seconds`."""
        assert self.process is not None
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"{self.name} did not end within {seconds} s of SIGTERM:\n{self.tail()}"
            ) from None

    def restart(self) -> Running:
        """SIGTERM, then start again."""
        self.stop()
        return self.start()

    def memory(self) -> int:
        """Return its resident size in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"{self.name} has no VmRSS; it ended")

    def output(self) -> str:
        """Return all it printed."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 25) -> str:
        """Return the last lines it printed."""
        return "\n".join(self.output().splitlines()[-lines:])

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log records of one event (daemons log JSON when not on a terminal)."""
        found = []
        for line in self.output().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("event") == name:
                    found.append(record)
        return found


@dataclass
class Daemon(Running):
    """One of ours: it has an admin port on its host's loopback."""

    admin_port: int = 0
    config_file: Path | None = None

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET on the admin port."""
        return http_get(self.host, f"http://127.0.0.1:{self.admin_port}{path}")

    def status(self) -> dict[str, Any]:
        """Return what /status tells."""
        code, text = self.get("/status")
        assert code == 200, f"{self.name} /status: {code} {text}"
        result: dict[str, Any] = json.loads(text)
        return result

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith((name + "{", name + " ")) and all(
                f'{k}="{v}"' in line for k, v in labels.items()
            ):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def packet_links(self) -> list[dict[str, Any]]:
        """Return what an agent tells of its packet links; those over TLS, which may help out, left away."""
        return [link for link in self.status()["agent"]["links"] if link["carrier"] == "quic"]

    def ready(self) -> bool:
        """Whether /readyz says so; AssertionError when it ended."""
        assert self.alive, f"{self.name} ended:\n{self.tail()}"
        return self.get("/readyz")[0] == 200

    def wait_ready(self, seconds: float = READY_SECONDS) -> Daemon:
        """Wait until it is ready."""
        try:
            until(f"{self.name} ready", self.ready, seconds)
        except AssertionError as error:
            with contextlib.suppress(OSError):
                raise AssertionError(f"{error}\n/readyz: {self.get('/readyz')[1]}\n{self.tail()}") from None
            raise AssertionError(f"{error}\n{self.tail()}") from None
        return self


def _as_written(value: Any) -> Any:
    """Return a configuration as people write it: what has its default is left out."""
    if isinstance(value, Section):
        said = {field.name: getattr(value, field.name) for field in msgspec.structs.fields(type(value))}
        defaults = {field.name: field.default for field in msgspec.structs.fields(type(value))}
        return {name: _as_written(each) for name, each in said.items() if each != defaults[name]}
    if isinstance(value, tuple):
        return [_as_written(each) for each in value]
    return plain(value, secrets=True)


def http_get(host: Host, url: str, seconds: float = 10.0) -> tuple[int, str]:
    """GET a URL from a host, small answers only; returns status and body."""
    parts = urllib.parse.urlsplit(url)
    with host.socket() as connection:
        connection.settimeout(seconds)
        connection.connect((parts.hostname, parts.port or 80))
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
        data = b""
        while block := connection.recv(65536):
            data += block
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        raise OSError(f"{url}: closed without an answer")
    return int(head.split(b" ", 2)[1]), body.decode(errors="replace")


def udp_ask(host: Host, address: str, port: int, payload: bytes, seconds: float = 1.0) -> bytes | None:
    """Send one datagram from a host and return the answer; None when none came in time."""
    with host.socket(socket.SOCK_DGRAM) as asker:
        asker.settimeout(seconds)
        asker.connect((address, port))
        try:
            asker.send(payload)
            return asker.recv(65536)
        except (TimeoutError, ConnectionRefusedError):
            return None


@dataclass
class Lab:
    """Hosts, one CA, one Consul, and whatever daemons a test adds."""

    network: Network | LocalNetwork
    directory: Path
    pool: IPv4Network = IPv4Network("127.100.0.0/16")  # noqa: RUF009 - immutable
    running: list[Running] = field(default_factory=list)
    consul: ConsulConfig = field(default_factory=ConsulConfig)
    crl_file: str | None = None
    """The CRL that the daemons started from now on go by."""
    environment: Callable[[str], Mapping[str, str]] = lambda name: {}
    """What a daemon of this name, started from now on, has in its environment."""
    _acl: bool = False
    _next_port: int = 20_000

    def __post_init__(self) -> None:
        self.authority = Authority.create(self.directory / "ca", "lab")
        self._ca_file = self.directory / "ca.pem"
        self._ca_file.write_bytes(self.authority.ca_pem)

    def host(self, name: str) -> Host:
        """Return the host of this name, made on first use."""
        return self.network.hosts.get(name) or self.network.host(name)

    def port(self) -> int:
        """Return a port nobody in this lab has: its namespaces are its own, this machine's ports are not."""
        if isinstance(self.network, LocalNetwork):
            return free_ports(1)[0]
        self._next_port += 1
        return self._next_port

    def spawn(
        self, name: str, host: Host, *argv: str, environment: Mapping[str, str] | None = None
    ) -> Running:
        """Start any program on a host; it is ended with the lab."""
        running = Running(name, host, argv, self.directory / f"{name}.log", environment or {})
        self.running.append(running)
        return running.start()

    def python(self, name: str, host: Host, *argv: str) -> Running:
        """Start a Python program of ours on a host."""
        return self.spawn(name, host, sys.executable, *argv)

    # -- Consul --------------------------------------------------------------------------------------

    def start_consul(
        self,
        kind: str,
        host: str = "core",
        *,
        acl: bool = True,
        tls: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> Running:
        """Start a Consul (a kind of tests.support.consul) that keeps its data over a restart; waits for its leader.

        A real one denies by default, and each daemon gets a token with its policy of docs/policies. With `tls`, what
        daemons are told to use is https with a client certificate. `more` are settings of the test's own.
        """
        at = self.host(host)
        self._acl = acl and kind != "embedded"
        self.use_consul(f"http://{at.address}:{CONSUL_PORT}", host)
        data = self.directory / "consul"
        if kind == "embedded":
            where = ("--listen", f"0.0.0.0:{CONSUL_PORT}", "--data", str(data))
            running = self.python("consul", at, "-m", "ztna.consul.embedded", *where)
        else:
            binary = require_binary(kind)
            pki = ConsulPki(self.directory, at.address) if tls else None
            argv = server_argv(
                binary,
                kind,
                data,
                bind=at.address,
                http=CONSUL_PORT,
                acl=self._acl,
                tls=ServerTls(CONSUL_TLS_PORT, pki.ca, *pki.issue("consul-server")) if pki else None,
                more=more,
            )
            running = self.spawn("consul", at, *argv)
            if pki is not None:
                certificate, key = pki.issue("consul-client")
                address = f"https://{at.address}:{CONSUL_TLS_PORT}"
                self.consul = ConsulConfig(address=address, ca=pki.ca, certificate=certificate, key=key)
        until("Consul has a leader", lambda: self.consul_get("/v1/status/leader"), READY_SECONDS)
        return running

    def use_consul(self, address: str, host: str = "core") -> None:
        """Have daemons and tests go by the Consul at this address, reached from a host."""
        self._consul_address, self._consul_host = address, self.host(host)
        self.consul = ConsulConfig(address=address)

    def consul_get(self, path: str) -> Any:
        """Return what Consul's HTTP API answers; OSError when it does not with 200."""
        token = f"{'&' if '?' in path else '?'}token={MANAGEMENT_TOKEN}" if self._acl else ""
        code, text = http_get(self._consul_host, self._consul_address + path + token)
        if code != 200:
            raise OSError(f"Consul {path}: {code} {text[:200]}")
        return json.loads(text)

    def consul_put(self, path: str, body: object = None) -> Any:
        """PUT to Consul's HTTP API and return what it answers; OSError when it does not with 200."""
        data = json.dumps(body) if body is not None else ""
        header = f"X-Consul-Token: {MANAGEMENT_TOKEN if self._acl else ''}"
        argv = ("curl", "-sS", "--fail", "-X", "PUT", "-H", header, "-d", data, self._consul_address + path)
        done = self._consul_host.try_run(*argv)
        if done.returncode != 0:
            raise OSError(f"Consul PUT {path}: {done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def consul_for(self, daemon: str, services: Iterable[str] = ()) -> ConsulConfig:
        """Return how a daemon reaches Consul: where ACLs are on with a token of exactly its policy.

        The file's services are samples: as it says, one like them stands for each service of the routes.
        """
        if not self._acl:
            return self.consul
        return msgspec.structs.replace(self.consul, token=self.token_for(self.rules(daemon, services)))

    @staticmethod
    def rules(daemon: str, services: Iterable[str] = ()) -> str:
        """Return a daemon's policy of docs/policies, the samples of its services replaced by these."""
        rules = (POLICIES / f"{daemon}.hcl").read_text()
        if services:
            rules = _SERVICE_RULE.sub("", rules)
            rules += "".join(f'service "{service}" {{\n  policy = "write"\n}}\n' for service in services)
        return rules

    def token_for(self, rules: str) -> str:
        """Return a new token with exactly these rules."""
        name = f"policy-{secrets.token_hex(4)}"
        until("policy", lambda: self.consul_put("/v1/acl/policy", {"Name": name, "Rules": rules}))
        made = until("token", lambda: self.consul_put("/v1/acl/token", {"Policies": [{"Name": name}]}))
        return str(made["SecretID"])

    def check_states(self, service: str) -> list[str]:
        """Return the states of a service's checks in Consul."""
        return [check["Status"] for check in self.consul_get(f"/v1/health/checks/{service}")]

    def kv(self, prefix: str) -> dict[str, Any]:
        """Return the JSON values of all keys under a prefix."""
        try:
            pairs = self.consul_get(f"/v1/kv/{prefix}?recurse")
        except OSError:
            return {}
        return {
            pair["Key"]: json.loads(base64.b64decode(pair["Value"]))
            for pair in pairs
            if pair["Value"] is not None
        }

    def operator_config(self) -> Path:
        """Return a file with which `ztna leases` reaches Consul."""
        file = self.directory / "operator.yaml"
        file.write_text(configuration.dump(Config(consul=self.consul_for("operator")), secrets=True))
        return file

    @contextlib.contextmanager
    def registered(self, name: str) -> Iterator[str]:
        """A service that somebody else registered in Consul, as long as inside."""
        definition = {
            "Name": name,
            "ID": f"{name}@elsewhere",
            "Tags": ["ztna"],
            "Address": "192.0.2.7",
            "Port": 4435,
            "Meta": {"ztna-connector": "elsewhere", "ztna-ports": "tcp:8080"},
        }
        self.consul_put("/v1/agent/service/register", definition)
        try:
            yield name
        finally:
            self.consul_put(f"/v1/agent/service/deregister/{name}@elsewhere")

    # -- daemons -------------------------------------------------------------------------------------

    def certificate(
        self,
        name: str,
        *,
        agent: Iterable[str] = (),
        connector: Iterable[str] = (),
        relay: str | None = None,
        connector_id: str | None = None,
    ) -> TlsConfig:
        """Issue a certificate and return where it and its key lie."""
        chain, key = self.authority.issue(
            name,
            agent=tuple(agent),
            connector=tuple(connector),
            relay=relay,
            connector_id=connector_id,
            days=2,
        )
        certificate_file, key_file = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        certificate_file.write_bytes(chain)
        write_private(key_file, key)
        return TlsConfig(
            certificate=str(certificate_file),
            key=str(key_file),
            ca=str(self._ca_file),
            crl_file=self.crl_file,
        )

    def revoke(self, *names: str) -> None:
        """Write the CRL anew, with the certificates of these names and all before them."""
        file = self.directory / "crl.pem"
        leaves = [
            x509.load_pem_x509_certificates((self.directory / f"{each}.pem").read_bytes())[0]
            for each in names
        ]
        replace_file(file, self.authority.crl(file.read_bytes() if file.exists() else None, leaves))
        self.crl_file = str(file)

    def daemon(self, name: str, host: Host, script: Sequence[str], config: Config, admin: Endpoint) -> Daemon:
        """Write a configuration and start a daemon with it; waits for nothing."""
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(_as_written(config), sort_keys=False))
        file.chmod(0o600)
        argv = [console_script(script[0]), *script[1:], "--config", str(file)]
        log = self.directory / f"{name}.log"
        daemon = Daemon(
            name, host, argv, log, self.environment(name), admin_port=admin.port, config_file=file
        )
        self.running.append(daemon)
        daemon.start()
        return daemon

    def dnsd(
        self, name: str = "dnsd", host: str = "core", *, consul: ConsulConfig | None = None, **keys: Any
    ) -> Daemon:
        """Start a dnsd on 127.0.0.1:5533 of its host (`listen` overrides)."""
        admin = Endpoint("127.0.0.1", self.port())
        section = DnsdConfig(admin=admin, **({"pool": PoolConfig(cidr=self.pool)} | keys))
        config = Config(consul=consul or self.consul_for("dnsd"), dnsd=section)
        return self.daemon(name, self.host(host), ["ztna-dnsd"], config, admin)

    def relay(self, name: str = "relay", host: str = "core", **keys: Any) -> Daemon:
        """Start a relay on its host's address, ports 4433 and 4434 (`listen`, `forwarder` override)."""
        at = self.host(host)
        admin = Endpoint("127.0.0.1", self.port())
        defaults = {
            "listen": Endpoint(at.address, 4433),
            "forwarder": Endpoint(at.address, 4434),
            "drain_s": 1.0,
        }
        section = RelayConfig(
            name=name, tls=self.certificate(name, relay=name), admin=admin, **(defaults | keys)
        )
        return self.daemon(name, at, ["ztna-relay"], Config(relay=section), admin)

    def target(self, name: str = "relay", host: str = "core", port: int = 4433) -> RelayTarget:
        """Return how others reach a relay of this lab."""
        return RelayTarget(address=Endpoint(self.host(host).address, port), name=name)

    def connector(
        self,
        name: str,
        routes: Iterable[RouteConfig],
        host: str = "core",
        *,
        grants: Iterable[str] | None = None,
        consul: ConsulConfig | None = None,
        **keys: Any,
    ) -> Daemon:
        """Start a connector, link port 4435 of its host's address unless `link` says otherwise.

        Its certificate is for its routes' services, or those of `grants`; its token for both.
        """
        at = self.host(host)
        routes = tuple(routes)
        admin = Endpoint("127.0.0.1", self.port())
        link = keys.pop("link", Endpoint(at.address, 4435))
        served = sorted({str(route.service) for route in routes})
        services = served if grants is None else grants
        defaults = {"relays": (self.target(),), "link": link, "link_advertise": Address(link.host, link.port)}
        section = ConnectorConfig(
            id=ConnectorId(name),
            tls=self.certificate(name, connector=services, connector_id=ConnectorId(name).name),
            routes=routes,
            admin=admin,
            **({"drain_s": 1.0} | defaults | keys),
        )
        known = sorted({*served, *services} - {"*"})
        config = Config(consul=consul or self.consul_for("connector", known), connector=section)
        return self.daemon(name, at, ["ztna-sidecar", "connector"], config, admin)

    def agent(
        self,
        name: str,
        services: Iterable[str],
        host: str = "core",
        *,
        consul: ConsulConfig | None = None,
        **keys: Any,
    ) -> Daemon:
        """Start an agent that is granted these services."""
        admin = Endpoint("127.0.0.1", self.port())
        defaults = {"relays": (self.target(),), "pool": self.pool, "drain_s": 1.0}
        section = AgentConfig(tls=self.certificate(name, agent=services), admin=admin, **(defaults | keys))
        config = Config(consul=consul or self.consul_for("agent"), agent=section)
        return self.daemon(name, self.host(host), ["ztna-sidecar", "agent"], config, admin)

    def dig(self, host: str, *question: str, port: int = 5533, server: str = "127.0.0.1") -> list[str]:
        """Return the lines of `dig +short` from a host."""
        argv = ["dig", f"@{server}", "-p", str(port), "+short", "+time=2", "+tries=1", *question]
        done = self.host(host).try_run(*argv)
        return [line for line in done.stdout.splitlines() if line and not line.startswith(";")]

    def address(self, service: str, host: str = "core", seconds: float = 20.0, **at: Any) -> str:
        """Return a service's virtual address by dig, waiting until it has one."""
        lines = until(
            f"{service} has an address", lambda: self.dig(host, f"{service}.ztna.local", **at), seconds
        )
        return str(lines[0])

    @property
    def daemons(self) -> list[Daemon]:
        """Return those of ours that were started, in their order."""
        return [running for running in self.running if isinstance(running, Daemon)]

    def tails(self) -> list[tuple[str, str]]:
        """Return a title and the last lines for each process."""
        return [(f"{each.name} ({'alive' if each.alive else 'ended'})", each.tail()) for each in self.running]

    def check_nothing_unexpected(self) -> None:
        """AssertionError when one of ours met an error that nobody foresaw, by its metric or by its log.

        The log tells for those that ended meanwhile. `lab` asks this at the end of every test.
        """
        found: list[str] = []
        for daemon in self.daemons:
            if daemon.alive:
                # In a list, as it is to be 0; and one that has only just started does not answer yet.
                (count,) = until(f"{daemon.name} tells", lambda d=daemon: [d.metric(UNEXPECTED)])
                found += [f"{daemon.name}: {UNEXPECTED} is {count:g}"] if count else []
        for daemon in self.daemons:
            found += [f"{daemon.name}: {record}" for record in daemon.events("unexpected")]
            found += [f"{daemon.name}: a traceback"] if "\nTraceback (most" in daemon.output() else []
        assert not found, "\n".join(found)

    def close(self) -> list[str]:
        """End every process by its pid, ours first, so that Consul still hears them leave.

        Returns what was wrong with how ours ended: a status other than 0, or none in STOP_SECONDS.
        """
        ending = [daemon for daemon in reversed(self.daemons) if daemon.alive]
        _end(ending)
        _end([running for running in reversed(self.running) if running.alive])
        return [
            f"{daemon.name} ended with status {daemon.process.returncode} at SIGTERM:\n{daemon.tail()}"
            for daemon in ending
            if daemon.process is not None and daemon.process.returncode != 0
        ]


def _end(ending: Sequence[Running]) -> None:
    """Send SIGTERM to all at once; who is still there after STOP_SECONDS gets -9."""
    for running in ending:
        with contextlib.suppress(ProcessLookupError):
            running.signal(signal.SIGCONT)
            running.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for running in ending:
        assert running.process is not None
        try:
            running.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()


def tcp_route(service: str, backend: Endpoint, port: int = 8080, **check: Any) -> RouteConfig:
    """Return a TCP route with a quick TCP check."""
    checked = CheckConfig(**({"interval_s": 0.5, "timeout_s": 0.5, "failures_before_critical": 1} | check))
    return RouteConfig(service=ServiceName(service), backend=backend, port=port, checks=(checked,))


def udp_route(service: str, backend: Endpoint, port: int = 7) -> RouteConfig:
    """Return a UDP route without a check."""
    unchecked = CheckConfig(kind="none")
    return RouteConfig(
        service=ServiceName(service), backend=backend, port=port, protocol="udp", checks=(unchecked,)
    )


def open_tails() -> list[tuple[str, str]]:
    """Return a title and the last lines for each process of each lab that is open now."""
    return [tail for each in _open for tail in each.tails()]


@contextlib.contextmanager
def lab(*hosts: str, pool: str = "127.100.0.0/16", subnet: str = "10.91.0") -> Iterator[Lab]:
    """A lab with these hosts, where nothing unexpected may happen; on a failure the tails of all logs are printed."""
    directory = Path(tempfile.mkdtemp(prefix="ztna-lab-"))
    net = Network(subnet)
    made: Lab | None = None
    try:
        net.open()
        for name in hosts or ("core",):
            net.host(name)
        made = Lab(net, directory, IPv4Network(pool))
        _open.append(made)
        yield made
        made.check_nothing_unexpected()
        wrong = made.close()
        assert not wrong, "\n".join(wrong)
        made.check_nothing_unexpected()
    except BaseException:
        if made is not None:
            print("\n".join(f"---- {title}\n{tail}" for title, tail in made.tails()))
        raise
    finally:
        if made is not None:
            _open.remove(made)
            made.close()
        net.close()
        shutil.rmtree(directory, ignore_errors=True)
