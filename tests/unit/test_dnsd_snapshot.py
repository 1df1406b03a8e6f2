"""dnsd.snapshot: names to bytes and back, and nothing from bytes that are not whole."""

from __future__ import annotations

import pytest

from dnsd.snapshot import CONFIRMED_OFFSET, confirmed, decode, encode, entries
from tests.support.dns import catalog, instance, lease
from ztna.errors import ProtocolError
from ztna.leases import Port
from ztna.names import Zone

SERVICES = catalog(
    instance("web", "c1", status="warning", weight=7),
    instance("web", "c2", address="2001:db8::1"),
    instance("quarrel", "c1"),
    instance("quarrel", "c2", ports="tcp:1"),
    instance("Bad_Name"),
)
LEASES = {"web": lease("10.100.1.2", Port("udp", 53), epoch=42), "leaving": lease("10.100.1.3")}
WHOLE = encode(Zone("ztna.local"), 7, 1_700_000_000.9, entries(SERVICES, LEASES))


def test_names_come_back_as_they_were() -> None:
    read = decode(WHOLE)
    assert (read.domain, read.serial, read.confirmed_at) == ("ztna.local", 7, 1_700_000_000.0)
    assert read.services == SERVICES
    assert read.leases == LEASES


def test_no_names_are_names_too() -> None:
    read = decode(encode(Zone("ztna.local"), 1, 0.0, ()))
    assert (read.services, read.leases, read.confirmed_at) == ({}, {}, 0.0)


def test_the_time_can_be_moved_in_place() -> None:
    moved = bytearray(WHOLE)
    moved[CONFIRMED_OFFSET : CONFIRMED_OFFSET + 10] = confirmed(1_800_000_000.5)
    assert decode(bytes(moved)).confirmed_at == 1_800_000_000.0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ztna-names 2" + WHOLE[12:],
        WHOLE[:-1],
        WHOLE.replace(b"10.100.1.2", b"10.100.1.9"),
        WHOLE + b"{}\n",
        encode(Zone("ztna.local"), 1, 0.0, [b'{"name": 5}\n']),
        encode(Zone("ztna.local"), 1, 0.0, [b"\xff\n"]),
    ],
)
def test_what_is_not_whole_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)
