"""The QUIC driver over real loopback sockets: who gets in, what is held back, what is bounded, how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicPacketType, pull_quic_header

from tests.support.certificates import Pki
from tests.support.hostile import HostileClient, HostileServer
from tests.support.quic import ALPN, DEADLINE_SECONDS, Dialling, Listening, settings
from ztna import quic, quic_connection, sources
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError, Refused
from ztna.identity import Identity, require_relay
from ztna.quic import DATAGRAM_QUEUE_MAX, Connection
from ztna.quic_connection import ROUND_TRIPS_WAITING_MAX
from ztna.quic_engine import BURST_PACKETS, LARGE_LOST_MAX, Engine, new_cid, reset_token
from ztna.quiet import INTERVAL_SECONDS
from ztna.reasons import Reason
from ztna.telemetry import DROPS, REFUSALS
from ztna.verdicts import Verdicts

CLIENT_DNS = ["agent.echo-service.ztna"]
SERVER_DNS = ["relay.relay-1.ztna"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def relay(pki: Pki) -> Credentials:
    return pki.credentials(pki.relay())


@pytest.fixture(scope="module")
def agent(pki: Pki) -> Credentials:
    return pki.credentials(pki.agent())


@pytest.fixture
async def serve(relay: Credentials) -> AsyncIterator[Callable[..., Listening]]:
    made: list[Listening] = []

    def start(
        credentials: Credentials = relay, more: dict[str, Any] | None = None, **changes: Any
    ) -> Listening:
        made.append(Listening(credentials, settings(**changes), **(more or {})))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
async def dial(agent: Credentials) -> AsyncIterator[Callable[..., Dialling]]:
    made: list[Dialling] = []

    def start(address: Any, more: dict[str, Any] | None = None, **changes: Any) -> Dialling:
        made.append(Dialling(address, agent, settings(**changes), **(more or {})))
        return made[-1]

    yield start
    for each in made:
        each.close()


def refusals(where: str, reason: Reason) -> float:
    return float(REFUSALS.labels(where, reason.value)._value.get())


def drops(where: str, why: str) -> float:
    return float(DROPS.labels(where, why)._value.get())


async def soon(holds: Callable[[], Any]) -> None:
    """Wait until something that nobody announces holds."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


# Who gets in


async def test_both_ends_know_each_other_and_talk(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True}, retry=True)
    client = dial(server.address)
    mine = await client.connect()
    assert mine.connection.identity.relay == "relay-1"
    assert mine.connection.alpn == ALPN
    (theirs,) = server.server.connections
    assert theirs.identity.name == "spiffe://ztna/agent-1"
    assert theirs.peer_address == client.socket.address
    assert server.server.half_open == 0
    # 1350 bytes of UDP payload and CIDs of 20 bytes: protocol.md says 1306.
    assert mine.connection.datagram_limit == theirs.datagram_limit == 1306
    assert mine.connection.send_datagram(b"d" * 1306)
    stream = mine.connection.open_stream()
    assert mine.connection.send_stream(stream, b"s" * 100_000, end=True)
    one_way = mine.connection.open_stream(unidirectional=True)
    assert (stream, one_way) == (0, 2)
    await mine.until(lambda: mine.datagrams and stream in mine.ended_streams)
    assert mine.datagrams == [b"d" * 1306]
    assert mine.streams[stream] == b"s" * 100_000


async def test_a_ping_of_ones_own_tells_the_round_trip(serve: Any, dial: Any) -> None:
    server = serve()
    client = dial(server.address)
    connection = (await client.connect()).connection
    taken = await asyncio.gather(*(connection.round_trip() for _ in range(3)))
    assert all(0 < each < DEADLINE_SECONDS for each in taken)
    # As many as may wait at once, for a peer that says nothing more: refused, and failed when the connection ends.
    server.socket.close()
    waiting = [asyncio.create_task(connection.round_trip()) for _ in range(ROUND_TRIPS_WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(LinkError, match="too many"):
        await connection.round_trip()
    client.client.close()
    for each in waiting:
        with pytest.raises(LinkError, match="ended"):
            await each
    with pytest.raises(LinkError, match="closed"):
        await connection.round_trip()


async def close_of(server: Listening, presented: Any, **early: Any) -> tuple[int, int | None, str]:
    async with HostileClient(server.address, ALPN, presented, **early) as hostile:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await hostile.closed


@pytest.mark.parametrize("name", list(Pki.BAD_NAMES["client"]))
@pytest.mark.parametrize("retry", [False, True], ids=["", "retry"])
async def test_a_bad_client_is_refused_and_nothing_it_sent_is_acted_on(
    pki: Pki, serve: Any, name: str, retry: bool
) -> None:
    where = f"bad-client-{name}-{retry}"
    server = serve(where=where, retry=retry)
    bad = pki.bad(CLIENT_DNS, "client")[name]
    early = {"datagrams": [b"\x10\x0cecho-service"], "streams": {0: b"registration"}}
    code, frame_type, phrase = await close_of(server, bad.presented, **early)
    assert frame_type is not None, "a transport close"
    if bad.reason is Reason.NO_CERTIFICATE:
        assert (code, phrase) == (0x01, "client cert required")
    elif bad.reason is Reason.UNTRUSTED:
        assert (code, phrase) == (0x130, "untrusted")
    else:
        assert code == 0x01
        assert phrase.startswith(f"{bad.reason}: ")
    assert server.handlers == []
    assert server.server.connections == ()
    await soon(lambda: server.server.half_open == 0)
    assert refusals(where, bad.reason) == 1


async def test_data_in_the_flight_of_the_finished_is_acted_on_once_the_identity_stands(
    pki: Pki, serve: Any
) -> None:
    server = serve()
    good = pki.signed(dns=CLIENT_DNS)
    async with HostileClient(
        server.address, ALPN, good, datagrams=[b"early"], streams={0: b"early too"}
    ) as client:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await client.confirmed
        (handler,) = server.handlers
        await handler.until(lambda: handler.datagrams and 0 in handler.streams)
    assert handler.datagrams == [b"early"]


async def test_without_the_holding_the_same_flight_would_be_acted_on(
    monkeypatch: pytest.MonkeyPatch, pki: Pki, serve: Any
) -> None:
    """Takes the check out from before the keys: proves that the test above it can fail."""
    server = serve()
    rogue = pki.bad(CLIENT_DNS, "client")["rogue_ca"].presented
    monkeypatch.setattr(Engine, "_require_identity", lambda engine: None)
    monkeypatch.setattr(
        quic._Endpoint, "established", lambda endpoint, connection: endpoint._factory(connection)
    )
    monkeypatch.setattr(Connection, "identity", server.server.credentials.identity, raising=False)
    async with HostileClient(server.address, ALPN, rogue, datagrams=[b"leak"], streams={0: b"leak"}):
        await soon(lambda: server.handlers)
        (handler,) = server.handlers
        await handler.until(lambda: handler.datagrams and handler.streams)
    assert handler.datagrams == [b"leak"]


@pytest.mark.parametrize("name", list(Pki.BAD_NAMES["server"]))
async def test_a_bad_server_is_refused_before_the_client_shows_itself(pki: Pki, dial: Any, name: str) -> None:
    bad = pki.bad(SERVER_DNS, "server")[name]
    assert bad.presented is not None
    async with HostileServer(ALPN, bad.presented, datagrams=[b"early"]) as server:
        client = dial(server.address)
        with pytest.raises(IdentityError) as caught:
            await client.client.connect(DEADLINE_SECONDS)
        assert caught.value.reason is bad.reason
        assert client.handlers == []
        async with asyncio.timeout(DEADLINE_SECONDS):
            code, _, _ = await server.closed
        assert code == (0x130 if bad.reason is Reason.UNTRUSTED else 0x01)
        assert not server.client_chain_shown


async def test_a_good_hostile_server_may_send_early(pki: Pki, dial: Any) -> None:
    """The counterpart of the test above: what it sends early does arrive when its chain is good."""
    async with HostileServer(ALPN, pki.signed(dns=SERVER_DNS), datagrams=[b"early"]) as server:
        handler = await dial(server.address).connect()
        await handler.until(lambda: handler.datagrams)
        assert server.client_chain_shown


async def test_the_server_must_be_the_one_that_was_meant(dial: Any, serve: Any) -> None:
    server = serve()
    client = dial(server.address, more={"check": lambda identity: require_relay(identity, "another")})
    with pytest.raises(IdentityError) as caught:
        await client.client.connect(DEADLINE_SECONDS)
    assert caught.value.reason is Reason.NO_GRANT
    await soon(lambda: server.server.connections == () and server.server.half_open == 0)
    assert server.handlers == []


async def test_who_verified_may_still_not_be_admitted_here(dial: Any, serve: Any) -> None:
    def admit(identity: Identity, alpn: str) -> None:
        raise Refused(Reason.NO_GRANT, f"{identity.name} is no connector")

    server = serve(more={"admit": admit})
    with pytest.raises(LinkError, match="no_grant: spiffe://ztna/agent-1 is no connector"):
        await dial(server.address).connect()
    assert server.handlers == []


async def test_who_is_refused_again_and_again_does_not_fill_the_log(
    dial: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def admit(identity: Identity, alpn: str) -> None:
        raise Refused(Reason.NO_GRANT, f"{identity.name} is no connector")

    caplog.set_level("INFO", "ztna.quic")
    server = serve(more={"admit": admit, "clock": (clock := Later())})
    for _ in range(3):
        with pytest.raises(LinkError):
            await dial(server.address).connect()
    await soon(lambda: server.server.connections == ())
    refused = [each for each in caplog.records if each.getMessage() == "connection_refused"]
    assert len(refused) == 1
    clock.by = 2 * INTERVAL_SECONDS
    server.server.tell_left_out()
    (left_out,) = [each.fields for each in caplog.records if each.getMessage() == "lines_left_out"]  # type: ignore[attr-defined]
    assert left_out["count"] == 2 and "no_grant" in left_out["about"]


async def test_what_a_peer_gives_as_its_reason_makes_no_lines(
    dial: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ztna.quic")
    server = serve()
    for number in range(3):
        client = dial(server.address)
        await client.connect()
        client.client.close(0, f"a reason of my own: {number}")
    await soon(lambda: len(server.server._buried) == 3)
    ended = [
        each.fields  # type: ignore[attr-defined]
        for each in caplog.records
        if each.getMessage() == "connection_ended" and "of my own" in str(each.fields)  # type: ignore[attr-defined]
    ]
    assert [each["reason"] for each in ended if each["peer"] == "spiffe://ztna/agent-1"] == [
        "a reason of my own: 0"
    ]


class Later:
    """A clock that can be put forward."""

    by = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.by


async def test_another_alpn_is_refused(dial: Any, serve: Any) -> None:
    server = serve()
    with pytest.raises(LinkError, match="ALPN"):
        await dial(server.address, alpn=("other",)).connect()


async def test_nobody_there_is_said_within_the_deadline(dial: Any) -> None:
    client = dial(("127.0.0.1", 9))
    with pytest.raises(LinkError, match="does not answer"):
        await client.client.connect(0.2)


async def test_no_ticket_is_ever_issued(pki: Pki, serve: Any) -> None:
    server = serve()
    tickets: list[Any] = []
    async with HostileClient(server.address, ALPN, pki.signed(dns=CLIENT_DNS)) as client:
        client.quic._session_ticket_handler = tickets.append
        client.quic.tls.new_session_ticket_cb = tickets.append
        async with asyncio.timeout(DEADLINE_SECONDS):
            await client.confirmed
        client.quic.send_datagram_frame(b"after")
        client.flush()
        (handler,) = server.handlers
        await handler.until(lambda: handler.datagrams)
    assert tickets == []


# Addresses, CIDs and resets


def test_our_cids_are_20_bytes_with_bit_0x40() -> None:
    cids = [new_cid() for _ in range(1000)]
    assert all(len(cid) == 20 and cid[0] >= 0x40 for cid in cids)
    assert len(set(cids)) == 1000
    assert reset_token(b"k", cids[0]) != reset_token(b"k", cids[1]) != reset_token(b"j", cids[1])


async def test_every_cid_handed_out_is_ours(serve: Any, dial: Any) -> None:
    server = serve(retry=True)
    await dial(server.address).connect()
    (connection,) = server.server.connections
    for cid in connection._engine.local_cids:
        assert len(cid) == 20 and cid[0] >= 0x40
    tokens = {each.cid: each.stateless_reset_token for each in connection._engine._host_cids}
    assert tokens == {cid: reset_token(b"k" * 32, cid) for cid in tokens}


async def test_a_restarted_server_resets_old_connections_at_once(serve: Any, dial: Any, relay: Any) -> None:
    server = serve()
    client = dial(server.address)
    handler = await client.connect()
    address = server.address
    # As after kill -9: no close is sent.
    server.socket.close()
    again = serve(more={"address": address}, where="restarted")
    handler.connection.send_datagram(b"x" * 100)
    async with asyncio.timeout(2):
        assert await handler.connection.closed == (0, "stateless reset")
    assert handler.closed == (0, "stateless reset")
    assert drops("restarted", "unknown_cid") == 1
    assert again.handlers == []


async def test_resets_are_smaller_than_what_they_answer_and_rate_limited(serve: Any) -> None:
    server = serve(more={"clock": lambda: 1000.0})
    sent: list[bytes] = []
    server.server._path = type("Path", (), {"send": lambda _, batch: sent.extend(d for d, _ in batch)})()
    for size in (20, 21, 22, 41, 42, 1200):
        server.server.packets_received([(b"\x40" + b"c" * (size - 1), ("127.0.0.1", 1))])
    assert [len(each) for each in sent] == [21, 40, 41, 42]
    assert all(each[-16:] == reset_token(b"k" * 32, b"c" * 20) and 0x40 <= each[0] < 0x80 for each in sent)
    server.server.packets_received([(b"\x40" + b"c" * 100, ("127.0.0.1", 1))] * 1000)
    assert len(sent) == quic.RESETS_PER_SECOND


async def test_a_forged_reset_changes_nothing(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True})
    client = dial(server.address)
    handler = await client.connect()
    client.client.packets_received([(b"\x40" + b"x" * 60, server.address)])
    handler.connection.send_datagram(b"still here")
    await handler.until(lambda: handler.datagrams)


async def test_a_peer_that_moved_is_followed(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True})
    client = dial(server.address)
    mine = await client.connect()
    (theirs,) = server.handlers
    client.move()
    mine.connection.send_datagram(b"from elsewhere")
    await theirs.until(lambda: theirs.addresses)
    assert theirs.addresses == [client.socket.address] == [theirs.connection.peer_address]
    mine.connection.send_datagram(b"and again")
    await mine.until(lambda: b"and again" in mine.datagrams)


async def test_an_unknown_version_is_offered_ours(serve: Any) -> None:
    server = serve()
    sent: list[bytes] = []
    server.server._path = type("Path", (), {"send": lambda _, batch: sent.extend(d for d, _ in batch)})()
    packet = bytes.fromhex("c0 0a0a0a0a 08") + b"d" * 8 + b"\x08" + b"s" * 8 + bytes(1200)
    server.server.packets_received([(packet, ("127.0.0.1", 1)), (packet[:100], ("127.0.0.1", 1))])
    assert len(sent) == 1
    assert sent[0][1:] == bytes(4) + b"\x08" + b"s" * 8 + b"\x08" + b"d" * 8 + bytes.fromhex("00000001")
    # An offer is never answered with another.
    server.server.packets_received([(sent[0] + bytes(1200), ("127.0.0.1", 1))])
    assert len(sent) == 1


# Retry and half-open handshakes


class Initials:
    """A path that keeps what a client would send first."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, packets: Sequence[tuple[bytes, Any]]) -> None:
        self.sent += [data for data, _ in packets]


async def first_packet(agent: Credentials) -> bytes:
    path = Initials()
    client = quic.Client(
        path,
        ("127.0.0.1", 1),
        "x",
        agent,
        settings(),
        check=lambda _: None,
        factory=lambda _: None,  # type: ignore[arg-type, return-value]
    )
    task = asyncio.ensure_future(client.connect(DEADLINE_SECONDS))
    await soon(lambda: path.sent)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return path.sent[0]


async def test_a_retry_token_is_bound_to_address_cid_and_time(serve: Any, agent: Credentials) -> None:
    clock = [1000.0]
    server = serve(retry=True, where="retry", more={"clock": lambda: clock[0]})
    sent = Initials()
    server.server._path = sent
    here, elsewhere = ("127.0.0.1", 1111), ("127.0.0.1", 2222)
    initial = await first_packet(agent)
    server.server.packets_received([(initial, here)])
    retry = pull_quic_header(quic.Buffer(data=sent.sent[0]), 20)
    assert retry.packet_type is QuicPacketType.RETRY
    assert len(retry.source_cid) == 20 and retry.source_cid[0] >= 0x40
    assert server.server.half_open == 0

    connection = QuicConnection(configuration=server.server._configuration(is_client=True))
    connection.connect(here, 0.0)
    first = connection.datagrams_to_send(0.0)[0][0]
    server.server.packets_received([(first, here)])
    connection.receive_datagram(sent.sent[1], here, 0.0)
    (answer, _), *_ = connection.datagrams_to_send(0.0)
    server.server.packets_received([(answer, elsewhere)])
    assert drops("retry", "bad_retry_token") == 1
    clock[0] += 61
    server.server.packets_received([(answer, here)])
    assert drops("retry", "bad_retry_token") == 2
    clock[0] -= 55
    server.server.packets_received([(answer, here)])
    assert server.server.half_open == 1


async def test_half_open_handshakes_are_capped_and_end(
    serve: Any, agent: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PROOF_SHARE", 0)
    clock = [1000.0]
    server = serve(half_open_max=3, where="half-open", more={"clock": lambda: clock[0]})
    for _ in range(5):
        server.server.packets_received([(await first_packet(agent), ("127.0.0.1", 1))])
    assert server.server.half_open == 3
    assert refusals("half-open", Reason.LIMIT_REACHED) == 2
    clock[0] += quic_connection.HANDSHAKE_SECONDS + 1
    for connection in list(server.server._cids):
        connection._on_timer()
    server.server._flush()
    assert server.server.half_open == 0
    clock[0] += quic.CLOSED_KEPT_SECONDS + 1
    server.server._bury()
    assert server.server._routes == {} and server.server._cids == {}


# Bounds


async def test_too_large_a_datagram_is_refused_and_blocks_nothing(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True})
    mine = await dial(server.address, where="large").connect()
    assert not mine.connection.send_datagram(b"d" * (mine.connection.datagram_limit + 1))
    assert drops("large", "datagram_too_large") == 1
    assert mine.connection.send_datagram(b"next")
    await mine.until(lambda: mine.datagrams == [b"next"])


async def test_a_datagram_that_no_longer_fits_leaves_the_queue(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True})
    mine = await dial(server.address).connect()
    engine = mine.connection._engine
    engine.send_datagram_frame(b"d" * 1340)
    mine.connection.send_datagram(b"next")
    await mine.until(lambda: mine.datagrams == [b"next"])
    assert engine.oversized == 1


async def test_the_datagram_queue_drops_its_oldest(serve: Any, dial: Any) -> None:
    server = serve()
    mine = await dial(server.address, where="queue").connect()
    sent = [number.to_bytes(2, "big") * 600 for number in range(DATAGRAM_QUEUE_MAX + 5)]
    results = [mine.connection.send_datagram(each) for each in sent]
    assert results == [True] * DATAGRAM_QUEUE_MAX + [False] * 5
    assert drops("queue", "datagram_queue_full") == 5
    assert list(mine.connection._engine._datagrams_pending) == sent[5:]


async def test_a_window_grows_by_what_uses_it_and_by_nothing_else(serve: Any, dial: Any) -> None:
    """RFC 9002 7.8: one that was never filled says nothing of what the path carries."""
    mine = await dial(serve(more={"echo": True}).address).connect()
    control = mine.connection._engine._loss._cc
    before = control.congestion_window
    for number in range(100):
        # Small ones: an echo comes before the delayed ACK, so several are on their way at once.
        assert mine.connection.send_datagram(bytes(100))
        await mine.until(lambda number=number: len(mine.datagrams) == number + 1)
    assert control.congestion_window == before
    for _ in range(200):
        assert mine.connection.send_datagram(bytes(1200))
    await mine.until(lambda: len(mine.datagrams) == 300)
    assert control.congestion_window > 2 * before


async def test_a_fast_path_gets_bursts_and_not_one_packet_a_turn(serve: Any, dial: Any) -> None:
    server = serve(more={"echo": True})
    client = dial(server.address)
    mine = await client.connect()
    engine = mine.connection._engine
    engine._loss._cc.congestion_window = 100_000_000
    engine._loss._pacer.update_rate(100_000_000, 0.001)
    bursts: list[int] = []

    class Counting:
        def send(self, packets: Sequence[tuple[bytes, Any]]) -> None:
            bursts.append(len(packets))
            client.socket.send(packets)

    client.client._path = Counting()
    for _ in range(320):
        assert mine.connection.send_datagram(bytes(1200))
    await mine.until(lambda: len(mine.datagrams) == 320)
    assert sum(each >= BURST_PACKETS[1] for each in bursts) >= 320 // BURST_PACKETS[1] // 2


async def test_a_reader_that_stops_costs_one_window(serve: Any, dial: Any) -> None:
    window = 64 * 1024
    server = serve(stream_window=window, connection_window=4 * window)
    client = dial(server.address)
    mine = await client.connect()
    (theirs,) = server.handlers
    theirs.pause_at = 1
    stream = mine.connection.open_stream()
    total = 900 * 1024
    assert mine.connection.send_stream(stream, b"z" * total, end=True)
    engine = theirs.connection._engine
    await soon(lambda: engine.held_bytes.get(stream, 0) + len(theirs.streams.get(stream, b"")) >= window)
    # Other streams go on meanwhile.
    other = mine.connection.open_stream()
    mine.connection.send_stream(other, b"small", end=True)
    await theirs.until(lambda: other in theirs.ended_streams)
    held = engine.held_bytes[stream]
    assert held <= window
    assert engine._streams[stream].receiver.highest_offset <= len(theirs.streams[stream]) + window
    theirs.pause_at = None
    theirs.connection.resume_stream(stream)
    await theirs.until(lambda: stream in theirs.ended_streams)
    assert theirs.streams[stream] == b"z" * total
    assert engine.held_bytes == {}


async def test_gaps_never_widen_the_window(serve: Any, pki: Pki) -> None:
    """Much was read, then a gap: what is buffered behind the gap stays within one window."""
    window = 64 * 1024
    server = serve(stream_window=window, connection_window=4 * window)
    async with HostileClient(server.address, ALPN, pki.signed(dns=CLIENT_DNS)) as client:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await client.confirmed
        (handler,) = server.handlers
        client.quic.send_stream_data(0, b"a" * (20 * window))
        client.flush()
        await handler.until(lambda: len(handler.streams.get(0, b"")) == 20 * window)
        stream = handler.connection._engine._streams[0]
        assert stream.max_stream_data_local <= 21 * window
        assert handler.connection._engine._local_max_data.value <= 24 * window
        await soon(lambda: client.quic._streams[0].max_stream_data_remote <= 21 * window)


async def test_a_stream_buffers_no_more_than_its_bound(serve: Any, dial: Any) -> None:
    server = serve()
    mine = await dial(server.address, where="unsent").connect()
    stream = mine.connection.open_stream()
    assert not mine.connection.send_stream(stream, bytes(quic_connection.STREAM_UNSENT_BYTES_MAX + 1))
    assert mine.connection.send_stream(stream, bytes(quic_connection.STREAM_UNSENT_BYTES_MAX))
    assert not mine.connection.send_stream(stream, b"x")
    assert drops("unsent", "stream_buffer_full") == 2


async def test_a_larger_packet_is_used_once_the_path_carried_one(serve: Any, dial: Any) -> None:
    server = serve(udp_payload=1200, udp_payload_probe=1350)
    client = dial(server.address, udp_payload=1200)
    mine = await client.connect()
    assert mine.connection.datagram_limit == 1156
    (theirs,) = server.server.connections
    await soon(lambda: theirs.datagram_limit == 1306)
    assert mine.connection.datagram_limit == 1156
    theirs.restart_path()
    assert theirs.datagram_limit == 1156
    await soon(lambda: theirs.datagram_limit == 1306)
    assert theirs.send_datagram(b"d" * 1306)
    await mine.until(lambda: mine.datagrams)


async def test_a_path_that_loses_large_packets_keeps_small_ones(serve: Any, dial: Any) -> None:
    server = serve(udp_payload=1200, udp_payload_probe=1350, ping_interval_s=0.05)
    lost: list[bytes] = []

    class Narrow:
        def send(self, packets: Sequence[tuple[bytes, Any]]) -> None:
            lost.extend(data for data, _ in packets if len(data) > 1200)
            server.socket.send([each for each in packets if len(each[0]) <= 1200])

    server.server._path = Narrow()
    mine = await dial(server.address, udp_payload=1200).connect()
    (theirs,) = server.server.connections
    await soon(lambda: len(lost) == quic_connection.PAYLOAD_PROBES)
    assert {len(each) for each in lost} == {1350}
    assert theirs.datagram_limit == 1156
    assert theirs.send_datagram(b"d" * 1156)
    await mine.until(lambda: mine.datagrams)


async def test_a_path_that_begins_to_swallow_large_packets_gets_small_ones_and_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, serve: Any, dial: Any
) -> None:
    """RFC 8899 4.3: nothing says that they are too large, they only do not arrive."""
    monkeypatch.setattr(quic_connection, "PAYLOAD_RAISE_SECONDS", 0.2)
    server = serve(udp_payload=1200, udp_payload_probe=1350, ping_interval_s=0.05)
    swallowed: list[int] = []
    is_narrow = False

    class Shrinking:
        def send(self, packets: Sequence[tuple[bytes, Any]]) -> None:
            large = [len(data) for data, _ in packets if len(data) > 1200 and is_narrow]
            swallowed.extend(large)
            server.socket.send([each for each in packets if len(each[0]) <= 1200 or not is_narrow])

    server.server._path = Shrinking()
    mine = await dial(server.address, udp_payload=1200).connect()
    (theirs,) = server.server.connections
    await soon(lambda: theirs.datagram_limit == 1306)
    is_narrow = True
    stream = theirs.open_stream(unidirectional=True)
    assert theirs.send_stream(stream, bytes(200_000), end=True)
    await mine.until(lambda: stream in mine.ended_streams)
    assert len(mine.streams[stream]) == 200_000
    assert theirs.datagram_limit == 1156
    assert len(swallowed) >= LARGE_LOST_MAX
    is_narrow = False
    await soon(lambda: theirs.datagram_limit == 1306)


async def test_a_path_that_was_dead_for_a_while_carries_large_packets_again_at_once(
    serve: Any, dial: Any
) -> None:
    """To who sends large packets it looked like one that swallows them; PAYLOAD_RAISE_SECONDS is far away."""
    server = serve(udp_payload=1200, udp_payload_probe=1350, ping_interval_s=0.05)
    is_dead = False
    lost: list[int] = []

    class Failing:
        def send(self, packets: Sequence[tuple[bytes, Any]]) -> None:
            if is_dead:
                lost.extend(len(data) for data, _ in packets)
            else:
                server.socket.send(packets)

    server.server._path = Failing()
    mine = await dial(server.address, udp_payload=1200, ping_interval_s=0.05).connect()
    (theirs,) = server.server.connections
    await soon(lambda: theirs.datagram_limit == 1306)
    is_dead = True
    stream = theirs.open_stream(unidirectional=True)
    assert theirs.send_stream(stream, bytes(200_000), end=True)
    await soon(lambda: theirs.datagram_limit == 1156)
    lost.clear()
    await soon(lambda: len(lost) > 20)
    assert max(lost) <= 1200, "nothing is tried before the path is back, though the other end is heard"
    is_dead = False
    await soon(lambda: theirs.datagram_limit == 1306)
    await mine.until(lambda: stream in mine.ended_streams)
    assert len(mine.streams[stream]) == 200_000


async def test_what_breaks_the_engine_costs_that_peer_only(
    monkeypatch: pytest.MonkeyPatch, serve: Any, dial: Any
) -> None:
    server = serve(more={"echo": True}, where="engine")
    first, second, third = [await dial(server.address).connect() for _ in range(3)]
    broken_in, broken_out, _ = server.server.connections

    def broken(*_: Any) -> Any:
        raise AssertionError("what a peer provoked")

    monkeypatch.setattr(broken_in._engine, "receive_datagram", broken)
    first.connection.send_datagram(b"x")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert (await first.connection.closed)[0] == 0x01
    monkeypatch.setattr(broken_out._engine, "datagrams_to_send", broken)
    second.connection.send_datagram(b"x")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await broken_out.closed == (0x01, "engine failed")
    assert drops("engine", "malformed") == 2
    third.connection.send_datagram(b"still served")
    await third.until(lambda: third.datagrams)


async def test_many_that_have_something_to_do_share_the_loop(
    monkeypatch: pytest.MonkeyPatch, serve: Any, dial: Any
) -> None:
    monkeypatch.setattr(quic, "FLUSH_SLICE_SECONDS", 0.0)
    server = serve(more={"echo": True})
    handlers = [await dial(server.address).connect() for _ in range(3)]
    for connection in server.server.connections:
        connection.send_datagram(b"to all")
    for handler in handlers:
        await handler.until(lambda heard=handler: heard.datagrams)


async def test_only_a_genuine_packet_is_heard(serve: Any, dial: Any) -> None:
    server = serve()
    client = dial(server.address)
    mine = await client.connect()
    (theirs,) = server.server.connections
    heard = theirs.heard_at
    forged = b"\x40" + theirs._engine.local_cids[0] + bytes(60)
    server.server.packets_received([(forged, client.socket.address)])
    assert theirs.heard_at == heard
    mine.connection.send_datagram(b"x")
    await soon(lambda: theirs.heard_at > heard)


# How it ends


async def test_a_close_arrives_with_its_code_after_what_was_sent(serve: Any, dial: Any) -> None:
    server = serve()
    mine = await dial(server.address).connect()
    mine.connection.send_datagram(b"last words")
    mine.connection.close(0x02, "malformed: what was that")
    assert not mine.connection.is_open
    assert not mine.connection.send_datagram(b"too late")
    assert not mine.connection.send_stream(0, b"too late")
    (theirs,) = server.handlers
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await theirs.connection.closed == (2, "malformed: what was that")
        assert await mine.connection.closed == (2, "malformed: what was that")
    assert theirs.datagrams == [b"last words"]
    assert theirs.closed == mine.closed == (2, "malformed: what was that")
    assert server.server.connections == ()


async def test_drain_closes_everybody_and_lets_nobody_in(serve: Any, dial: Any) -> None:
    server = serve(where="drain")
    clients = [dial(server.address) for _ in range(3)]
    handlers = [await each.connect() for each in clients]
    await server.server.close_all()
    async with asyncio.timeout(DEADLINE_SECONDS):
        for handler in handlers:
            assert await handler.connection.closed == (0, "server shutting down")
    late = dial(server.address)
    with pytest.raises(LinkError):
        await late.client.connect(0.2)
    assert refusals("drain", Reason.DRAINING) >= 1


async def test_a_handler_that_calls_it_malformed_ends_the_connection(serve: Any, dial: Any) -> None:
    server = serve(where="handler")
    mine = await dial(server.address).connect()
    mine.connection.send_datagram(b"malformed")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await mine.connection.closed == (2, "no message of ours")
    assert refusals("handler", Reason.MALFORMED) == 1


@pytest.mark.parametrize("how", ["reset_stream", "stop_stream"])
async def test_a_reset_stream_is_a_protocol_error(serve: Any, dial: Any, how: str) -> None:
    server = serve(more={"echo": True})
    mine = await dial(server.address).connect()
    stream = mine.connection.open_stream()
    mine.connection.send_stream(stream, b"x")
    await mine.until(lambda: stream in mine.streams)
    getattr(mine.connection._engine, how)(stream, 7)
    mine.connection.send_datagram(b"now")
    async with asyncio.timeout(DEADLINE_SECONDS):
        code, reason = await mine.connection.closed
    assert code == 2 and "reset" in reason


async def test_an_expired_certificate_ends_its_live_connection(
    serve: Any, dial: Any, relay: Credentials, agent: Credentials
) -> None:
    moment = [datetime.now(UTC)]
    own = replace(relay, verdicts=Verdicts(relay.trust, lambda: moment[0]))
    server = serve(credentials=own, where="expiry")
    mine = await dial(server.address).connect()
    moment[0] = agent.identity.not_after + timedelta(seconds=1)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await mine.connection.closed == (1, "expired")
    assert refusals("expiry", Reason.EXPIRED) == 1


async def test_pings_keep_an_idle_connection(serve: Any, dial: Any) -> None:
    server = serve(idle_timeout_s=0.5, ping_interval_s=60)
    idle, lively = dial(server.address, ping_interval_s=60), dial(server.address, ping_interval_s=0.1)
    first, second = await idle.connect(), await lively.connect()
    async with asyncio.timeout(DEADLINE_SECONDS):
        _, reason = await first.connection.closed
    assert reason == "Idle timeout"
    started = time.monotonic()
    await soon(lambda: time.monotonic() > started + 0.7)
    assert second.connection.is_open


async def test_the_close_is_repeated_ever_more_rarely(serve: Any, dial: Any) -> None:
    server = serve()
    client = dial(server.address)
    mine = await client.connect()
    (theirs,) = server.handlers
    path = Initials()
    real, server.server._path = server.server._path, path
    theirs.connection.close(0, "bye")
    await soon(lambda: path.sent)
    farewell, said = path.sent[-1], len(path.sent)
    cid = theirs.connection._engine.local_cids[0]
    server.server.packets_received([(b"\x40" + cid + bytes(30), client.socket.address)] * 9)
    # After the 1st, 2nd, 4th and 8th packet, of which the client may have sent one itself.
    assert set(path.sent[said:]) == {farewell} and len(path.sent) - said in (3, 4)
    server.server._path = real
    assert mine.connection.is_open


async def test_credentials_can_be_renewed_under_live_connections(serve: Any, dial: Any, pki: Pki) -> None:
    server = serve()
    first = await dial(server.address).connect()
    server.server.use_credentials(pki.credentials(pki.relay("relay-2")))
    second = await dial(server.address).connect()
    assert first.connection.identity.relay == "relay-1" and first.connection.is_open
    assert second.connection.identity.relay == "relay-2"


async def test_a_client_connects_once(serve: Any, dial: Any) -> None:
    client = dial(serve().address)
    await client.connect()
    with pytest.raises(LinkError):
        await client.client.connect(1)
