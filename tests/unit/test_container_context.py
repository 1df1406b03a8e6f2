"""What the image is built from: written whole, and the same for the same version."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.distribution import LOCK
from ztna.container import context
from ztna.errors import ZtnaError

NAMES = ("ztna/names.py", "relay/main.py", "ztna_mesh-0.1.0.dist-info/WHEEL")
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution as pip installs it, programs and caches included."""
    site = tmp_path / "site"
    info = site / "ztna_mesh-0.1.0.dist-info"
    more = ("../../bin/ztna", "ztna/__pycache__/names.pyc", f"{info.name}/INSTALLER", f"{info.name}/RECORD")
    info.mkdir(parents=True)
    for name in (*NAMES, *more):
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(WHEEL if path.name == "WHEEL" else name)
    (info / "METADATA").write_text("Name: ztna-mesh\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*NAMES, *more, f"{info.name}/METADATA")))
    distribution = metadata.PathDistribution(info)
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)
    return site


def test_the_installed_distribution_is_packed_again(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    wheel = context.pack_installed(tmp_path / "one")
    assert wheel.name == "ztna_mesh-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        record = "ztna_mesh-0.1.0.dist-info/RECORD"
        names = set(archive.namelist())
        assert names == {*NAMES, record, "ztna_mesh-0.1.0.dist-info/METADATA"}
        lines = archive.read(record).decode().splitlines()
        assert {line.split(",")[0] for line in lines} == names
        assert "ztna/names.py,sha256=" in "\n".join(lines)
    (tmp_path / "two").mkdir()
    assert context.pack_installed(tmp_path / "two").read_bytes() == wheel.read_bytes()


def test_an_editable_installation_cannot_be_packed(tmp_path: Path) -> None:
    """As the one that these tests run in."""
    with pytest.raises(ZtnaError, match=r"ztna-mesh is installed as editable.*`make dist`"):
        context.pack_installed(tmp_path)


def test_the_folder_has_all_that_is_needed_and_its_digest_is_of_that(installed: Path, tmp_path: Path) -> None:
    digest = context.write(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "Dockerfile",
        "run.txt",
        "wheels",
        "ztna_mesh-0.1.0-py3-none-any.whl",
    }
    assert (tmp_path / "one/run.txt").read_bytes() == LOCK.read_bytes()
    assert context.write(tmp_path / "two") == digest
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "click-8.0-py3-none-any.whl").write_text("click")
    (wheels / "notes.txt").write_text("no wheel")
    assert context.write(tmp_path / "three", wheels=wheels) != digest
    assert [path.name for path in (tmp_path / "three/wheels").iterdir()] == ["click-8.0-py3-none-any.whl"]


def test_a_folder_with_something_in_it_is_left_alone(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(ZtnaError, match="is not empty; name a new folder"):
        context.write(installed)
