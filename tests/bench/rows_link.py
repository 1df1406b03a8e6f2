"""Datagrams over one QUIC connection, one way: our driver beside aioquic's own asyncio layer, both ends alike."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import Contender, Figures, Measure, Row, cpu_seconds
from tests.bench.rows_relay import Process
from tests.support.certificates import Pki

DATAGRAMS = 60_000
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


@contextlib.contextmanager
def pair(directory: Path, engine: str) -> Iterator[Measure]:
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
        yield lambda: once(sender, receiver)
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
