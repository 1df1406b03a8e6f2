"""dnsd.shelf: the names on disk, whole or not at all, and nobody else's."""

from __future__ import annotations

from pathlib import Path

from dnsd.shelf import Shelf
from tests.support.dns import catalog, instance, lease, zone
from ztna.names import Zone

DOMAIN = Zone("ztna.local")
NAMES = zone(catalog(instance("web")), {"web": lease("10.100.1.2")})


def shelf(path: Path, domain: Zone = DOMAIN) -> Shelf:
    return Shelf(path / "names", domain)


async def test_names_are_kept_and_dated_in_place(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    assert kept.read(2e9) is None
    await kept.keep(NAMES, 1_700_000_000.0)
    first = (tmp_path / "names").stat()
    assert first.st_mode & 0o777 == 0o600
    await kept.keep(NAMES, 1_700_000_009.0)
    await kept.keep(NAMES.renumbered(8, 5), 1_700_000_009.0)
    read = shelf(tmp_path).read(2e9)
    assert read is not None
    assert (read.services, read.leases) == (NAMES.services, NAMES.leases)
    assert (read.serial, read.confirmed_at) == (7, 1_700_000_009.0)
    assert (tmp_path / "names").stat().st_ino == first.st_ino
    assert [each.name for each in tmp_path.iterdir()] == ["names"]


async def test_a_changed_zone_replaces_the_file(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    await kept.keep(NAMES, 1.0)
    await kept.keep(zone({}, {}), 2.0)
    read = shelf(tmp_path).read(2e9)
    assert read is not None
    assert (read.leases, read.confirmed_at) == ({}, 2.0)


async def test_names_of_the_future_are_no_younger_than_now(tmp_path: Path) -> None:
    await shelf(tmp_path).keep(NAMES, 1_700_000_000.0)
    read = shelf(tmp_path).read(1_600_000_000.0)
    assert read is not None
    assert read.confirmed_at == 1_600_000_000.0


async def test_what_cannot_be_trusted_is_left_alone_and_told(tmp_path: Path) -> None:
    await shelf(tmp_path).keep(NAMES, 1.0)
    file = tmp_path / "names"
    other = shelf(tmp_path, Zone("other.example"))
    assert other.read(2e9) is None
    assert "ztna.local" in str(other.trouble)
    file.chmod(0o620)
    writable = shelf(tmp_path)
    assert writable.read(2e9) is None
    assert "others" in str(writable.trouble)
    file.chmod(0o600)
    file.write_bytes(b"junk")
    junk = shelf(tmp_path)
    assert junk.read(2e9) is None
    assert junk.trouble is not None
    await junk.keep(NAMES, 1.0)
    assert junk.trouble is None
    assert shelf(tmp_path).read(2e9) is not None


async def test_a_disk_that_does_not_take_it_is_told_and_tried_again(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    kept = shelf(missing)
    await kept.keep(NAMES, 1.0)
    assert "No such file" in str(kept.trouble)
    await kept.keep(NAMES, 1.0)
    missing.mkdir()
    await kept.keep(NAMES, 1.0)
    assert kept.trouble is None
    assert shelf(missing).read(2e9) is not None


async def test_a_file_that_went_away_is_written_again(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    await kept.keep(NAMES, 1.0)
    (tmp_path / "names").unlink()
    await kept.keep(NAMES, 2.0)
    assert kept.trouble is not None
    await kept.keep(NAMES, 2.0)
    assert shelf(tmp_path).read(2e9) is not None


async def test_without_a_path_nothing_is_kept() -> None:
    kept = Shelf(None, DOMAIN)
    await kept.keep(NAMES, 1.0)
    assert kept.read(2.0) is None
    assert kept.trouble is None
