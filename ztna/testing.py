"""A ready mesh in containers for the tests of other projects: `with MeshContainers() as mesh:` (docs/testing.md).

Needs a Docker engine and the extra `testing` (`pip install 'ztna-mesh[testing]'`), nothing else: the image is built
once for each version, from the distribution that is installed. Several meshes may run at once; each has a network, a
volume and ports of its own, and all of it is removed at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from ztna import dns
from ztna.container import context, mesh_files
from ztna.container.mesh_files import CONNECTOR, CONSUL_PORT, DNS_PORT, PLACE, RELAY
from ztna.errors import BadName, ProtocolError, ZtnaError
from ztna.names import ServiceName

if TYPE_CHECKING:
    import docker
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.docker_client import DockerClient
    from testcontainers.core.network import Network

READY_SECONDS = 60.0
POLL_SECONDS = 0.1
DNS_SECONDS = 2.0
DNS_BYTES_MAX = 1232
SERVICES_MAX = 8
"""Services that `address` can be asked for; each takes a port of the agent's container, published from its start."""
LOG_LINES = 15
IMAGE = "ztna-mesh-testing"
ZONE = "ztna.local"
BASE_VARIABLE, WHEELS_VARIABLE = "ZTNA_TESTING_BASE", "ZTNA_TESTING_WHEELS"

_FIRST_GATE_PORT = 7001
_NOT_RUNNING = "the mesh is not running: use it within `with MeshContainers() as mesh:`"
_HEALTH = ["python3", "-I", "-S", "/opt/ztna/container/health.py"]
_HARDENED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}


class ExtraMissing(ZtnaError):
    """The extra `testing` is not installed."""


class NoDockerEngine(ZtnaError):
    """No Docker engine answers; the text says where it was looked for."""


class ImageNotBuilt(ZtnaError):
    """The engine could not build the image; the text has the last lines of the build."""


class MeshNotReady(ZtnaError):
    """Something was not ready in time; the text has what it last said."""


class Address(NamedTuple):
    """Where a service can be called from the process that runs the tests."""

    host: str
    port: int


class _Service(NamedTuple):
    port: int
    protocol: Literal["tcp", "udp"]


class MeshContainers:
    """Consul, dnsd, relay, connector and agent, each in a container, and the services that are added in code."""

    def __init__(
        self, *, base: str | None = None, wheel: Path | None = None, wheels: Path | None = None
    ) -> None:
        """Say what the image is made of where that matters; without arguments it works for whoever has an internet.

        `base` is another base image with Python 3.11 (or the variable ZTNA_TESTING_BASE), `wheels` a folder with the
        wheels of the lock, so that no index is asked (or ZTNA_TESTING_WHEELS), `wheel` another ztna-mesh than the
        installed one.
        """
        told = wheels or os.environ.get(WHEELS_VARIABLE)
        self._wheels = Path(told) if told else None
        self._base = base or os.environ.get(BASE_VARIABLE)
        self._wheel = wheel
        self._open = ExitStack()
        self._services: dict[ServiceName, _Service] = {}
        self._addresses: dict[ServiceName, Address] = {}
        self._gates = 0
        self._network: Network | None = None
        self.containers: dict[str, DockerContainer] = {}
        """By name: consul, dnsd, relay, connector, agent; to pause, to kill, to read the logs of."""
        self.image = ""
        """The name of the image that they run, once they do."""

    @property
    def network(self) -> Network:
        """The Docker network of the mesh: what joins it can be the backend of a service. Raises MeshNotReady."""
        if self._network is None:
            raise MeshNotReady(_NOT_RUNNING)
        return self._network

    def __enter__(self) -> Self:
        """Build the image if it is not there, start everything, and wait until it is ready.

        Raises ExtraMissing, NoDockerEngine, ImageNotBuilt or MeshNotReady, and leaves nothing behind.
        """
        try:
            with _engine_errors():
                self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every container, the volume and the network."""
        with _engine_errors():
            self._close()

    def _close(self) -> None:
        self._network = None
        self._gates = 0
        self._services, self._addresses, self.containers = {}, {}, {}
        self._open.close()

    # -- what tests use --------------------------------------------------------------------------------

    def add(
        self, name: str, backend: str, *, port: int | None = None, protocol: Literal["tcp", "udp"] = "tcp"
    ) -> None:
        """Add a service, and wait until it can be reached through the mesh.

        `backend` is `host:port` as the mesh's network knows it, e.g. the alias of a container; `port` the one on the
        service's virtual address, by default the backend's. Raises MeshNotReady, with what the connector says.
        """
        service = ServiceName(name)
        host, _, backend_port = backend.rpartition(":")
        if not host or not backend_port.isdecimal():
            raise BadName(f"backend of {name}: expected host:port, got {backend!r}")
        told = _Service(port or int(backend_port), protocol)
        words = ["--port", str(told.port), "--backend", backend, "--protocol", protocol]
        words += ["--check", "auto,interval_s=0.5", "--api", str(PLACE / "connector.sock")]
        self._exec(CONNECTOR, ["ztna", "services", "add", name, *words])
        self._services[service] = told
        self._addresses.pop(service, None)
        self._until(f"an address for {name}", lambda: self._found(service), (CONNECTOR, "dnsd"))
        ping = ["ztna", "ping", name, "--count", "1", "--agent", str(PLACE / "agent.sock")]
        self._until(f"a way to {name}", lambda: self._done("agent", ping), ("agent", RELAY))

    def resolve(self, name: str) -> IPv4Address:
        """Return the virtual address that dnsd answers for a service. Raises MeshNotReady when there is none."""
        try:
            found = self._found(ServiceName(name))
        except (OSError, ProtocolError) as error:
            raise MeshNotReady(f"dnsd does not answer for {name}.{ZONE}: {error}") from None
        if found is None:
            raise MeshNotReady(f"{name}.{ZONE} has no address: add the service, with a backend that is there")
        return found

    def address(self, name: str) -> Address:
        """Return where this process reaches a service: a port of the agent, from which it goes through the mesh.

        Raises BadName for a service that was not added, and MeshNotReady for more than SERVICES_MAX of them.
        """
        service = ServiceName(name)
        if service not in self._services:
            raise BadName(
                f"{name} was not added to this mesh; there are {', '.join(self._services) or 'none'}"
            )
        if service not in self._addresses:
            self._addresses[service] = self._gate(service)
        return self._addresses[service]

    # -- starting --------------------------------------------------------------------------------------

    def _start(self) -> None:
        network, container = _testcontainers()
        client = _client().client
        self._open.callback(client.close)
        image = self.image = self._built()
        self._network = self._open.enter_context(network())
        volume = self._volume(client, image)
        commands: Mapping[str, tuple[str, list[int | str], dict[str, str]]] = {
            "consul": (
                f"python3 -m ztna.consul.embedded --listen 0.0.0.0:{CONSUL_PORT}",
                [CONSUL_PORT],
                {"READY_AT": f"127.0.0.1:{CONSUL_PORT}/v1/status/leader"},
            ),
            "dnsd": (f"ztna-dnsd --config {PLACE}/dnsd.yaml", [DNS_PORT], {}),
            RELAY: (f"ztna-relay --config {PLACE}/{RELAY}.yaml", [], {}),
            CONNECTOR: (f"ztna-sidecar connector --config {PLACE}/{CONNECTOR}.yaml", [], {}),
            "agent": (f"ztna-sidecar agent --config {PLACE}/agent.yaml", _gate_ports(), {}),
        }
        for name, (command, ports, variables) in commands.items():
            each = container(image).with_command(command).with_envs(**variables).with_kwargs(**_HARDENED)
            each = each.with_network(self._network).with_network_aliases(name).with_exposed_ports(*ports)
            each = each.with_volume_mapping(volume, str(PLACE), "rw").with_tmpfs_mount("/run")
            self.containers[name] = self._open.enter_context(each)
        for name in commands:
            self._until(f"{name} to be ready", partial(self._done, name, _HEALTH), (name,))

    def _built(self) -> str:
        """Return the name of the image, which is built if the engine does not have it."""
        from testcontainers.core.image import DockerImage

        with tempfile.TemporaryDirectory(prefix="ztna-testing-") as scratch:
            folder = Path(scratch) / "context"
            digest = context.write(folder, wheel=self._wheel, wheels=self._wheels)
            key = hashlib.sha256(f"{digest} {self._base}".encode()).hexdigest()[:12]
            name = f"{IMAGE}:{key}"
            arguments = {"BASE": self._base} if self._base else {}
            if self._wheels:
                arguments["PIP_NO_INDEX"] = "1"
            with _alone(key), DockerImage(folder, tag=name, clean_up=False, buildargs=arguments) as built:
                pass
            return str(built)

    def _volume(self, client: docker.DockerClient, image: str) -> str:
        """Make a volume with certificates and configurations, and return its name."""
        from testcontainers.core.labels import create_labels

        labels = create_labels(image, None)
        volume = client.volumes.create(labels=labels)
        self._open.callback(volume.remove, force=True)
        places = {volume.name: {"bind": str(PLACE), "mode": "rw"}}
        bringer = client.containers.create(image, volumes=places, labels=labels)
        try:
            bringer.put_archive(str(PLACE), mesh_files.archive())
        finally:
            bringer.remove(force=True)
        return str(volume.name)

    def _gate(self, service: ServiceName) -> Address:
        told = self._services[service]
        if self._gates >= SERVICES_MAX:
            raise MeshNotReady(
                f"{service}: {SERVICES_MAX} services have an address already; use another mesh"
            )
        port = _FIRST_GATE_PORT + self._gates
        self._gates += 1
        words = [told.protocol, str(port), str(self.resolve(service)), str(told.port)]
        self._exec("agent", ["python3", "-m", "ztna.container.gate", *words])
        try:
            return _published(self.containers["agent"], port, told.protocol)
        except OSError as error:
            raise MeshNotReady(f"agent: {error}") from None

    # -- asking ----------------------------------------------------------------------------------------

    def _found(self, service: ServiceName) -> IPv4Address | None:
        return _ask(_published(self._container("dnsd"), DNS_PORT, "tcp"), f"{service}.{ZONE}")

    def _container(self, name: str) -> DockerContainer:
        if name not in self.containers:
            raise MeshNotReady(_NOT_RUNNING)
        return self.containers[name]

    def _done(self, name: str, argv: list[str]) -> tuple[bool, str]:
        """Run a command in a container; return whether it ended with 0, and what it said."""
        ended = self._container(name).exec(argv)
        return ended.exit_code == 0, ended.output.decode(errors="replace").strip()

    def _exec(self, name: str, argv: list[str]) -> None:
        try:
            done, said = self._done(name, argv)
        except OSError as error:  # the engine's refusals are such, too
            raise MeshNotReady(f"{name}: {error}") from None
        if not done:
            raise MeshNotReady(f"{name}: {said}")

    def _until(self, what: str, condition: Callable[[], object], asked: tuple[str, ...]) -> None:
        """Wait until a condition holds: something true, or `(True, said)`. Raises MeshNotReady."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                found = condition()
            except (OSError, ProtocolError) as error:
                found = (False, str(error))
            held, said = found if isinstance(found, tuple) else (bool(found), "")
            if held:
                return
            ended = [name for name in asked if _has_ended(self.containers[name])]
            if ended or time.monotonic() > deadline:
                logs = "".join(f"\n{name}:\n{self._tail(name)}" for name in asked)
                why = f"{', '.join(ended)} ended" if ended else f"not within {READY_SECONDS:.0f} s; {said}"
                raise MeshNotReady(f"waited for {what}: {why}{logs}")
            time.sleep(POLL_SECONDS)

    def _tail(self, name: str) -> str:
        lines = b"".join(self.containers[name].get_logs()).decode(errors="replace").splitlines()
        return "\n".join("    " + line for line in lines[-LOG_LINES:])


def _testcontainers() -> tuple[type[Network], type[DockerContainer]]:
    try:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.network import Network
    except ImportError as error:
        raise ExtraMissing(f"{error}: pip install 'ztna-mesh[testing]'") from None
    return Network, DockerContainer


def _client() -> DockerClient:
    """Return a client of the engine that testcontainers would use."""
    from testcontainers.core.docker_client import DockerClient

    return DockerClient()


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Say in our words what the engine, or the lack of one, raises."""
    _testcontainers()
    from docker.errors import APIError, BuildError, DockerException

    try:
        yield
    except BuildError as error:
        lines = [str(each.get("stream", each.get("error", ""))).rstrip() for each in error.build_log]
        told = "\n".join("    " + line for line in lines[-LOG_LINES:] if line)
        raise ImageNotBuilt(f"the image cannot be built: {error.msg}\n{told}") from None
    except APIError as error:
        raise MeshNotReady(f"the Docker engine refuses: {error.explanation or error}") from None
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST", "its default socket")
        raise NoDockerEngine(
            f"no Docker engine answers at {where}: start Docker, or set DOCKER_HOST to where it is ({error})"
        ) from None


@contextmanager
def _alone(key: str) -> Iterator[None]:
    """Be the one process that builds this image: the others find it built."""
    path = Path(tempfile.gettempdir()) / f"ztna-testing-{os.getuid()}-{key}.lock"
    # Others may write there too: no link of theirs is followed.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _gate_ports() -> list[int | str]:
    ports = range(_FIRST_GATE_PORT, _FIRST_GATE_PORT + SERVICES_MAX)
    return [f"{port}/{protocol}" for port in ports for protocol in ("tcp", "udp")]


def _published(container: DockerContainer, port: int, protocol: str) -> Address:
    """Return where this host reaches a port of a container. Raises ConnectionError when that has ended.

    By IPv4: the engine publishes on a port of each family, which are not the same, and `localhost` may be either.
    """
    wrapped = container.get_wrapped_container()
    wrapped.reload()
    ports = wrapped.ports.get(f"{port}/{protocol}") or ()
    chosen = next((int(each["HostPort"]) for each in ports if ":" not in each["HostIp"]), None)
    if chosen is None:
        raise ConnectionError(f"port {port} of {wrapped.name} is not published: it is {wrapped.status}")
    host = container.get_container_host_ip()
    return Address("127.0.0.1" if host == "localhost" else host, chosen)


def _ask(server: Address, name: str) -> IPv4Address | None:
    """Return the address that a DNS server has for a name, over TCP (RFC 1035 4.2.2). Raises OSError, ProtocolError."""
    question = dns.encode_query(int.from_bytes(os.urandom(2), "big"), name, dns.Type.A, DNS_BYTES_MAX)
    with socket.create_connection(server, DNS_SECONDS) as connection:
        connection.sendall(struct.pack("!H", len(question)) + question)
        with connection.makefile("rb") as answer:
            (length,) = struct.unpack("!H", answer.read(2).ljust(2, b"\0"))
            message = dns.decode(answer.read(length))
    return next((each.data for each in message.answers if isinstance(each.data, IPv4Address)), None)


def _has_ended(container: DockerContainer) -> bool:
    wrapped = container.get_wrapped_container()
    wrapped.reload()
    return str(wrapped.status) == "exited"
