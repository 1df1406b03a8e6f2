"""DNS on a unix socket, for programs of this host that must know who answers them: a relay, for one.

Framed as over TCP (RFC 7766). Who opens the socket is as one who asks from HOST; the answers and the bounds are
dnsd.server's.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from dnsd.server import Server
from ztna.listening import unix_socket
from ztna.telemetry import logger

MODE = 0o666
"""As on loopback, everybody of this host may ask; who may answer is decided by who may write to the directory."""
HOST = "127.0.0.1"
"""Who asks here is on this host: what dnsd.server does for loopback holds."""
ACCEPT_RETRY_SECONDS = 0.1

_log = logger(__name__)


async def run(path: Path, server: Server) -> None:
    """Answer until cancelled. Raises ConfigError for a path that cannot be had."""
    loop = asyncio.get_running_loop()
    with unix_socket(path, MODE, "dnsd.socket") as listener:
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                _log.warning("accept_failed", error=error)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            server.adopt(sock, HOST, b"")
