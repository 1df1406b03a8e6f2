"""Datagrams over one QUIC connection, one way: our driver beside aioquic's own asyncio layer, both ends alike.

And a stream of it, beside TLS through the relay: what TCP can have where a hole was punched for UDP.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.harness import Contender, Figures, Measure, Row, cpu_seconds
from tests.bench.link_process import PIECE_BYTES
from tests.bench.rows_relay import Process
from tests.bench.rows_tcp_relay import Relayed
from tests.support.certificates import Pki

DATAGRAMS = 60_000
PIECES = 1_500
SETTLE_SECONDS = 0.5
"""For what is still on its way."""


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    directory = directory / "link"
    directory.mkdir()
    return Row(
        "link, datagrams: 1,200 bytes, one way",
        "arrived per second >= 2.5 x aioquic's asyncio",
        [
            Contender("ztna.quic", lambda: pair(directory, "ours")),
            Contender("aioquic's asyncio", lambda: pair(directory, "aioquic")),
        ],
    )


def punched_row(directory: Path) -> Row:
    """Return the row of what TCP can have on a punched path; everything is written under `directory`."""
    directory = directory / "punched"
    directory.mkdir()
    return Row(
        "TCP where only UDP goes directly: through the relay, or on a QUIC stream between the ends",
        "tells what is the better default; of the stream it is what agent and connector could reach at best",
        [
            Contender("TLS through the relay, whole mesh", Relayed(directory / "relay").ours),
            Contender("QUIC stream, the carrier alone", lambda: pair(directory, "stream", stream)),
        ],
    )


def stream(sender: Process, receiver: Process) -> Figures:
    """Send PIECES, and wait until they have arrived."""
    started = time.monotonic()
    ends = {"agent": sender.pid, "connector": receiver.pid}
    cpu = {name: cpu_seconds([pid]) for name, pid in ends.items()}
    sender.say(str(PIECES))
    sender.line()
    size, wall = PIECES * PIECE_BYTES, time.monotonic() - started
    figures = {"MB/s x1": size / wall / 1e6}
    return figures | {
        f"{name} CPU s/GB x1": (cpu_seconds([pid]) - cpu[name]) / (size / 1e9) for name, pid in ends.items()
    }


@contextlib.contextmanager
def pair(
    directory: Path, engine: str, measure: Callable[[Process, Process], Figures] | None = None
) -> Iterator[Measure]:
    """Two processes with a connection between them."""
    own = directory / engine
    own.mkdir()
    pki = Pki(own)
    for name, tls in (("relay", pki.relay()), ("agent", pki.agent())):
        Path(tls.certificate).rename(own / f"{name}.pem")
        Path(tls.key).rename(own / f"{name}.key")
    program = "tests.bench.link_process"
    receiver = Process(own / "receiver.log", program, engine, "receive", str(own / "relay"))
    port = receiver.line().strip()
    sender = Process(own / "sender.log", program, engine, "send", str(own / "agent"), port)
    sender.line()
    try:
        yield lambda: (measure or once)(sender, receiver)
    finally:
        sender.end()
        receiver.end()


def once(sender: Process, receiver: Process) -> Figures:
    """Send DATAGRAMS and see what arrives."""
    before, started = receiver.ask("report")["arrived"], time.monotonic()
    cpu = [cpu_seconds([each.pid]) for each in (sender, receiver)]
    sender.say(str(DATAGRAMS))
    json.loads(sender.line())
    wall = time.monotonic() - started
    spent = [cpu_seconds([each.pid]) - earlier for each, earlier in zip((sender, receiver), cpu, strict=True)]
    time.sleep(SETTLE_SECONDS)
    arrived = receiver.ask("report")["arrived"] - before
    return {
        "arrived/s": arrived / wall,
        "arrived": arrived,
        "send, CPU us": spent[0] / DATAGRAMS * 1e6,
        "receive, CPU us": spent[1] / max(1, arrived) * 1e6,
    }
