"""A forwarder in its own namespace with peers in others, in user space or in the kernel: what runs is the same code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.forwarder_process import ticket
from tests.support.lab import until
from tests.support.namespaces import Host, network, run
from ztna.udp import RawSocket, decode_address, encode_address
from ztna.wire import forwarder as wire
from ztna.wire.control import Address

PORT = 4434
QUIC = b"\x40sealed"
ANSWER_SECONDS = 0.3
ARRIVAL_SECONDS = 10.0
RECEIVE_BUFFER_BYTES = 4 * 1024 * 1024
_SO_RCVBUFFORCE = 33
ROOT = Path(__file__).parents[2]


class ForwarderProcess:
    """The forwarder, told what to do over its standard input."""

    def __init__(
        self,
        host: Host,
        forwarding: str,
        log: Path,
        *,
        port: int = PORT,
        prefix: Sequence[str] = (),
        **first: Any,
    ) -> None:
        self.host = host
        wildcard = "::" if ":" in host.address else "0.0.0.0"
        argv = [sys.executable, "-m", "tests.support.forwarder_process", wildcard, str(port), forwarding]
        self._process = subprocess.Popen(
            [*host.prefix, *prefix, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            cwd=ROOT,
            text=True,
        )
        self.say(**first)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def say(self, **command: Any) -> dict[str, Any]:
        """Give a command; return the status after it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()
        self._process.communicate()


class LinkPeer:
    """One side of a link: a socket on a host, and its ticket's letter."""

    def __init__(self, host: Host, letter: str, relay: Host, port: int = PORT) -> None:
        self.bind_id, self.secret = ticket(letter)
        self.relay = encode_address((relay.address, port))
        self.raw = udp_socket(host)
        self.address = self.raw.address

    def send(self, *packets: bytes) -> None:
        """Send to the forwarder."""
        self.raw.send([(packet, self.relay) for packet in packets])

    def receive(self, seconds: float = ANSWER_SECONDS) -> list[bytes]:
        """Return what came within the time: the first batch. All of it came from the forwarder."""
        if not select.select([self.raw], [], [], seconds)[0]:
            return []
        got = self.raw.receive()
        assert {source for _, source in got} == {self.relay}, [decode_address(each) for _, each in got]
        return [data for data, _ in got]

    def bind(self) -> Address:
        """Bind, and return the address that the forwarder saw."""
        seen: list[Address] = []

        def bound() -> bool:
            self.send(wire.encode(wire.Bind(self.bind_id, wire.NO_MAC)))
            while not seen and (got := self.receive()):
                for message in [wire.decode(data) for data in got if not data[0] & 0x40]:
                    if isinstance(message, wire.Challenge):
                        mac = wire.bind_mac(self.secret, message.nonce)
                        self.send(wire.encode(wire.Bind(self.bind_id, mac)))
                    elif isinstance(message, wire.Bound):
                        seen.append(message.address)
            return bool(seen)

        until("the forwarder binds", bound)
        return seen[0]

    def close(self) -> None:
        """Give the socket back."""
        self.raw.close()


def udp_socket(host: Host) -> RawSocket:
    """Return a bound socket of a host with room for what a test or bench has in flight."""
    family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
    sock = host.socket(socket.SOCK_DGRAM, family)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    sock.bind((host.address, 0))
    return RawSocket(sock)


class Ground:
    """A relay host with a forwarder, and two more hosts for peers."""

    def __init__(self, hosts: Sequence[Host], forwarding: str, directory: Path, workers: int) -> None:
        self.forwarding, self._directory, self._workers = forwarding, directory, workers
        self.relay, self.left, self.right = hosts
        self._processes: list[ForwarderProcess] = []
        self._peers: list[LinkPeer] = []

    def start(self, in_use: str = "", *, prefix: Sequence[str] = (), **first: Any) -> ForwarderProcess:
        """Start the forwarder; the kernel's must really be the kernel's, unless something else is expected."""
        log = self._directory / "log"
        first |= {"workers": self._workers}
        process = ForwarderProcess(self.relay, self.forwarding, log, prefix=prefix, **first)
        self._processes.append(process)
        shown = process.say()["forwarding"]
        assert shown["in_use"] == (in_use or self.forwarding), shown
        return process

    def peer(self, host: Host, letter: str) -> LinkPeer:
        """Make a peer, unbound."""
        peer = LinkPeer(host, letter, self.relay)
        self._peers.append(peer)
        return peer

    def link(self, process: ForwarderProcess, key: str, peers: str = "") -> tuple[LinkPeer, LinkPeer]:
        """Make a link whose both sides are bound; its `peers` share a quota."""
        process.say(add=key, peers=peers or key)
        agent, connector = self.peer(self.left, key.lower()), self.peer(self.right, key.upper())
        agent.bind()
        connector.bind()
        return agent, connector

    def close(self) -> None:
        """End everything."""
        for peer in self._peers:
            peer.close()
        for process in self._processes:
            process.kill()


@contextlib.contextmanager
def ground(forwarding: str, directory: Path, workers: int = 1, *, ipv6: bool = False) -> Iterator[Ground]:
    """Three hosts, of which the relay's routes."""
    with network("relay", "left", "right") as net:
        hosts = list(net.hosts.values())
        if ipv6:
            hosts = [_with_ipv6(host, number) for number, host in enumerate(hosts, 1)]
        made = Ground(hosts, forwarding, directory, workers)
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            made.relay.run("sysctl", "-qw", f"{key}=1")
        try:
            yield made
        finally:
            made.close()


def _with_ipv6(host: Host, number: int) -> Host:
    address = f"fd91::{number}"
    run("ip", "-n", host.namespace, "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
    return dataclasses.replace(host, address=address)


def passes(source: LinkPeer, target: LinkPeer, data: bytes = QUIC, seconds: float = ARRIVAL_SECONDS) -> bool:
    """Say whether a packet gets from one side to the other."""
    source.send(data)
    while got := target.receive(seconds):
        if data in got:
            return True
    return False


def silent(source: LinkPeer, target: LinkPeer, data: bytes = QUIC) -> bool:
    """Say whether a packet does not get there; a short wait must do."""
    return not passes(source, target, data, ANSWER_SECONDS)
