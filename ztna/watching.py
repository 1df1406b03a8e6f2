"""Notices that files changed: what is looked at is mtime, size and inode, through symlinks, so renames count.

Polling, not inotify: swapped directories, bind mounts and network file systems are noticed alike.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.5

Stamp = tuple[int, int, int] | None


def stamp(path: str | Path) -> Stamp:
    """Return what changes whenever the file does; None when it cannot be looked at."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, for so long at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
