"""ztna.watching: files that change are noticed, whatever way they change."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ztna.watching import stamp, wait


def test_a_file_that_is_replaced_or_swapped_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert stamp(path) is None
    path.write_text("one")
    first = stamp(path)
    assert first == stamp(path)
    (tmp_path / "fresh").write_text("two")
    (tmp_path / "fresh").replace(path)
    assert stamp(path) not in (None, first)


async def test_waiting_ends_with_the_event_or_the_time() -> None:
    event = asyncio.Event()
    await wait(event, 0.01)
    event.set()
    await wait(event, 3600.0)
