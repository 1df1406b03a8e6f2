"""sidecar.agent.redirect without a kernel that redirects: what it believes is published, and hands on."""

from __future__ import annotations

import socket
from ipaddress import ip_network

import pytest

from sidecar.agent import redirect
from sidecar.agent.listeners import PacketPort, VirtualPort
from sidecar.agent.redirect import Redirect
from ztna.errors import ZtnaError
from ztna.names import ServiceName
from ztna.nft import NftError
from ztna.telemetry import DROPS
from ztna.udp import SockAddr

WEB = ServiceName("web-app")
POOLS = frozenset({ip_network("10.100.0.0/16")})


def at(port: int, protocol: str = "tcp") -> VirtualPort:
    return VirtualPort(WEB, protocol, "10.100.0.2", port, "10.100.0.2")  # type: ignore[arg-type]


class FakeNft:
    """Keeps what it was told; says no to what `refuses` names."""

    last: FakeNft

    def __init__(self) -> None:
        FakeNft.last = self
        self.told: list[str] = []
        self.refuses = ""
        self.printed = ""
        self.is_closed = False

    def run(self, commands: str) -> str:
        if self.refuses and self.refuses in commands:
            raise NftError(f"nft: no {self.refuses}")
        self.told.append(commands)
        return self.printed

    def close(self) -> None:
        self.is_closed = True


class Ground:
    """A redirect whose listener is a plain one."""

    def __init__(self) -> None:
        self.accepted: list[tuple[VirtualPort, SockAddr]] = []
        self.received: list[tuple[PacketPort, bytes]] = []
        self.redirect = Redirect(
            "ztna_agent_test",
            self._accept,
            lambda port, data, source: self.received.append((port, data)),  # type: ignore[arg-type]
            write=lambda packet: None,
            has_ipv6=False,
            uids=None,
        )
        self.nft = FakeNft.last
        self.door = self.redirect._acceptors[0]._socket.getsockname()

    def _accept(self, port: VirtualPort, sock: socket.socket, source: SockAddr) -> None:
        sock.close()
        self.accepted.append((port, source))


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirect, "Nft", FakeNft)
    monkeypatch.setattr(redirect, "_see_through", lambda sock: None)


async def test_what_is_wanted_is_published_and_nothing_else() -> None:
    ground = Ground()
    ground.redirect.apply([at(80), at(53, "udp"), at(0, "icmp")], POOLS)
    assert ground.redirect.bound == {at(80), at(53, "udp")}
    told = "".join(ground.nft.told)
    assert "10.100.0.0/16" in told and "10.100.0.2 . 80" in told and "10.100.0.2 . 53" in told
    ground.nft.told.clear()
    ground.redirect.apply([at(81)], POOLS)
    assert ground.redirect.bound == {at(81)}
    told = "".join(ground.nft.told)
    assert "delete element" in told and "10.100.0.2 . 81" in told and "10.100.0.0/16" not in told
    ground.redirect.close()
    assert ground.nft.is_closed


@pytest.mark.parametrize("refuses", ["pools4", "10.100.0.2 . 81"])
async def test_what_nft_refused_is_not_believed_to_be_published(refuses: str) -> None:
    ground = Ground()
    ground.redirect.apply([at(80)], frozenset())
    ground.nft.refuses = refuses
    with pytest.raises(NftError):
        ground.redirect.apply([at(80), at(81)], POOLS)
    assert ground.redirect.bound == {at(80)}
    ground.nft.refuses = ""
    ground.nft.told.clear()
    ground.redirect.apply([at(80), at(81)], POOLS)
    assert ground.redirect.bound == {at(80), at(81)}
    assert "10.100.0.2 . 81" in "".join(ground.nft.told)
    ground.redirect.close()


async def test_what_nft_refused_to_add_has_taken_nothing_back() -> None:
    """What was deleted once could not be deleted again: no later change would be taken."""
    ground = Ground()
    ground.redirect.apply([at(80)], POOLS)
    ground.nft.refuses = "add element"
    ground.nft.told.clear()
    with pytest.raises(NftError):
        ground.redirect.apply([at(81)], POOLS)
    assert not ground.nft.told and ground.redirect.bound == {at(80)}
    ground.nft.refuses = ""
    ground.redirect.apply([at(81)], POOLS)
    assert "10.100.0.2 . 80" in next(each for each in ground.nft.told if each.startswith("delete"))
    ground.redirect.close()


async def test_a_caller_of_what_is_not_published_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground()
    ground.redirect.apply([at(80)], POOLS)
    before = DROPS.labels("agent_redirect", "not_published")._value.get()
    called: list[SockAddr | None] = [None, ("10.100.0.2", 81), ("10.100.0.2", 80)]
    for each in called:
        monkeypatch.setattr(redirect, "_original_destination", lambda sock, each=each: each)
        ours, theirs = socket.socketpair()
        ground.redirect._accepted(ours, ("10.0.0.9", 4000))
        theirs.close()
    assert ground.accepted == [(at(80), ("10.0.0.9", 4000))]
    assert DROPS.labels("agent_redirect", "not_published")._value.get() == before + 2
    ground.redirect.close()


async def test_another_agents_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(FakeNft):
        def run(self, commands: str) -> str:
            if not commands.startswith("list"):
                raise NftError("nft: File exists")
            return ""

    monkeypatch.setattr(redirect, "Nft", Taken)
    with pytest.raises(ZtnaError, match="another agent on this host"):
        Ground()
    assert Taken.last.is_closed, "and nothing is left behind"


async def test_refused_users_are_counted_until_the_table_is_lost() -> None:
    ground = Ground()
    ground.nft.printed = '{"nftables": [{"counter": {"packets": 3}}]}\n'
    counter = redirect.REFUSALS.labels(redirect.REFUSED_WHERE, "no_grant")._value
    before = counter.get()
    ground.redirect.count()
    assert counter.get() == before + 3
    ground.nft.refuses = "counter"
    ground.redirect.count()
    assert counter.get() == before + 3
    ground.redirect.close()
