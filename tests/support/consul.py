"""Consuls to test against: the embedded one, and the oldest and newest real ones that are supported.

Real ones are looked for as `find_binary` says; `make peers` gets them. Everything that is started here gets ports
and a data folder of its own and is ended by its process id.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from ztna.config import ConsulConfig

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("embedded", "oldest", "newest")
REAL_KINDS = ("oldest", "newest")
OLDEST, NEWEST, NOMAD, COREDNS = "1.8.7", "1.19.2", "1.10.5", "1.14.3"
START_SECONDS = 30.0
MANAGEMENT_TOKEN = "00000000-0000-0000-0000-00000000a11c"
POLICIES = ROOT / "docs" / "policies"
VERSIONS_TESTED = "consul"
"""The user property that carries a version to the last lines of the run."""


def peers_folder() -> Path:
    """Return where `make peers` puts what it gets."""
    default = Path.home() / ".cache" / "ztna-mesh" / "peers"
    return Path(os.environ.get("ZTNA_PEERS_DIR", default))


def find_binary(kind: str) -> Path | None:
    """Return the program of a kind, None when it is not here.

    `newest`: CONSUL_BIN, a `consul` on PATH, the cached build. `oldest`: the cached Debian package.
    `nomad`, `coredns`: the cached build, else one on PATH.
    """
    folder = peers_folder()
    if kind == "newest":
        places = [os.environ.get("CONSUL_BIN"), shutil.which("consul"), folder / f"consul-{NEWEST}"]
    elif kind == "oldest":
        places = [folder / f"consul-{OLDEST}"]
    else:
        version = {"nomad": NOMAD, "coredns": COREDNS}[kind]
        places = [folder / f"{kind}-{version}", shutil.which(kind)]
    found = [Path(place) for place in places if place]
    return next((place for place in found if os.access(place, os.X_OK)), None)


def require_binary(kind: str) -> Path:
    """Return the program of a kind; without it the test is skipped, and fails under CI."""
    found = find_binary(kind)
    if found is None:
        what = f"the {kind} Consul" if kind in REAL_KINDS else kind
        missing = f"{what} is not here: `make peers` gets it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return found


@functools.cache
def binary_version(binary: Path) -> str:
    """Return what `consul version` says, e.g. `1.19.2`."""
    said = subprocess.run([binary, "version"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(r"v(\d+\.\d+\.\d+)", said)
    assert found is not None, said
    return found[1]


@dataclass(frozen=True)
class ServerTls:
    """Files of a server's certificate and of whom it believes, and the port where it takes https."""

    port: int
    ca: str
    certificate: str
    key: str


def server_argv(
    binary: Path,
    kind: str,
    data: Path,
    *,
    bind: str,
    http: int,
    serf: int | None = None,
    server: int | None = None,
    acl: bool = False,
    joins: Sequence[str] = (),
    node: str | None = None,
    tls: ServerTls | None = None,
    more: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the command of a server that keeps its data and elects itself within two seconds.

    With `joins`, the Serf addresses of others, it waits for all of them before the first election. With `tls` it
    takes https too, from clients with a certificate only. `more` are settings of the test's own.
    """
    version = tuple(int(part) for part in binary_version(binary).split("."))
    ports = {"http": http, "dns": -1, "grpc": -1, "serf_lan": serf or http + 1, "serf_wan": -1}
    ports["server"] = server or http + 2
    if version >= (1, 14):
        ports["grpc_tls"] = -1
    settings: dict[str, Any] = {
        "server": True,
        "bootstrap_expect": 1 + len(joins),
        "retry_join": list(joins),
        "retry_interval": "500ms",
        "data_dir": str(data),
        "bind_addr": bind,
        "client_addr": bind,
        "disable_update_check": True,
        "leave_on_terminate": False,
        "performance": {"raft_multiplier": 1},
        "connect": {"enabled": False},
        "limits": {"http_max_conns_per_client": 5000},
        "log_level": "warn",
        "ports": ports,
    }
    if node is not None:
        settings["node_name"] = node
    if acl:
        initial = "initial_management" if version >= (1, 11) else "master"
        tokens = {initial: MANAGEMENT_TOKEN, "agent": MANAGEMENT_TOKEN}
        settings["acl"] = {"enabled": True, "default_policy": "deny", "tokens": tokens}
    if tls is not None:
        ports["https"] = tls.port
        files = {"ca_file": tls.ca, "cert_file": tls.certificate, "key_file": tls.key}
        verifying = files | {"verify_incoming": True, "verify_outgoing": True}
        settings |= {"tls": {"defaults": verifying}} if version >= (1, 12) else verifying
    settings |= more or {}
    return [str(binary), "agent", f"-hcl={_hcl(settings)}"]


def agent_argv(
    binary: Path, data: Path, *, bind: str, http: int, server_serf: str, node: str, acl: bool = False
) -> list[str]:
    """Return the command of a Consul agent that joins a server at its Serf address, and is on loopback too."""
    argv = server_argv(binary, "", data, bind=bind, http=http, joins=[server_serf], node=node, acl=acl)
    return [*argv, f'-hcl=server = false\nbootstrap_expect = 0\nclient_addr = "127.0.0.1 {bind}"']


def _hcl(settings: dict[str, Any]) -> str:
    """Write settings for the -hcl flag: nested ones as blocks, as HCL 1 takes no JSON objects."""
    return "\n".join(
        f"{key} {{\n{_hcl(value)}\n}}" if isinstance(value, dict) else f"{key} = {json.dumps(value)}"
        for key, value in settings.items()
    )


class ConsulUnderTest:
    """A Consul that can be stopped, paused and started again on the same port with the same data."""

    def __init__(self, kind: str, folder: Path, *, acl: bool = False) -> None:
        self.kind = kind
        self._folder = folder
        self._binary = None if kind == "embedded" else require_binary(kind)
        self.version = "embedded" if self._binary is None else binary_version(self._binary)
        self._acl = acl
        self._http, self._serf, self._server = free_ports(3)
        self.address = f"http://127.0.0.1:{self._http}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def config(self, token: str | None = None, **changes: Any) -> ConsulConfig:
        """Return how a client reaches it; the management token where ACLs are on and none is given."""
        if self._acl and token is None:
            token = MANAGEMENT_TOKEN
        return ConsulConfig(address=self.address, token=token, **changes)

    def start(self) -> None:
        """Start it and wait until it has a leader and its own node in the catalog."""
        folder = self._folder / "data"
        if self._binary is None:
            listen = f"127.0.0.1:{self._http}"
            argv = [sys.executable, "-m", "ztna.consul.embedded", "--listen", listen, "--data", str(folder)]
        else:
            argv = server_argv(
                self._binary,
                self.kind,
                folder,
                bind="127.0.0.1",
                http=self._http,
                serf=self._serf,
                server=self._server,
                acl=self._acl,
            )
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT)
        end = time.monotonic() + START_SECONDS
        while not self._ready():
            said = (self._folder / "log").read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, f"Consul {self.version} ended: {said}"
            assert time.monotonic() < end, f"Consul {self.version} is not ready: {said}"
            time.sleep(0.05)  # a process of its own clock

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            # An old server speaks "in legacy mode" until its leader has gone over to the new ACLs.
            if self._acl and self.request("GET", "/v1/acl/policies")[0] != HTTPStatus.OK:
                return False
            return bool(self.request("GET", "/v1/health/state/passing")[1])
        return False

    def stop(self) -> None:
        """End it; blocking queries that are under way break."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        # A real Consul keeps everything at SIGKILL too, and leaves nothing at SIGTERM.
        self._process.send_signal(signal.SIGTERM if self._binary is None else signal.SIGKILL)
        self._process.wait(timeout=15)
        self._process = None

    def pause(self) -> None:
        """Stop its clock: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # Its threads stop one by one, and the last may still answer: wait for the whole process (waitid(2)).
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def request(
        self, method: str, path: str, body: object = None, *, token: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Speak raw HTTP; returns status, decoded JSON (else text) and headers with lower-case names.

        A `body` of bytes or text is sent as it is, anything else as JSON.
        """
        data = body if isinstance(body, bytes | None) else _encoded(body)
        asked = urllib.request.Request(self.address + path, data=data, method=method)
        if token or self._acl:
            asked.add_header("X-Consul-Token", token or MANAGEMENT_TOKEN)
        try:
            with urllib.request.urlopen(asked, timeout=20) as response:
                status, raw, headers = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, raw, headers = error.code, error.read(), error.headers
        text = raw.decode(errors="replace")
        if "json" in headers.get("Content-Type", ""):
            text = json.loads(text)
        return status, text, {name.lower(): value for name, value in headers.items()}

    def token_for(self, policy: Path | str) -> str:
        """Return a new token with exactly the rules of a policy file (a path, or a name in docs/policies)."""
        file = policy if isinstance(policy, Path) else POLICIES / policy
        name = f"{file.stem}-{uuid.uuid4().hex[:8]}"
        self.write_acl("policy", {"Name": name, "Rules": file.read_text()})
        return str(self.write_acl("token", {"Policies": [{"Name": name}]})["SecretID"])

    def tokens(self) -> dict[str, str]:
        """Return the secret of every ACL token, by accessor; those of logins too."""
        accessors = [each["AccessorID"] for each in self.request("GET", "/v1/acl/tokens")[1]]
        found = {each: self.request("GET", f"/v1/acl/token/{each}")[1] for each in accessors}
        return {each: token["SecretID"] for each, token in found.items() if isinstance(token, dict)}

    def revoke(self, secret: str) -> None:
        """Delete the ACL token with this secret."""
        (accessor,) = [each for each, known in self.tokens().items() if known == secret]
        assert self.request("DELETE", f"/v1/acl/token/{accessor}")[0] == HTTPStatus.OK

    def write_acl(self, kind: str, body: object) -> Any:
        """Create an ACL object (`policy`, `token`, `role`, ...) and return what Consul says of it."""
        return self._taken(f"/v1/acl/{kind}", body)

    def _taken(self, path: str, body: object) -> Any:
        """Write an ACL object until it is taken: a server just started under load refuses them for a moment."""
        end = time.monotonic() + START_SECONDS
        while True:
            status, answer, _ = self.request("PUT", path, body)
            if status == HTTPStatus.OK:
                return answer
            assert time.monotonic() < end, (path, status, answer)
            time.sleep(0.1)  # a process of its own clock


def _encoded(body: object) -> bytes:
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def free_ports(count: int) -> list[int]:
    """Return ports that are free for TCP and UDP on loopback and not in the range the kernel gives out.

    Held until all are known, so they differ; below the ephemeral range, so no client takes one meanwhile.
    """
    held: list[socket.socket] = []
    ports: list[int] = []
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while len(ports) < count:
        port = 10_000 + uuid.uuid4().int % max(low - 10_000, 5_000)
        pair = [socket.socket(type=kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
        held += pair
        with contextlib.suppress(OSError):
            for each in pair:
                each.bind(("127.0.0.1", port))
            ports.append(port)
    for each in held:
        each.close()
    return ports


@pytest.fixture(scope="session")
def _shared_consuls(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[str, bool], ConsulUnderTest]]:
    """One server of a kind for all tests of this process, started when first asked for."""
    servers: dict[tuple[str, bool], ConsulUnderTest] = {}
    yield servers
    for server in servers.values():
        server.stop()


def shared_of_kind(request: pytest.FixtureRequest, kind: str, *, acl: bool = False) -> ConsulUnderTest:
    """Return this process's shared server of a kind, and count the test as run on it."""
    servers = request.getfixturevalue("_shared_consuls")
    if (kind, acl) not in servers:
        folder = request.getfixturevalue("tmp_path_factory").mktemp(f"consul-{kind}")
        servers[kind, acl] = ConsulUnderTest(kind, folder, acl=acl)
    server: ConsulUnderTest = servers[kind, acl]
    request.node.user_properties.append((VERSIONS_TESTED, server.version))
    return server


_PARAMS = ["embedded", *(pytest.param(kind, marks=pytest.mark.real_consul) for kind in REAL_KINDS)]


@pytest.fixture(params=_PARAMS)
def consul(request: pytest.FixtureRequest) -> ConsulUnderTest:
    """A shared Consul of each kind in turn: use names of your own (`unique`), and never stop it."""
    return shared_of_kind(request, request.param)


@pytest.fixture(params=_PARAMS[1:])
def acl_consul(request: pytest.FixtureRequest) -> ConsulUnderTest:
    """A shared real Consul of each kind in turn that denies what no policy allows."""
    return shared_of_kind(request, request.param, acl=True)


@pytest.fixture(params=_PARAMS)
def own_consul(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConsulUnderTest]:
    """A Consul of each kind in turn for this test alone, which may stop, pause and start it."""
    server = ConsulUnderTest(request.param, tmp_path)
    request.node.user_properties.append((VERSIONS_TESTED, server.version))
    yield server
    server.stop()


@pytest.fixture
def unique() -> str:
    """A label that nothing else uses: a prefix for keys, names and ids on a shared Consul."""
    return f"t{uuid.uuid4().hex[:10]}"


def note_version(request: pytest.FixtureRequest, kind: str) -> None:
    """Count a test as run on a kind of Consul that it started by itself."""
    binary = None if kind == "embedded" else find_binary(kind)
    version = "embedded" if binary is None else binary_version(binary)
    request.node.user_properties.append((VERSIONS_TESTED, version))
