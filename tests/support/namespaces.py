"""Test hosts: network namespaces on one bridge, each with an address, sockets, processes and drops.

Needs root. Everything made has a name unique to the run and is removed at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

COMMAND_SECONDS = 60
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def why_not() -> str | None:
    """Say why namespaces cannot be had here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def run(*argv: str) -> str:
    """Run a command to its end and return what it printed; AssertionError with its words when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, f"{' '.join(argv)}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Host:
    """One namespace: `address` on the test network, and its own loopback."""

    name: str
    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def run(self, *argv: str) -> str:
        """Run a command on this host to its end; as `run`."""
        return run(*self.prefix, *argv)

    def try_run(self, *argv: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a command on this host and return how it ended."""
        return subprocess.run([*self.prefix, *argv], capture_output=True, text=True, timeout=seconds)

    def socket(
        self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET, protocol: int = 0
    ) -> socket.socket:
        """Return a fresh socket that lives on this host, usable from the test process itself."""
        return self.inside(lambda: socket.socket(family, kind, protocol))

    def inside(self, act: Callable[[], T]) -> T:
        """Do something on this host, in a thread of its own: whatever it opens lives here. Raises what it raises."""

        def enter() -> T:
            # A namespace belongs to a thread: this one enters it, acts and ends (setns(2)).
            with Path(f"/run/netns/{self.namespace}").open() as handle:
                if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {self.namespace}")
            return act()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()

    @contextlib.contextmanager
    def dropping(self, *rules: str) -> Iterator[None]:
        """Drop what matches (nft match text, e.g. `tcp dport 4435`), in and out, while inside."""
        table = f"drop_{secrets.token_hex(3)}"
        lines = [f"table inet {table} {{"]
        for hook in ("input", "output"):
            matches = "\n".join(f"{rule} drop" for rule in rules)
            lines.append(f"chain {hook} {{ type filter hook {hook} priority -10;\n{matches}\n}}")
        lines.append("}")
        self.nft("\n".join(lines))
        try:
            yield
        finally:
            self.run("nft", "delete", "table", "inet", table)

    def nft(self, rules: str) -> None:
        """Load rules on this host, as `nft -f` takes them."""
        argv = [*self.prefix, "nft", "-f", "-"]
        done = subprocess.run(argv, input=rules, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        assert done.returncode == 0, f"nft on {self.name}: {done.stderr}\n{rules}"

    def processes(self) -> list[int]:
        """Return the pids that live in this namespace."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace).split()]


class LocalHost(Host):
    """This very machine as a host, for what needs no network of its own."""

    @property
    def prefix(self) -> list[str]:
        """Nothing: a command runs here."""
        return []

    def socket(
        self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET, protocol: int = 0
    ) -> socket.socket:
        """Return a fresh socket."""
        return socket.socket(family, kind, protocol)

    def inside(self, act: Callable[[], T]) -> T:
        """Just do it."""
        return act()


@dataclass
class LocalNetwork:
    """A network whose every host is this machine on 127.0.0.1: ports must then be chosen."""

    hosts: dict[str, Host] = field(default_factory=dict)

    def host(self, name: str) -> Host:
        """Return this machine under another name."""
        return self.hosts.setdefault(name, LocalHost(name, "", "127.0.0.1"))


@dataclass
class Network:
    """A bridge in a namespace of its own, with hosts attached to it by veth pairs."""

    subnet: str = "10.91.0"
    token: str = field(default_factory=lambda: secrets.token_hex(3))
    hosts: dict[str, Host] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def _switch(self) -> str:
        return f"zt{self.token}sw"

    @property
    def switch(self) -> Host:
        """The namespace of the bridge, as a host without an address."""
        return Host("switch", self._switch, "")

    def open(self) -> None:
        """Make the bridge; where namespaces cannot be had the test is skipped, and fails under CI."""
        if (reason := why_not()) is not None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "br0", "up")

    def host(self, name: str) -> Host:
        """Make a host of this network; its loopback is up."""
        number = next(self._numbers)
        namespace = f"zt{self.token}{name}"
        host = self.hosts[name] = Host(name, namespace, f"{self.subnet}.{number}")
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        pair = ("link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self._switch)
        run("ip", "-n", namespace, *pair)
        run("ip", "-n", namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        run("ip", "-n", self._switch, "link", "set", f"port{number}", "master", "br0", "up")
        return host

    def behind(self, name: str, router: Host, address: str, gateway: str) -> Host:
        """Make a host that is on no bridge: it has one neighbour, a router, which forwards for it from now on."""
        namespace = f"zt{self.token}{name}"
        host = self.hosts[name] = Host(name, namespace, address)
        run("ip", "netns", "add", namespace)
        pair = ("link", "add", "eth0", "type", "veth", "peer", "name", "lan0", "netns", router.namespace)
        run("ip", "-n", namespace, *pair)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        for at, own, device in ((namespace, address, "eth0"), (router.namespace, gateway, "lan0")):
            run("ip", "-n", at, "addr", "add", f"{own}/24", "dev", device)
            run("ip", "-n", at, "link", "set", device, "up")
        run("ip", "-n", namespace, "route", "add", "default", "via", gateway)
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        return host

    def interpose(self, host: Host) -> tuple[str, str]:
        """Take a host off the bridge; return two devices of the switch, between which somebody must pass its frames."""
        port = self.port(host)
        pair = ("link", "add", f"{port}n", "type", "veth", "peer", "name", f"{port}f")
        run("ip", "-n", self._switch, *pair)
        for device in (f"{port}n", f"{port}f"):
            run("ip", "-n", self._switch, "link", "set", device, "up")
        run("ip", "-n", self._switch, "link", "set", port, "nomaster")
        run("ip", "-n", self._switch, "link", "set", f"{port}f", "master", "br0")
        return port, f"{port}n"

    def reunite(self, host: Host) -> None:
        """Put a host on the bridge again."""
        port = self.port(host)
        run("ip", "-n", self._switch, "link", "del", f"{port}n")
        run("ip", "-n", self._switch, "link", "set", port, "master", "br0")

    @staticmethod
    def port(host: Host) -> str:
        """Return the switch's device that a host is at."""
        return f"port{host.address.rpartition('.')[2]}"

    def close(self) -> None:
        """Remove every namespace that was made, however far it got."""
        for namespace in [*(host.namespace for host in self.hosts.values()), self._switch]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=COMMAND_SECONDS)


@contextlib.contextmanager
def network(*names: str) -> Iterator[Network]:
    """A network with these hosts, removed at the end."""
    made = Network()
    try:
        made.open()
        for name in names:
            made.host(name)
        yield made
    finally:
        made.close()
