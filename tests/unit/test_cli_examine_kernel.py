"""ztna.cli.examine_kernel: what a configuration needs is looked at, and nothing else; what is missing is named."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.lab import tcp_route
from ztna.cli import examine_kernel
from ztna.config import CheckConfig, Config, Endpoint, RouteConfig
from ztna.findings import Verdict
from ztna.names import ServiceName
from ztna.nft import NftError


class NoNft:
    """What making a context is like where there is no library."""

    def __init__(self) -> None:
        raise NftError("libnftables.so.1: cannot open shared object file")


class SomeNft:
    """A library that does what it is told."""

    def run(self, commands: str) -> str:
        return ""

    def close(self) -> None:
        pass


def no_ping(*_: Any) -> socket.socket:
    raise PermissionError(errno.EACCES, "Permission denied")


def of_mode(mode: str) -> Config:
    return cast(Config, SimpleNamespace(agent=SimpleNamespace(mode=mode), connector=None))


def of_routes(*routes: RouteConfig) -> Config:
    return cast(Config, SimpleNamespace(agent=None, connector=SimpleNamespace(routes=routes)))


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("listen", {}),
        ("anyip", {"nftables": Verdict.WARNING}),
        ("tun", {"nftables": Verdict.WRONG, "TUN": Verdict.WRONG}),
    ],
)
def test_what_a_mode_misses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, found: dict[str, Verdict]
) -> None:
    monkeypatch.setattr(examine_kernel, "Nft", NoNft)
    told = list(examine_kernel.examine(of_mode(mode), tun=tmp_path / "tun"))
    assert {each.check: each.verdict for each in told} == found
    assert all(each.todo for each in told)
    assert all("libnftables" in each.told for each in told if each.check == "nftables")


def test_what_is_there_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_kernel, "Nft", SomeNft)
    (tmp_path / "tun").touch()
    told = list(examine_kernel.examine(of_mode("tun"), tun=tmp_path / "tun"))
    assert {each.check: each.verdict for each in told} == {"nftables": Verdict.FINE, "TUN": Verdict.FINE}


def ping_route(icmp: str) -> RouteConfig:
    return RouteConfig(
        service=ServiceName("web-app"),
        backend=Endpoint("127.0.0.1", 80),
        protocol="icmp",
        icmp=icmp,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        (tcp_route("web-app", Endpoint("127.0.0.1", 80)), False),
        (ping_route("connector"), False),
        (ping_route("backend"), True),
        (
            RouteConfig(
                service=ServiceName("web-app"),
                backend=Endpoint("127.0.0.1", 80),
                port=80,
                checks=(CheckConfig(kind="icmp"),),
            ),
            True,
        ),
    ],
    ids=["tcp", "the connector answers", "the backend answers", "a check pings"],
)
def test_ping_sockets_are_tried_where_somebody_pings(
    monkeypatch: pytest.MonkeyPatch, route: RouteConfig, asked: bool
) -> None:
    monkeypatch.setattr(socket, "socket", no_ping)
    told = list(examine_kernel.examine(of_routes(route)))
    assert [(each.check, each.verdict) for each in told] == [("ping", Verdict.WARNING)] * asked
    assert all("ping_group_range" in each.todo for each in told)


def test_who_may_ping_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    monkeypatch.setattr(socket, "socket", lambda *_: made)
    assert examine_kernel.ping_sockets().verdict is Verdict.FINE
    assert made.fileno() < 0
