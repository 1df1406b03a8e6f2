"""The disk with all that daemons write is full for a while: all goes on, is said, and is caught up with later."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.consul import note_version
from tests.support.lab import Daemon, until
from tests.support.load import HTTP_PORT, ROUTES, load, serve
from tests.support.namespaces import run
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

DISK_BYTES = 1 << 20
ZTNA = Path(sys.executable).with_name("ztna")
ADDED, REFUSED, LATER = "added", "refused", "later"


@dataclass
class Ground:
    mesh: Mesh
    disk: Path
    socket: Path

    def add(self, service: str) -> tuple[int, str]:
        """Return how `ztna services add` ended and what it said."""
        what = (service, "--port", "80", "--backend", f"127.0.0.1:{HTTP_PORT}", "--api", str(self.socket))
        done = subprocess.run(
            [str(ZTNA), "services", "add", *what], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    def kept(self) -> set[str]:
        """Return the services in the state file."""
        return {each["service"] for each in json.loads((self.disk / "services.json").read_text())["routes"]}

    def fill(self) -> Path:
        """Write a file until nothing more fits."""
        ballast = self.disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return ballast


@pytest.fixture
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    """A mesh whose daemons write to a small disk: names, services of the API, flow log, audit log."""
    note_version(request, "newest")
    disk, socket = tmp_path / "disk", tmp_path / "api.sock"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk))
    connector_keys = {
        "api": str(socket),
        "api_state": str(disk / "services.json"),
        "flow_log": str(disk / "flows.log"),
        "grants": [*(str(route.service) for route in ROUTES), ADDED, REFUSED, LATER],
    }
    try:
        with relayed_mesh(
            "newest",
            ROUTES,
            ("east",),
            dnsd_keys={"snapshot": str(disk / "names")},
            connector_keys=connector_keys,
            audit_log=str(disk / "audit.log"),
        ) as mesh:
            serve(mesh)
            yield Ground(mesh, disk, socket)
    finally:
        run("umount", "--lazy", str(disk))


def warning(daemon: Daemon, name: str) -> str:
    """Return what /readyz says of something, empty when it is well."""
    return str(json.loads(daemon.get("/readyz")[1])["warnings"].get(name, ""))


def test_all_goes_on_and_is_written_again_once_there_is_room(ground: Ground) -> None:
    mesh, dnsd, connector = ground.mesh, ground.mesh.dnsd, ground.mesh.connector
    code, said = ground.add(ADDED)
    assert code == 0, said
    until("the names are kept", lambda: (ground.disk / "names").exists())
    with load(mesh) as running:
        running.passes()
        ballast = ground.fill()
        code, said = ground.add(REFUSED)
        assert code != 0 and "No space left on device" in said and "nothing was changed" in said
        assert ground.kept() == {ADDED} and not (ground.disk / ".services.json.new").exists()
        with mesh.lab.registered("another"):  # so that there are other names to keep
            for daemon, name in ((dnsd, "snapshot"), (connector, "flow_log")):
                until(f"{name} is told of", lambda d=daemon, n=name: "No space left" in warning(d, n), 30)
            running.passes()
        lost = connector.metric("ztna_drops_total", why="disk")
        assert lost > 0, "lines that could not be written are counted"
        ballast.unlink()
        code, said = ground.add(LATER)
        assert code == 0, said
        assert ground.kept() == {ADDED, LATER}
        for daemon, name in ((dnsd, "snapshot"), (connector, "flow_log")):
            until(f"{name} is well", lambda d=daemon, n=name: not warning(d, n), 30)
        running.passes()
    *_, last = (ground.disk / "flows.log").read_text().splitlines()
    assert json.loads(last)["event"], "what was cut off by the full disk is ended before the next line"
    until("the later one is kept, too", lambda: LATER.encode() in (ground.disk / "names").read_bytes(), 20)
    assert sorted(each.name for each in ground.disk.iterdir()) == [
        "audit.log",
        "flows.log",
        "names",
        "services.json",
    ], "nothing half-written is left"
