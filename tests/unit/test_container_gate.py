"""The gate into a service: it copies both ways, ends streams, and keeps senders of datagrams apart."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.support.consul import free_ports
from tests.support.lab import until


class Gate:
    """A gate in the background of the host, found by its command line."""

    def __init__(self, protocol: str, target: int) -> None:
        (self.port,) = free_ports(1)
        self.words = [protocol, str(self.port), "127.0.0.1", str(target)]
        argv = [sys.executable, "-m", "ztna.container.gate", *self.words]
        assert subprocess.run(argv, timeout=30).returncode == 0

    def end(self) -> None:
        told = "\0".join(self.words).encode()
        for each in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{each}/cmdline", "rb") as file:
                    if told in file.read():
                        os.kill(int(each), signal.SIGTERM)
                        until("its end", lambda: not os.path.exists(f"/proc/{each}/exe"))  # noqa: B023
            except FileNotFoundError:
                continue


@pytest.fixture
def echo_over_udp() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while (got := sock.recvfrom(2048))[0] != b"end":
                sock.sendto(f"{got[1][1]} ".encode() + got[0], got[1])

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock.getsockname()[1]
        sock.sendto(b"end", sock.getsockname())
        thread.join()


def test_a_connection_is_carried_with_the_ends_of_both_streams() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gate = Gate("tcp", server.getsockname()[1])
        try:
            with socket.create_connection(("127.0.0.1", gate.port), 10) as client:
                service, _ = server.accept()
                with service:
                    client.sendall(b"question")
                    client.shutdown(socket.SHUT_WR)
                    with service.makefile("rb") as asked:
                        assert asked.read() == b"question"
                    service.sendall(b"answer")
                    service.shutdown(socket.SHUT_WR)
                    with client.makefile("rb") as answered:
                        assert answered.read() == b"answer"
        finally:
            gate.end()


def test_a_service_that_refuses_is_a_reset() -> None:
    (nobody,) = free_ports(1)
    gate = Gate("tcp", nobody)
    try:
        # It may come before connect(2) returns.
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", gate.port), 10) as client,
        ):
            client.recv(1)
    finally:
        gate.end()


def test_each_sender_gets_its_own_answers(echo_over_udp: int) -> None:
    gate = Gate("udp", echo_over_udp)
    try:
        sources = set()
        for number in range(3):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.connect(("127.0.0.1", gate.port))
                for _ in range(2):
                    client.send(b"%d" % number)
                    source, _, answer = client.recv(2048).partition(b" ")
                    assert answer == b"%d" % number
                    sources.add(source)
        assert len(sources) == 3
    finally:
        gate.end()
