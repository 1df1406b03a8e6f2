"""The relay's resolvers, on a real dnsd: over its unix socket and loopback, with one that is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dnsd import serving
from tests.support.consul import ConsulUnderTest
from tests.support.whole_mesh import ECHO, route, until, whole_mesh
from ztna.consul import watch
from ztna.reasons import Reason
from ztna.sections import Server
from ztna.wire import control
from ztna.wire.control import LeaseRef

HOLD_SECONDS = 12.0


@pytest.fixture
def consul(tmp_path: Path) -> Iterator[ConsulUnderTest]:
    """Which Consul it is does not matter for how long the relay holds on."""
    server = ConsulUnderTest("embedded", tmp_path)
    yield server
    server.stop()


async def test_srv_records_come_over_the_unix_socket_of_dnsd(
    tmp_path: Path, own_consul: ConsulUnderTest
) -> None:
    """The first resolver is nobody's: the relay goes on to the second, and stays there."""
    resolvers = (Server(str(tmp_path / "nobody.sock"), 0), Server(str(tmp_path / "dns.sock"), 0))
    async with whole_mesh(tmp_path, own_consul.config(), resolvers=resolvers) as mesh:
        assert mesh.dns_socket.stat().st_mode & 0o777 == 0o666
        backend = await mesh.backend("echo")
        await mesh.connector("rack-1", [route(ECHO, backend)])
        await mesh.served_by(ECHO, "rack-1")
        await until("confirmed", lambda: mesh.relay.status("srv")["fresh_age_s"] is not None)
        assert mesh.relay.status("srv")["failing"] == ""
        alice = await mesh.scripted("alice", ECHO)
        opened = await alice.open()
        carrier = await alice.carrier(opened)
        assert await alice.say(carrier, opened.session, b"hello\n") == b"echo: hello\n"
    assert not mesh.dns_socket.exists()


@pytest.mark.parametrize("away", ["dnsd", "consul"])
async def test_the_last_answers_hold_for_the_bound_and_no_longer(
    away: str, tmp_path: Path, consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Consul away dnsd answers on, marked as stale (EDE 3): that renews nothing."""
    monkeypatch.setattr(watch, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(serving, "STALE_AFTER_SECONDS", 3.0)
    async with whole_mesh(tmp_path, consul.config(), srv_hold_s=HOLD_SECONDS) as mesh:
        backend = await mesh.backend("echo")
        await mesh.connector("rack-1", [route(ECHO, backend)])
        await mesh.served_by(ECHO, "rack-1")
        alice = await mesh.scripted("alice", ECHO)
        first, lease = await alice.open(), await mesh.lease(ECHO)
        if away == "dnsd":
            await mesh.dnsd.stop()
        else:
            consul.stop()
        alice.peer.say(control.Open(99, ECHO, LeaseRef(lease.ip, lease.epoch)))
        second = await alice.peer.expect(control.Opened, request=99)
        assert {each["session"] for each in mesh.relay.status("sessions")} == {first.session, second.session}
        await until("ended", lambda: not mesh.relay.status("sessions"))
        confirmed_s_ago = mesh.relay.status("srv")["fresh_age_s"]
        assert confirmed_s_ago >= HOLD_SECONDS
        assert bool(mesh.relay.status("srv")["failing"]) == (away == "dnsd")
        assert (await alice.denied()).reason is Reason.POLICY_UNKNOWN


async def test_a_connector_whose_backend_fails_gets_no_new_sessions_and_loses_those_it_has(
    tmp_path: Path, own_consul: ConsulUnderTest
) -> None:
    """Its SRV record goes with its health: sessions end within the grace, a TTL and a tick."""
    async with whole_mesh(tmp_path, own_consul.config(), leave_grace_s=0.5) as mesh:
        backend = await mesh.backend("echo")
        await mesh.connector("rack-1", [route(ECHO, backend)])
        await mesh.served_by(ECHO, "rack-1")
        alice = await mesh.scripted("alice", ECHO)
        opened = await alice.open()
        assert [each["session"] for each in mesh.relay.status("sessions")] == [opened.session]
        backend.stop()
        await until("ended", lambda: not mesh.relay.status("sessions"))
        await backend.start()
