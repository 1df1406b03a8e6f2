"""The forwarder's UDP, in user space and in the kernel by the same tests: what passes, and until when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.links import BURST_BYTES_MIN, CHALLENGES_PER_SECOND
from tests.support.forwarding import QUIC, ForwarderProcess, Ground, LinkPeer, ground, passes, silent
from tests.support.lab import until
from ztna.wire import forwarder as wire

pytestmark = pytest.mark.namespaces
SENT_TO_BIND = 2
"""What each peer is sent by user space before it is bound: a challenge, and `bound`."""
STOP_SECONDS = 1.0
PACKET = b"\x40" + bytes(999)


@pytest.fixture(params=["user", "user-workers", "kernel", "kernel-ipv6"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    """User space with one worker and with three, and the kernel over both kinds of addresses."""
    forwarding, _, variant = request.param.partition("-")
    with ground(forwarding, tmp_path, 3 if variant == "workers" else 1, ipv6=variant == "ipv6") as made:
        yield made


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Ground]:
    with ground("kernel", tmp_path) as made:
        yield made


def table(place: Ground) -> str:
    return place.relay.run("nft", "list", "ruleset")


def tracked(place: Ground) -> str:
    """Return what conntrack knows of the forwarder."""
    done = place.relay.try_run("conntrack", "-L", "-p", "udp")
    return "".join(line for line in done.stdout.splitlines() if "4434" in line)


def links(process: ForwarderProcess) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = process.say()["links"]
    return shown


def test_packets_cross_and_are_counted_for_each_link(place: Ground) -> None:
    process = place.start()
    agent, connector = place.link(process, "a")
    other = place.link(process, "b")
    # A worker thread counts a packet a moment after it has sent it.
    bound = SENT_TO_BIND * len((agent, connector, *other))
    until("what binding took is counted", lambda: process.say()["sent"] >= bound)
    before = process.say()["sent"]
    for _ in range(5):
        assert passes(agent, connector, QUIC) and passes(connector, agent, b"\xc0long")
    assert passes(*other)
    in_kernel = place.forwarding == "kernel"

    def counts() -> list[list[tuple[int, int, bool]]]:
        return [
            [
                (side["packets"], side["bytes"], side["in_kernel"])
                for side in (link["agent"], link["connector"])
            ]
            for link in links(process)
        ]

    expected = [
        [(5, 5 * len(QUIC), in_kernel), (5, 25, in_kernel)],
        [(1, len(QUIC), in_kernel), (0, 0, in_kernel)],
    ]
    until("both are counted", lambda: counts() == expected)
    until("exactly these were sent", lambda: process.say()["sent"] - before == (0 if in_kernel else 11))
    assert not tracked(place)


def test_a_side_that_binds_from_elsewhere_moves(place: Ground) -> None:
    process = place.start()
    agent, connector = place.link(process, "a")
    assert passes(agent, connector)
    moved = place.peer(place.right, "a")
    seen = moved.bind()
    assert (seen.ip, seen.port) == moved.address
    assert passes(connector, moved) and passes(moved, connector)
    assert silent(agent, connector) and agent.receive() == []


def test_an_ended_link_stops_within_a_second_and_others_go_on(place: Ground) -> None:
    process = place.start()
    other = place.link(process, "z")
    took = []
    for key in "abc":
        agent, connector = place.link(process, key)
        assert passes(agent, connector) and passes(connector, agent)
        process.say(remove=key)
        ended = time.monotonic()
        while passes(agent, connector, seconds=0.05):
            pass
        took.append(time.monotonic() - ended)
        assert silent(agent, connector) and silent(connector, agent)
        assert passes(*other)
        assert not tracked(place)
        if place.forwarding == "kernel":
            assert " . ".join(map(str, agent.address)) not in table(place)
    # On a machine that does much else one may take longer.
    assert min(took) < STOP_SECONDS, took


def test_who_is_not_bound_gets_nothing(place: Ground) -> None:
    process = place.start()
    agent, connector = place.link(process, "a")
    stranger = place.peer(place.left, "a")
    stranger.send(QUIC, b"\0", b"", b"\xff" * 1200, wire.encode(wire.Bind(bytes(16), wire.NO_MAC)))
    stranger.send(wire.probe(b"k", bytes(12)), wire.encode(wire.Challenge(bytes(8))))
    assert stranger.receive() == [] and connector.receive(0) == []
    assert passes(agent, connector)


def test_a_spoofer_makes_the_forwarder_send_less_than_it_sends_itself(place: Ground) -> None:
    """Binds of a live id with a wrong mac, as if from a victim: few challenges, each smaller than the bind."""
    process = place.start()
    agent, connector = place.link(process, "a")
    victim = place.peer(place.right, "a")
    bind = wire.encode(wire.Bind(victim.bind_id, b"x" * 16))
    sent, got = 0, []
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        victim.send(*[bind] * 32)
        sent += 32
        got += victim.receive(0.02)
    assert 0 < len(got) <= 3 * CHALLENGES_PER_SECOND < sent
    assert all(len(each) < len(bind) and isinstance(wire.decode(each), wire.Challenge) for each in got)
    assert process.say()["drops"]["challenge_rate"] > 0
    assert passes(agent, connector), "the link it meant is as it was"


def blast(source: LinkPeer, target: LinkPeer, count: int) -> int:
    """Send so many packets of 1,000 bytes; return how many arrive."""
    arrived = 0
    for _ in range(count // 10):
        source.send(*[PACKET] * 10)
        while got := target.receive(0):
            arrived += len(got)
    while got := target.receive():
        arrived += len(got)
    return arrived


def test_a_links_rate_is_limited_and_the_next_link_is_not_touched(place: Ground) -> None:
    rate = 50_000
    process = place.start(limits={"rate_bytes_per_s": rate})
    agent, connector = place.link(process, "a")
    other = place.link(process, "b")
    started = time.monotonic()
    arrived = blast(agent, connector, 2_000) * len(PACKET)
    # The kernel counts headers too, and refills a burst as the user space's may be had twice.
    assert BURST_BYTES_MIN / 2 < arrived < 2 * BURST_BYTES_MIN + rate * (time.monotonic() - started + 1)
    assert passes(*other)
    until("it is counted", lambda: process.say()["drops"].get("link_rate", 0) > 500)
    until("it passes again", lambda: not silent(agent, connector, PACKET))


def test_a_quota_ends_what_two_peers_may_exchange_over_all_their_links(place: Ground) -> None:
    process = place.start(limits={"quota_bytes": 300_000, "quota_period_s": 10**9})
    agent, connector = place.link(process, "a", peers="ann and con-x")
    other = place.link(process, "b")
    arrived = 0

    def is_used_up() -> bool:
        nonlocal arrived
        arrived += blast(agent, connector, 50)
        return bool(process.say()["drops"].get("link_quota"))

    until("the quota is used up", is_used_up)
    assert arrived * len(PACKET) >= 290_000
    if place.forwarding == "user":
        assert arrived * len(PACKET) <= 300_000
    assert silent(agent, connector) and silent(connector, agent)
    process.say(remove="a")
    again = place.link(process, "c", peers="ann and con-x")
    assert silent(*again), "a new link is no new quota"
    assert passes(*other)


def test_killed_it_leaves_nothing_and_the_next_one_works(place: Ground) -> None:
    process = place.start()
    agent, connector = place.link(process, "a")
    assert passes(agent, connector)
    process.kill()
    until("nothing is left", lambda: "ztna" not in table(place))
    assert silent(agent, connector)
    process = place.start()
    process.say(add="a")
    assert silent(agent, connector)
    agent.bind()
    connector.bind()
    assert passes(agent, connector) and passes(connector, agent)


def test_what_is_in_use_outlives_its_timeout(kernel: Ground) -> None:
    process = kernel.start(element_s=4)
    pair = kernel.link(process, "a")
    before = process.say()["sent"]
    deadline = time.monotonic() + 9
    while time.monotonic() < deadline:
        assert passes(*pair)
    assert process.say()["sent"] == before, "user space passed nothing on"


def test_a_daemon_that_hangs_forwards_nothing_for_ever(kernel: Ground) -> None:
    process = kernel.start(element_s=2)
    pair = kernel.link(process, "a")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        until("the elements time out", lambda: silent(*pair))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    until("it mends the table", lambda: not silent(*pair))
    until("in the kernel again", lambda: links(process)[0]["agent"]["in_kernel"])


def test_a_firewall_that_drops_what_is_forwarded_is_noticed(kernel: Ground) -> None:
    process = kernel.start()
    pair = kernel.link(process, "a")
    kernel.relay.run(
        "nft", "add table ip wall; add chain ip wall f { type filter hook forward priority 0; policy drop; }"
    )

    def is_back() -> bool:
        blast(*pair, count=50)
        return not silent(*pair)

    until("user space forwards", is_back)
    shown = process.say()["forwarding"]
    assert shown["in_use"] == "user" and "firewall" in shown["why_user"]
    assert "ztna" not in table(kernel)


@pytest.mark.parametrize(
    ("missing", "why"),
    [("routing", "ip_forward is not 1"), ("capability", "not permitted")],
)
def test_it_falls_back_by_itself_and_says_why(kernel: Ground, missing: str, why: str) -> None:
    prefix: tuple[str, ...] = ()
    if missing == "routing":
        kernel.relay.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    else:
        prefix = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    process = kernel.start("user", prefix=prefix)
    assert why in process.say()["forwarding"]["why_user"]
    assert passes(*kernel.link(process, "a"))
