"""What programs call when nftables cannot be had; with it: tests/e2e/test_modes.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from sidecar.agent.front import Front
from sidecar.agent.listeners import VirtualPort
from sidecar.agent.places import Places
from ztna import nft
from ztna.config import AgentConfig, AgentMode, TlsConfig
from ztna.errors import ZtnaError
from ztna.leases import Lease, Port
from ztna.names import ServiceName

WEB, IP = ServiceName("web-app"), "127.99.0.7"
PLACES = Places(frozenset({IPv4Network("127.99.0.0/16")}), {})
LEASES = {WEB: Lease(IPv4Address(IP), 1, (Port("tcp", 38_080), Port("udp", 38_053), Port("icmp", 0)))}


@pytest.fixture(autouse=True)
def without_nftables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "LIBRARY", "libabsent.so.1")


@pytest.fixture
async def fronts() -> AsyncIterator[list[Front]]:
    made: list[Front] = []
    yield made
    for front in made:
        front.close()


def front(mode: AgentMode, warnings: dict[str, str | None], uids: tuple[int, ...] | None = None) -> Front:
    tls = TlsConfig(certificate="c", key="k", ca="a")
    config = AgentConfig(tls=tls, mode=mode, allow_uids=uids)
    return Front(config, lambda *_: None, lambda *_: None, warnings.__setitem__, tun=None)


async def test_anyip_has_a_socket_each_then_and_says_so(fronts: list[Front]) -> None:
    warnings: dict[str, str | None] = {}
    made = front("anyip", warnings)
    fronts.append(made)
    made.apply(LEASES, PLACES)
    assert made.bound == {
        VirtualPort(WEB, "tcp", IP, 38_080, IP),
        VirtualPort(WEB, "udp", IP, 38_053, IP),
    }
    assert "a socket for each port" in str(warnings["redirect"])
    assert made.status() == {"listeners": "each", "allow_uids": "all"}


async def test_tun_refuses_to_start() -> None:
    with pytest.raises(ZtnaError, match=r"tun needs nftables for TCP: libabsent\.so\.1"):
        front("tun", {})


async def test_listen_never_asks_for_it(fronts: list[Front]) -> None:
    warnings: dict[str, str | None] = {}
    fronts.append(front("listen", warnings, uids=(1002, 1001)))
    assert warnings == {}
    assert fronts[0].status() == {"listeners": "each", "allow_uids": [1001, 1002]}
    assert fronts[0].held == {}


async def test_a_refusal_of_nftables_is_told_until_it_takes_what_is_wanted(
    fronts: list[Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        answer: ZtnaError | None = ZtnaError("nft: No buffer space available")

        def __init__(self, *_: object, **more: object) -> None:
            pass

        def apply(self, *_: object) -> None:
            if self.answer is not None:
                raise self.answer

        def write(self, packet: bytes) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr("sidecar.agent.front.Redirect", Refusing)
    monkeypatch.setattr("sidecar.agent.front.RawSockets", Refusing)
    warnings: dict[str, str | None] = {}
    made = front("anyip", warnings)
    fronts.append(made)
    made.apply(LEASES, PLACES)
    assert "No buffer space" in str(warnings["redirect"])
    monkeypatch.setattr(Refusing, "answer", None)
    made.apply(LEASES, PLACES)
    assert warnings["redirect"] is None
