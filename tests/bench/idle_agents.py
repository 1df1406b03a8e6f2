"""Agents in one process that hold flows and say nothing on them: `python -m tests.bench.idle_agents`.

One line of input, a JSON list of `[configuration file, [[host, port], ...]]`, says which agents and whom their programs
call; once every flow was echoed the process prints `{"flows": n}` and holds them until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

import uvloop

import sidecar.agent.ranges
from sidecar.agent import daemon as agent
from tests.support.whole_mesh import Running
from ztna import config as configuration
from ztna.runtime import Daemon, raise_file_limit

AT_ONCE = 8
ECHO_SECONDS = 10.0
SERVED_SECONDS = 120.0
AGAIN_SECONDS = 0.5
HELLO = b"hello\n"


async def hold(host: str, port: int) -> asyncio.StreamWriter:
    """Return a flow that was echoed, trying for SERVED_SECONDS: a relay asks DNS for many names one after the other.

    Raises OSError.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + SERVED_SECONDS
    while True:
        try:
            async with asyncio.timeout(ECHO_SECONDS):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(HELLO)
                if await reader.readexactly(len(HELLO)) == HELLO:
                    return writer
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            if loop.time() > end:
                raise OSError(f"{host}:{port} does not echo: {error!r}") from None
        await asyncio.sleep(AGAIN_SECONDS)


async def begin(
    tasks: asyncio.TaskGroup, limit: asyncio.Semaphore, file: str, calls: list[tuple[str, int]]
) -> list[asyncio.StreamWriter]:
    """Start an agent and hold its flows."""
    async with limit:
        path = Path(file)
        daemon = Daemon(path.stem, configuration.load(path, {}, {}), tasks)
        await Running(daemon, agent.body).ready(SERVED_SECONDS)
        return [await hold(host, port) for host, port in calls]


async def main() -> None:
    """Do what the first line says until the input ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    agents = json.loads(await commands.readline())
    limit = asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        flows = await asyncio.gather(*(begin(tasks, limit, file, calls) for file, calls in agents))
        print(json.dumps({"flows": sum(map(len, flows))}), flush=True)
        await commands.read()
        # What the agents hold ends with the process: taking leave of each is not what is measured.
        os._exit(0)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    # Reading the routes of the one host that they share once for each of them is not what is measured.
    sidecar.agent.ranges.LOOK_SECONDS = 3600.0
    raise_file_limit()
    uvloop.run(main())
