"""dnsd.sockets: UDP and TCP on one port, alone or several times, and never beside a stranger."""

from __future__ import annotations

import socket

import pytest

from dnsd.sockets import bind, bind_several
from ztna.config import Endpoint
from ztna.errors import ZtnaError

FREE = Endpoint("127.0.0.1", 0)


def test_udp_and_tcp_have_one_port_and_nobody_else_gets_it() -> None:
    sockets = bind(FREE)
    host, port = sockets.address
    assert sockets.tcp.getsockname() == (host, port) and not sockets.udp.getblocking()
    with pytest.raises(ZtnaError, match=str(port)):
        bind(Endpoint(host, port))
    sockets.close()
    sockets.close()


def test_several_share_a_port_which_another_program_does_not_get_even_if_it_would_share() -> None:
    bound = bind_several(FREE, 3)
    address = bound[0].address
    assert {each.address for each in bound} == {address}
    for taken in (bind, lambda endpoint: bind_several(endpoint, 2)):
        with pytest.raises(ZtnaError, match=str(address[1])):
            taken(Endpoint(*address))
    another = bind(Endpoint(*address), shared=True)
    for each in (*bound, another):
        each.close()


def test_a_port_whose_tcp_is_taken_is_named_and_nothing_stays_bound() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = Endpoint(*other.getsockname())
        with pytest.raises(ZtnaError, match=f"{endpoint.port} is taken"):
            bind_several(endpoint, 2)
    for each in bind_several(endpoint, 2):
        each.close()
