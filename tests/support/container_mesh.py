"""A whole mesh in containers: three Consul servers, dnsd, two relays, two connectors with backends, two agents.

Agents reach nothing but the relays, relays and connectors nothing of the agents' network, and each backend only its
connector: what flows between them flows through the mesh.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.network import Network

from tests.support import docker
from tests.support.container_client import HTTP_PORT, TCP_PORT, UDP_PORT
from tests.support.lab import until
from ztna.ca import Authority

SERVICE, ZONE = "web-app", "ztna.local"
POOL = "10.100.0.0/16"
DNS_PORT, CONSUL_PORT = 5533, 8500
PLACE, USER = "/etc/ztna", 65532
READY_SECONDS = 90.0
EXEC_SECONDS = 120.0
ROOT = Path(__file__).resolve().parents[2]
CLIENT, BACKENDS = ROOT / "tests/support/container_client.py", ROOT / "tests/support/backends.py"
CONSULS = ("consul-1", "consul-2", "consul-3")
RELAYS = ("relay-1", "relay-2")
SIDES = ("1", "2")
HARDENED: dict[str, Any] = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
TUNNELLING: dict[str, Any] = {
    "user": "0:0",
    "cap_add": ["NET_ADMIN", "NET_RAW"],
    "devices": ["/dev/net/tun"],
}
"""What an agent needs for a pool that is not on loopback: docker gives capabilities to root alone."""
CONSUL_SETTINGS = {
    "server": True,
    "bootstrap_expect": len(CONSULS),
    "retry_join": list(CONSULS),
    "retry_interval": "500ms",
    "data_dir": "/tmp/consul",
    "client_addr": "0.0.0.0",
    "performance": {"raft_multiplier": 1},
}


@dataclass
class ContainerMesh:
    """The containers, by name, and the networks they are on."""

    host: str | None
    image: str
    base: str
    consul: Path
    folder: Path
    containers: dict[str, DockerContainer] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @contextlib.contextmanager
    def running(self) -> Iterator[ContainerMesh]:
        """Start everything, and remove it in the end."""
        with self._open:
            for name in ("core", "left", "right", *(f"backend-{side}" for side in SIDES)):
                self.networks[name] = self._open.enter_context(Network())
            self._volumes()
            self._start_consuls()
            self._start_backends()
            self._start_daemons()
            yield self

    # -- asking ----------------------------------------------------------------------------------------

    def docker(self, *argv: str) -> str:
        """Run the docker client."""
        return docker.docker(self.host, *argv)

    def id(self, name: str) -> str:
        """Return the id of a container."""
        return self.containers[name].get_container_id()

    def exec(self, name: str, *argv: str) -> str:
        """Run a command in a container to its end and return what it printed; AssertionError when it failed."""
        return self.docker("exec", self.id(name), *argv)

    def health(self, name: str) -> str:
        """Return what the engine has found a container's health to be."""
        return self.docker("inspect", "--format", "{{.State.Health.Status}}", self.id(name)).strip()

    def status(self, name: str, port: int) -> Any:
        """Return a daemon's state, from its admin port."""
        script = (
            f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/status').read().decode())"
        )
        return json.loads(self.exec(name, "python3", "-c", script))

    def published(self, name: str, port: str) -> str:
        """Return `host:port` where this machine reaches a published port of a container."""
        return self.docker("port", self.id(name), port).splitlines()[0].replace("0.0.0.0", "127.0.0.1")

    def dig(self, *question: str) -> list[str]:
        """Ask dnsd by `dig`, in a container that is none of the mesh's."""
        argv = ["dig", "@dnsd", "-p", str(DNS_PORT), "+short", "+time=2", "+tries=1", *question]
        with contextlib.suppress(AssertionError):
            lines = self.exec("stranger", *argv).splitlines()
            return [line for line in lines if line and not line.startswith(";")]
        return []

    def once(self, agent: str, address: str) -> Any:
        """Download and send datagrams beside an agent, and return what came."""
        return json.loads(self.exec(agent, "python3", "/client.py", "once", address))

    @contextlib.contextmanager
    def steady(self, agent: str, address: str) -> Iterator[dict[str, Any]]:
        """Talk beside an agent for as long as the context lasts; the results are in the dictionary after it."""
        argv = [
            "docker",
            *(["--host", self.host] if self.host else []),
            "exec",
            "--interactive",
            self.id(agent),
        ]
        argv += ["python3", "/client.py", "steady", address]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as talking:
            assert talking.stdout is not None
            assert talking.stdout.readline() == "talking\n"
            results: dict[str, Any] = {}
            try:
                yield results
            finally:
                told, errors = talking.communicate("", timeout=EXEC_SECONDS)
            assert talking.returncode == 0, errors
            results |= json.loads(told)

    # -- starting --------------------------------------------------------------------------------------

    def _container(self, name: str, image: str, network: str, **more: Any) -> DockerContainer:
        container = (
            DockerContainer(image, **(HARDENED | more)).with_tmpfs_mount("/run").with_tmpfs_mount("/tmp")
        )
        return container.with_network(self.networks[network]).with_network_aliases(name)

    def _start(self, name: str, container: DockerContainer, *networks: str) -> None:
        self.containers[name] = self._open.enter_context(container)
        for network in networks:
            self.networks[network].connect(self.id(name), [name])

    def _start_consuls(self) -> None:
        command = ["/consul", "agent", "-hcl", json.dumps(CONSUL_SETTINGS)]
        for name in CONSULS:
            container = self._container(name, self.base, "core").with_command([*command, f"-node={name}"])
            container.with_network_aliases(name, "consul").with_volume_mapping(self.consul, "/consul")
            self._start(name, container.with_exposed_ports(CONSUL_PORT))

    def _start_backends(self) -> None:
        ports = ("--http", str(HTTP_PORT), "--tcp", str(TCP_PORT), "--udp", str(UDP_PORT))
        for side in SIDES:
            name = f"backend-{side}"
            words = ["python3", "/backends.py", "--address", "0.0.0.0", "--label", name, *ports]
            container = self._container(name, self.base, name).with_command(words)
            self._start(name, container.with_volume_mapping(BACKENDS, "/backends.py"))
        self._start("stranger", self._container("stranger", self.base, "core").with_command("sleep 3600"))

    def _start_daemons(self) -> None:
        dnsd = self._daemon("dnsd", "ztna-dnsd", "core").with_volume_mapping(
            self._sockets, "/var/lib/ztna", "rw"
        )
        self._start("dnsd", dnsd.with_exposed_ports(DNS_PORT, f"{DNS_PORT}/udp"))
        for name in RELAYS:
            relay = self._daemon(name, "ztna-relay", "left")
            self._start(name, relay.with_volume_mapping(self._sockets, "/var/lib/ztna", "rw"), "right")
        for side in SIDES:
            name = f"connector-{side}"
            self._start(
                name, self._daemon(name, "ztna-sidecar connector", "right"), "core", f"backend-{side}"
            )
        for side in SIDES:
            name = f"agent-{side}"
            agent = self._daemon(name, "ztna-sidecar agent", "left", **TUNNELLING)
            self._start(name, agent.with_volume_mapping(CLIENT, "/client.py"))

    def _daemon(self, name: str, program: str, network: str, **more: Any) -> DockerContainer:
        container = self._container(name, self.image, network, **more)
        container.with_command(f"{program} --config {PLACE}/{name}.yaml")
        return container.with_volume_mapping(self._files, PLACE)

    def wait_until_healthy(self) -> None:
        """Wait until the engine finds every daemon healthy."""
        names = ["dnsd", *RELAYS, *(f"{role}-{side}" for role in ("connector", "agent") for side in SIDES)]
        for name in names:

            def healthy(name: str = name) -> bool:
                state = self.docker("inspect", "--format", "{{.State.Status}}", self.id(name)).strip()
                assert state == "running", f"{name}: {self.docker('logs', self.id(name))}"
                return self.health(name) == "healthy"

            until(f"{name} healthy", healthy, READY_SECONDS)

    # -- files -----------------------------------------------------------------------------------------

    def _volumes(self) -> None:
        """Bring certificates and configurations into a volume, as their keys must be the image's user's own."""
        client = DockerClient().client
        self._open.callback(client.close)
        names = []
        for _ in range(2):
            volume = client.volumes.create()
            self._open.callback(volume.remove, force=True)
            names.append(str(volume.name))
        self._files, self._sockets = names
        bringer = client.containers.create(self.image, volumes={self._files: {"bind": PLACE, "mode": "rw"}})
        try:
            bringer.put_archive(PLACE, self._archive())
        finally:
            bringer.remove(force=True)

    def _archive(self) -> bytes:
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for name, (data, owner) in self._contents().items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.uid, entry.gid = len(data), owner, owner
                entry.mode = 0o600 if name.endswith(".key") else 0o644
                tar.addfile(entry, io.BytesIO(data))
        return whole.getvalue()

    def _contents(self) -> dict[str, tuple[bytes, int]]:
        authority = Authority.create(self.folder / "ca", "containers")
        issued = {name: authority.issue(name, relay=name) for name in RELAYS}
        for side in SIDES:
            connector, agent = f"connector-{side}", f"agent-{side}"
            issued[connector] = authority.issue(connector, connector=[SERVICE], connector_id=connector)
            issued[agent] = authority.issue(agent, agent=[SERVICE])
        files = {"ca.pem": (authority.ca_pem, USER)}
        for name, (chain, key) in issued.items():
            owner = 0 if name.startswith("agent") else USER
            files |= {f"{name}.pem": (chain, USER), f"{name}.key": (key, owner)}
        for name, config in self._configs().items():
            files[f"{name}.yaml"] = (yaml.safe_dump(config).encode(), USER)
        return files

    def _configs(self) -> dict[str, dict[str, Any]]:
        consul = {"address": f"http://consul:{CONSUL_PORT}"}
        socket = "/var/lib/ztna/dns.sock"
        pool = {"cidr": POOL}
        dnsd = {"listen": f"0.0.0.0:{DNS_PORT}", "allow": ["0.0.0.0/0"], "socket": socket, "pool": pool}
        configs: dict[str, dict[str, Any]] = {"dnsd": {"consul": consul, "dnsd": dnsd}}
        relays = [{"address": f"{name}:4433", "name": name} for name in RELAYS]
        for name in RELAYS:
            configs[name] = {"relay": {"name": name, "tls": _tls(name), "resolvers": [f"unix:{socket}"]}}
        for side, mode in zip(SIDES, ("anyip", "tun"), strict=True):
            name = f"connector-{side}"
            routes = [
                _route(side, *each) for each in ((HTTP_PORT, "tcp"), (TCP_PORT, "tcp"), (UDP_PORT, "udp"))
            ]
            connector = {"id": name, "tls": _tls(name), "relays": relays, "routes": routes}
            configs[name] = {"consul": consul, "connector": connector}
            name = f"agent-{side}"
            agent = {"tls": _tls(name), "relays": relays, "names": "relay", "mode": mode, "pool": POOL}
            configs[name] = {"agent": agent | {"admin_socket": "/run/agent.sock"}}
        return configs


def _tls(name: str) -> dict[str, str]:
    return {"certificate": f"{PLACE}/{name}.pem", "key": f"{PLACE}/{name}.key", "ca": f"{PLACE}/ca.pem"}


def _route(side: str, port: int, protocol: str) -> dict[str, Any]:
    check = {"kind": "auto", "interval_s": 1.0}
    backend = f"backend-{side}:{port}"
    return {"service": SERVICE, "backend": backend, "port": port, "protocol": protocol, "checks": [check]}
