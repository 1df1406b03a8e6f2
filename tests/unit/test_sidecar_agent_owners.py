"""Whose sockets these are: ours, somebody's no more, or nobody's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from sidecar.agent.owners import Owners

ADDRESSES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


@pytest.fixture
def owners() -> Iterator[Owners]:
    made = Owners()
    yield made
    made.close()


@pytest.mark.parametrize(("family", "address"), ADDRESSES)
def test_a_connection_belongs_to_who_made_it_until_it_is_closed(
    owners: Owners, family: socket.AddressFamily, address: str
) -> None:
    with socket.create_server((address, 0), family=family) as server:
        called = server.getsockname()[:2]
        program = socket.create_connection(called)
        accepted, source = server.accept()
        with accepted:
            assert owners.uid("tcp", source[:2], called) == os.getuid()
            program.close()
            assert owners.uid("tcp", source[:2], called) is None


@pytest.mark.parametrize(("family", "address"), ADDRESSES)
@pytest.mark.parametrize("is_connected", [True, False])
def test_so_does_a_socket_that_sends_datagrams(
    owners: Owners, family: socket.AddressFamily, address: str, is_connected: bool
) -> None:
    with (
        socket.socket(family, socket.SOCK_DGRAM) as port,
        socket.socket(family, socket.SOCK_DGRAM) as program,
    ):
        port.bind((address, 0))
        called = port.getsockname()[:2]
        if is_connected:
            program.connect(called)
            program.send(b"x")
        else:
            program.sendto(b"x", called)
        source = port.recvfrom(10)[1][:2]
        assert owners.uid("udp", source, called) == os.getuid()
        program.close()
        assert owners.uid("udp", source, called) is None


def test_where_there_is_none_there_is_no_owner(owners: Owners) -> None:
    for protocol in ("tcp", "udp"):
        assert owners.uid(protocol, ("127.0.0.1", 1), ("127.0.0.1", 2)) is None  # type: ignore[arg-type]
    owners.close()
    assert owners.uid("tcp", ("127.0.0.1", 1), ("127.0.0.1", 2)) is None
