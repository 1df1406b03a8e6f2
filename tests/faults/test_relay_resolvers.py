"""The relay's resolvers, on a real dnsd: over its unix socket and loopback, with one that is away."""

from __future__ import annotations

from pathlib import Path

from tests.support.consul import ConsulUnderTest
from tests.support.whole_mesh import ECHO, route, until, whole_mesh
from ztna.sections import Server


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
