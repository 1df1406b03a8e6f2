"""ztna.testing without an engine: what it says when a container of the mesh is gone, and its lock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError

from ztna import testing
from ztna.testing import MeshContainers, MeshNotReady


class Gone:
    """A container that has ended, as the engine tells of one."""

    name, status = "quiet_turing", "exited"

    def __init__(self, ports: dict[str, Any] | None = None) -> None:
        self.ports = ports or {}

    def get_wrapped_container(self) -> Gone:
        return self

    def get_container_host_ip(self) -> str:
        return "localhost"

    def reload(self) -> None:
        """Nothing is new."""

    def exec(self, argv: list[str]) -> None:
        raise APIError("409 Client Error: Conflict (container is not running)")


def mesh_with(**containers: Any) -> MeshContainers:
    mesh = MeshContainers()
    mesh.containers = containers
    return mesh


def test_a_dnsd_that_has_ended_is_named() -> None:
    with pytest.raises(MeshNotReady, match=r"dnsd does not answer for orders\.ztna\.local: .*it is exited"):
        mesh_with(dnsd=Gone()).resolve("orders")


def test_a_dnsd_that_does_not_answer_is_named() -> None:
    """By the port of nobody: 0 refuses each connection."""
    ports = {"5533/tcp": [{"HostIp": "::", "HostPort": "1"}, {"HostIp": "0.0.0.0", "HostPort": "0"}]}
    with pytest.raises(MeshNotReady, match="dnsd does not answer for orders"):
        mesh_with(dnsd=Gone(ports)).resolve("orders")


def test_a_connector_that_has_ended_is_named() -> None:
    with pytest.raises(MeshNotReady, match=r"connector: 409 .*container is not running"):
        mesh_with(connector=Gone()).add("orders", "orders-app:8080")


def test_what_was_begun_is_forgotten_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def start(mesh: MeshContainers) -> None:
        mesh._network, mesh.containers = object(), {"dnsd": Gone()}  # type: ignore[assignment, dict-item]
        mesh._open.callback(closed.append, mesh)
        raise MeshNotReady("relay ended")

    monkeypatch.setattr(MeshContainers, "_start", start)
    mesh = MeshContainers()
    with pytest.raises(MeshNotReady, match="relay ended"):
        mesh.__enter__()
    assert closed == [mesh] and mesh.containers == {}
    with pytest.raises(MeshNotReady, match="the mesh is not running"):
        _ = mesh.network


def test_the_lock_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where others may write, under a name that they can guess."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    mine.write_text("precious")
    link = tmp_path / f"ztna-testing-{os.getuid()}-key.lock"
    link.symlink_to(mine)
    with pytest.raises(OSError, match=r"ztna-testing-\d+-key\.lock"), testing._alone("key"):
        pass
    assert mine.read_text() == "precious"
    link.unlink()
    with testing._alone("key"):
        assert link.stat().st_mode & 0o777 == 0o600
