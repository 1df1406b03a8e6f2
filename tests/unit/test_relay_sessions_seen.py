"""What an operator sees and ends on a running relay: the list, the audit log, the page, `ztna sessions`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from relay import looking_in
from tests.support.relay import SERVICE, Dialled, Peer, RunningRelay, forged_session, running_relay, token_of
from ztna.admin import serving
from ztna.cli.main import cli
from ztna.config import Config, Endpoint
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.runtime import Daemon
from ztna.wire import control

WAIT_SECONDS = 10.0


class Seen:
    """A relay with its admin port, socket and audit log."""

    def __init__(self, mesh: RunningRelay, daemon: Daemon, directory: Path) -> None:
        self.mesh, self._daemon, self._directory = mesh, daemon, directory

    @property
    def socket(self) -> str:
        return str(self._directory / "admin.sock")

    @property
    def port(self) -> str:
        return "{}:{}".format(*self._daemon.admin_address)

    async def ztna(self, *arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, cli, ["sessions", *arguments])

    async def audited(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many lines."""
        path = self._directory / "audit.log"
        async with asyncio.timeout(WAIT_SECONDS):
            while len(lines := path.read_text().splitlines()) < count:
                await asyncio.sleep(0.01)
        return [json.loads(line) for line in lines]


@pytest.fixture
async def seen(tmp_path: Path) -> AsyncIterator[Seen]:
    async with running(tmp_path) as seen:
        yield seen


@asynccontextmanager
async def running(directory: Path, **config: Any) -> AsyncIterator[Seen]:
    async with (
        running_relay(directory, audit_log=str(directory / "audit.log"), **config) as mesh,
        asyncio.TaskGroup() as tasks,
    ):
        daemon = Daemon("ztna-relay", Config(), tasks)
        daemon.status_sources.update(looking_in.sources(mesh.relay))
        daemon.actions["close-session"] = mesh.relay.close_session
        async with serving(daemon, Endpoint("127.0.0.1", 0), str(directory / "admin.sock")):
            yield Seen(mesh, daemon, directory)


async def spliced(mesh: RunningRelay, agent: Peer, connector: Peer, opened: control.Opened) -> list[Dialled]:
    """Join two TCP connections at the forwarder for a session, and carry 5 bytes."""
    ends = [await Dialled.dial(mesh, await token_of(agent, opened))]
    carry = await connector.expect(control.Carry, session=opened.session)
    ends.append(await Dialled.dial(mesh, carry.token))
    for end in ends:
        await end.bound()
    ends[0].writer.write(b"hello")
    assert await asyncio.wait_for(ends[1].reader.readexactly(5), WAIT_SECONDS) == b"hello"
    return ends


async def test_a_session_is_listed_with_who_what_and_how_much(seen: Seen) -> None:
    connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    await spliced(seen.mesh, agent, connector, opened)
    for where in (seen.port, seen.socket):
        listed = await seen.ztna("list", "--relay", where, "--json")
        (session,) = json.loads(listed.stdout)
        assert session.pop("age_s") >= 0
        assert session == {
            "session": opened.session,
            "service": SERVICE,
            "agent": agent.name,
            "connector_id": "con-x",
            "open": True,
            "path": "forwarded",
            "bytes": 5,
            "link_bytes": 0,
        }
    table = await seen.ztna("list", "--relay", seen.port)
    assert table.exit_code == 0 and opened.session in table.stdout and agent.name in table.stdout
    for filtered in (("--service", "other"), ("--agent", "nobody")):
        assert (await seen.ztna("list", "--relay", seen.port, "--json", *filtered)).stdout == "[]\n"


async def test_tcp_of_a_connector_that_leaves_dns_may_finish_and_what_is_new_moves(tmp_path: Path) -> None:
    async with running(tmp_path, leaving="move", leave_grace_s=0.2) as seen:
        mesh = seen.mesh
        old, agent = await mesh.connector("con-x"), await mesh.agent()
        opened, _, _ = await agent.open_with(old)
        ends = await spliced(mesh, agent, old, opened)
        new = await mesh.connector("con-y")
        mesh.dns.routes[SERVICE] = [(0, 1, "con-y")]
        assert await agent.expect(control.Retired, session=opened.session)
        fresh, _, connector = await agent.open_with(old, new, request=2)
        assert connector is new and fresh.connector_id == "con-y"
        ends[0].writer.write(b"as before")
        assert await asyncio.wait_for(ends[1].reader.readexactly(9), WAIT_SECONDS) == b"as before"
        # And for a carrier that broke: the session still gets tokens.
        for end in await spliced(mesh, agent, old, opened):
            end.writer.close()
        # As long as an answer of DNS would hold, and no longer: two seconds from now on.
        mesh.relay.puller._hold_s = 2.0
        closed = await agent.expect(control.Closed, session=opened.session)
        assert closed.reason is Reason.NO_HEALTHY_CONNECTOR
        await until_reset(ends[0])
        assert fresh.session in mesh.relay.sessions.sessions


async def until_reset(end: Dialled) -> None:
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(WAIT_SECONDS):
            while await end.reader.read(65_536):
                pass
        raise AssertionError("a clean end")
    end.writer.close()


async def test_a_quota_is_one_for_all_tcp_of_a_pair_of_peers_and_a_rate_slows_it(tmp_path: Path) -> None:
    async with running(tmp_path, link_quota_bytes=3_000_000, link_rate_bytes_per_s=2_000_000) as seen:
        connector, agent, other = (
            await seen.mesh.connector(),
            await seen.mesh.agent(),
            await seen.mesh.agent("agent-2"),
        )
        first, _, _ = await agent.open_with(connector, request=1)
        second, _, _ = await agent.open_with(connector, request=2)
        spared, _, _ = await other.open_with(connector, request=1)
        one, two = [await spliced(seen.mesh, agent, connector, each) for each in (first, second)]
        kept = await spliced(seen.mesh, other, connector, spared)
        began = time.monotonic()
        one[0].writer.write(bytes(3_000_000))
        # Cut in the second after it was used up, and of the other session too.
        await asyncio.gather(*(until_reset(each) for each in (*one, *two)))
        assert time.monotonic() - began >= 1.0, "half a second of it at once, and the rest at the rate"
        agent.say(control.Dial(second.session))
        kept[0].writer.write(b"again")
        assert await asyncio.wait_for(kept[1].reader.readexactly(5), WAIT_SECONDS) == b"again"
        refusals = seen.mesh.relay.splicer.refusals
        async with asyncio.timeout(WAIT_SECONDS):
            while refusals["link_quota"] < 3:
                await asyncio.sleep(0.01)
        assert refusals["link_rate"] >= 1


async def test_closing_ends_that_session_alone_its_tcp_too_and_both_ends_hear_why(seen: Seen) -> None:
    connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
    first, _, _ = await agent.open_with(connector, request=1)
    second, _, _ = await agent.open_with(connector, request=2)
    ended = await spliced(seen.mesh, agent, connector, first)
    kept = await spliced(seen.mesh, agent, connector, second)
    done = await seen.ztna("close", "--relay", seen.socket, first.session)
    assert (done.exit_code, done.stdout) == (0, f"{first.session} closed\n")
    for peer in (agent, connector):
        closed = await peer.expect(control.Closed, session=first.session)
        assert closed.reason is Reason.CLOSED_BY_PEER
    for end in ended:
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(end.reader.read(), WAIT_SECONDS)
    kept[0].writer.write(b"still")
    assert await asyncio.wait_for(kept[1].reader.readexactly(5), WAIT_SECONDS) == b"still"
    again = await seen.ztna("close", "--relay", seen.socket, first.session, "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (1, {first.session: False})


async def test_the_port_closes_nothing_and_wrong_usage_says_what_is_expected(
    seen: Seen, tmp_path: Path
) -> None:
    connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    by_port = await seen.ztna("close", "--relay", seen.port, opened.session)
    assert by_port.exit_code == 2 and "admin_socket" in by_port.stderr
    assert (await seen.ztna("close", "--relay", seen.socket, "xyz")).exit_code == 2
    gone = await seen.ztna("list", "--relay", str(tmp_path / "nobody.sock"))
    assert gone.exit_code == 1
    assert opened.session in seen.mesh.relay.sessions.sessions


async def test_the_configuration_says_where_the_relay_is(seen: Seen, tmp_path: Path) -> None:
    file = tmp_path / "relay.yaml"
    tls = "tls: {certificate: a, key: b, ca: c}"
    file.write_text(f"relay: {{name: edge, {tls}, admin: '{seen.port}'}}")
    assert (await seen.ztna("list", "--config", str(file), "--json")).stdout == "[]\n"
    file.write_text(f"relay: {{name: edge, {tls}, admin_socket: {seen.socket}}}")
    closed = await seen.ztna("close", "--config", str(file), "0" * 16)
    assert (closed.exit_code, "no open session" in closed.stdout) == (1, True)
    for wrong, told in (("log: {level: info}", "no section relay"), ("relay: {nme: edge}", "nme")):
        file.write_text(wrong)
        refused = await seen.ztna("list", "--config", str(file))
        assert (refused.exit_code, told in refused.stderr) == (2, True)


async def test_each_session_opened_denied_and_closed_is_one_line(seen: Seen) -> None:
    connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
    opened, _, _ = await agent.open_with(connector)
    ends = await spliced(seen.mesh, agent, connector, opened)
    agent.say(control.Open(2, ServiceName("not-granted")))
    await agent.expect(control.Denied)
    agent.say(control.Closed(opened.session, Reason.CLOSED_BY_PEER))
    await connector.expect(control.Closed)
    lines = await seen.audited(3)
    address = "{}:{}".format(*agent._dialling.socket.address)
    for line in lines:
        assert line.pop("time").endswith("Z") and line["agent"] == agent.name
        assert line["agent_address"] == address
    assert [line["event"] for line in lines] == ["session_opened", "session_denied", "session_closed"]
    assert lines[0]["fingerprint"] == agent.fingerprint and lines[0]["session"] == opened.session
    assert (lines[1]["service"], lines[1]["reason"]) == ("not-granted", "no_grant")
    closed = lines[2]
    assert (closed["reason"], closed["by"], closed["bytes"], closed["path"]) == (
        "closed_by_peer", agent.name, 5, "forwarded",
    )  # fmt: skip
    for end in ends:
        end.writer.close()


async def test_who_vanishes_is_audited_with_the_reason(seen: Seen) -> None:
    connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
    await agent.open_with(connector)
    connector.connection.close(0, "bye")
    lines = await seen.audited(2)
    assert (lines[1]["event"], lines[1]["reason"]) == ("session_closed", "closed_by_peer")
    assert lines[1]["by"] == connector.name


async def test_what_a_stopping_relay_leaves_is_audited_too(tmp_path: Path) -> None:
    async with running(tmp_path) as seen:
        connector, agent = await seen.mesh.connector(), await seen.mesh.agent()
        await agent.open_with(connector)
        await seen.mesh.relay.drain(0.05)
        lines = await seen.audited(2)
        assert (lines[1]["event"], lines[1]["reason"], lines[1]["by"]) == (
            "session_closed",
            "draining",
            "relay",
        )


async def test_opens_beyond_the_pace_are_all_told_by_few_lines_also_of_a_relay_that_ends(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as seen:
        agent = await seen.mesh.agent()
        for number in range(3_000):
            agent.say(control.Open(number, ServiceName(f"made-up-{number % 1_000}")))
        agent.say(control.Open(5_000, ServiceName("last")))
        await agent.expect(control.Denied, request=5_000)
        seen.mesh.relay.reports.close()
        lines = await seen.audited(1)
    assert {each["reason"] for each in lines} == {"no_grant", "limit_reached"}
    assert sum(each.get("count", 1) for each in lines) == 3_001
    assert len(lines) < 200
    assert all(each["agent"] == agent.name and each["agent_address"] for each in lines)


async def test_a_hostile_peer_cannot_fill_the_log(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    agent = await seen.mesh.agent()
    caplog.set_level("INFO", "relay")
    for number in range(200):
        agent.say(control.Dial(forged_session(number)))
        agent.say(control.Open(number, ServiceName("not-granted")))
    await agent.nothing_of(control.Closed)
    assert len(await seen.audited(2)) == 2, "one for each service"
    refused = [record for record in caplog.records if record.getMessage() == "refused"]
    assert len(refused) == 2, "one for each reason"
    seen.mesh.relay.reports.tick(asyncio.get_running_loop().time() + 60)
    flood = [each for each in await seen.audited(3) if each["service"] == "not-granted"]
    assert [each.get("count", 1) for each in flood] == [1, 199], "the audit log has them all"
    left_out = [record.fields for record in caplog.records if record.getMessage() == "lines_left_out"]  # type: ignore[attr-defined]
    assert sorted(each["count"] for each in left_out) == [199, 200]
