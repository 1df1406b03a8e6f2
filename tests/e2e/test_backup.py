"""docs/backup.md on a real Consul: what is kept comes back, with the same addresses, pins and rests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.support.consul import NEWEST, VERSIONS_TESTED, require_binary
from tests.support.lab import CONSUL_PORT, Daemon, Lab, http_get, lab, tcp_route, until
from tests.support.pages import ROOT, blocks
from ztna.config import Endpoint
from ztna.leases import VIP_PREFIX, address_key

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.real_consul]

PAGE = ROOT / "docs/backup.md"
HTTP_PORT, MOVED = 18080, "127.100.0.80"


class Mesh:
    """A mesh whose service has been moved and pinned, so that nothing but a backup knows its address."""

    def __init__(self, made: Lab) -> None:
        self.lab, self.host = made, made.host("core")
        made.start_consul("newest", acl=False)
        made.python("backend", self.host, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
        self.dnsd = made.dnsd()
        made.relay()
        self.connector: Daemon = made.connector(
            "alpha", [tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT))]
        )
        made.agent("laptop", ["web-app"])
        shutil.copytree(made.directory / "ca", made.directory / "ztna-ca")
        programs = made.directory / "bin"
        programs.mkdir()
        (programs / "consul").symlink_to(require_binary("newest"))
        self.environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CONSUL_HTTP_ADDR": f"http://{self.host.address}:{CONSUL_PORT}",
        }
        made.address("web-app")
        self.type(f"ztna leases move web-app {MOVED} --config dnsd.yaml")
        self.type("ztna leases pin web-app --config dnsd.yaml")
        self.until_served_at(MOVED)

    def type(self, line: str) -> str:
        """Run a line of the page in the lab's folder."""
        argv = [*self.host.prefix, "sh", "-c", line]
        done = subprocess.run(
            argv, cwd=self.lab.directory, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def until_served_at(self, address: str) -> None:
        """Wait until the name has the address, and answers there."""
        until(f"web-app is {address}", lambda: self.lab.address("web-app") == address, 40)
        until("it answers", lambda: http_get(self.host, f"http://{address}:8080/")[0] == 200, 40)

    def leases(self) -> dict[str, Any]:
        """Return the table as it is in the KV, without the keeper's heartbeat."""
        return {key: value for key, value in self.lab.kv(VIP_PREFIX).items() if not key.endswith("/keeper")}


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with lab("core") as made:
        yield Mesh(made)


@pytest.mark.parametrize("what", ["kv import", "snapshot restore"])
def test_what_was_kept_comes_back(
    mesh: Mesh, what: str, record_property: Callable[[str, object], None]
) -> None:
    record_property(VERSIONS_TESTED, NEWEST)
    (keep,) = blocks(PAGE, "sh", "Keep")
    for line in keep:
        assert mesh.type(line) or (mesh.lab.directory / "leases.json").stat().st_size
    kept = mesh.leases()
    assert kept[address_key(IPv4Address(MOVED))]["pinned"] is True
    assert b"PRIVATE KEY" not in (mesh.lab.directory / "leases.json").read_bytes()

    mesh.type("consul kv delete -recurse ztna/")
    other = until(
        "the keeper leases anew",
        lambda: [at for at in mesh.lab.dig("core", "web-app.ztna.local") if at != MOVED],
        40,
    )
    mesh.until_served_at(other[0])

    (restore,) = [block for block in blocks(PAGE, "sh", "Restore") if what in block[0]]
    for line in restore:
        assert mesh.type(line).strip()
    until("the name has its address again", lambda: mesh.lab.address("web-app") == MOVED, 40)
    assert {key: value for key, value in mesh.leases().items() if key in kept} == kept
    until("the connector goes by the later lease", lambda: _refused(mesh), 40)
    mesh.connector.restart()
    mesh.until_served_at(MOVED)


def _refused(mesh: Mesh) -> bool:
    """Say whether programs are refused at the address that was restored."""
    try:
        return http_get(mesh.host, f"http://{MOVED}:8080/")[0] != 200
    except OSError:
        return True
