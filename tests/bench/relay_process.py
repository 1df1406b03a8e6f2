"""A relay in a process of its own that can say how long its loop stood still: `relay_process DIR`.

Prints one JSON line when it listens (address, chain and key of an agent), then answers each line of its input:
`watch` begins to watch the loop, `report` says how many connections there are and the longest block since.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import uvloop

from relay import admission
from tests.support.blocking import Blocking
from tests.support.relay import RunningRelay, running_relay
from ztna.config import LogConfig
from ztna.log_lines import configure

CONNECTIONS_MAX = 10_000


async def obey(mesh: RunningRelay, commands: asyncio.StreamReader) -> None:
    """Answer until the input ends."""
    tls = mesh.pki.agent("agent-crowd")
    say({"address": mesh.address, "certificate": tls.certificate, "key": tls.key})
    blocking = Blocking()
    while line := await commands.readline():
        if line == b"watch\n":
            blocking.stop()
            blocking = Blocking()
            say({})
        else:
            say(
                {
                    "connections": len(mesh.relay.server.connections),
                    "blocked_ms": blocking.longest_s * 1000,
                    "blocked_cpu_ms": blocking.longest_cpu_s * 1000,
                }
            )


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


async def main() -> None:
    """Run the relay until the input ends."""
    configure(LogConfig())
    admission.CONNECTIONS_PER_IDENTITY_MAX = CONNECTIONS_MAX
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    async with running_relay(Path(sys.argv[1])) as mesh:
        await obey(mesh, commands)


if __name__ == "__main__":
    uvloop.run(main())
