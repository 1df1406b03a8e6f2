"""The relay's UDP forwarder alone, in a process: `python -m tests.support.forwarder_process HOST PORT FORWARDING`.

Reads one JSON command a line: {"add": KEY} (bind ids are 16 times the key's letter in lower and upper case, for
agent and connector; secrets 32 times the same), {"remove": KEY}, or {} for the status, which answers each. The first
may have {"limits": {...}, "workers": N, "element_s": SECONDS}. At the end of its input it ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvloop

from relay import kernel, ruleset
from relay.forwarder import Forwarder
from relay.links import Limits
from ztna.jsontypes import Secret
from ztna.udp_bulk import BulkSocket


def ticket(letter: str) -> tuple[bytes, Secret]:
    """Return the bind id and secret of a side: lower case is the agent, upper case the connector."""
    return letter.encode() * 16, Secret(letter.encode() * 32)


async def main() -> None:
    """Do what the lines say."""
    host, port, forwarding = sys.argv[1:]
    assert forwarding in ("user", "kernel", "auto")
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    forwarder: Forwarder | None = None
    while line := await lines.readline():
        command: dict[str, Any] = json.loads(line)
        if forwarder is None:
            if element_s := command.get("element_s"):
                ruleset.ELEMENT_SECONDS, kernel.REFRESH_SECONDS = element_s, element_s / 3
            limits = Limits(**command.get("limits", {}))
            workers = command.get("workers", 1)
            raw = BulkSocket.open((host, int(port)), reuse_port=workers > 1)
            forwarder = Forwarder(raw, limits, forwarding, workers)
        if key := command.get("add"):
            forwarder.add_link(key, ticket(key.lower()), ticket(key.upper()), command.get("peers"))
        if key := command.get("remove"):
            forwarder.remove_link(key)
        print(json.dumps(forwarder.status()), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
