"""sidecar.link.ways: by which relay's forwarder a link sends."""

from __future__ import annotations

import pytest

from sidecar.link.ways import Way, choose


def way(
    name: bytes, *, direct: bool = False, usable: bool = True, up: bool = True, preferred: bool = False
) -> Way:
    return Way(name, direct, usable, up, preferred)


@pytest.mark.parametrize(
    ("ways", "current", "chosen"),
    [
        ([], b"a", b"a"),
        ([way(b"a"), way(b"b")], b"b", b"b"),
        ([way(b"a"), way(b"b", preferred=True)], b"a", b"b"),
        ([way(b"a", up=False), way(b"b")], b"a", b"b"),
        ([way(b"a", up=False), way(b"b", usable=False)], b"a", b"a"),
        ([way(b"a", up=False), way(b"b", up=False)], b"b", b"b"),
        ([way(b"a"), way(b"b", direct=True, up=False)], b"a", b"b"),
        ([way(b"a", direct=True, up=False), way(b"b", preferred=True)], b"a", b"a"),
        ([way(b"a", direct=True), way(b"b", direct=True)], b"b", b"b"),
    ],
    ids=[
        "none",
        "it stays where it is as good",
        "the preferred relay",
        "away from a relay that is gone",
        "not to where nobody was heard",
        "nowhere better",
        "a direct path before all forwarders",
        "a direct path outlives its relay",
        "and is not left for another",
    ],
)
def test_choice(ways: list[Way], current: bytes, chosen: bytes) -> None:
    assert choose(ways, current) == chosen
    assert choose(ways[::-1], current) == chosen
