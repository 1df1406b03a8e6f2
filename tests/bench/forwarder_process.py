"""The relay's UDP forwarder alone, with one link: `python -m tests.bench.forwarder_process PORT`.

The bind ids are 16 times `a` and `c`, the secrets 32 times the same: a load generator binds with them.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from relay.forwarder import Forwarder
from ztna.jsontypes import Secret
from ztna.udp_bulk import BulkSocket


async def main() -> None:
    """Forward until killed."""
    forwarder = Forwarder(BulkSocket.open(("127.0.0.1", int(sys.argv[1]))))
    forwarder.add_link("bench", (b"a" * 16, Secret(b"a" * 32)), (b"c" * 16, Secret(b"c" * 32)))
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
