"""The files of the mesh that ztna.testing runs: accepted by the daemons, and readable by their user alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from ztna import config as configuration
from ztna.container import mesh_files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the archive is unpacked."""
    place = tmp_path_factory.mktemp("mesh")
    with tarfile.open(fileobj=io.BytesIO(mesh_files.archive())) as tar:
        for each in tar.getmembers():
            assert (each.uid, each.gid) == (mesh_files.USER, mesh_files.USER)
            assert each.mode == (0o600 if each.name.endswith(".key") else 0o644)
        tar.extractall(place, filter="data")
    return place


@pytest.mark.parametrize("name", ["dnsd", "relay", "connector", "agent"])
def test_each_daemon_accepts_its_configuration(name: str, place: Path) -> None:
    section = getattr(configuration.load(place / f"{name}.yaml", {}, {}, name), name)
    if name != "dnsd":
        for path in (section.tls.certificate, section.tls.key, section.tls.ca):
            assert (place / Path(path).relative_to(mesh_files.PLACE)).exists()


def test_the_authoritys_key_is_not_among_them(place: Path) -> None:
    assert {path.stem for path in place.glob("*.key")} == {"relay", "connector", "agent"}
