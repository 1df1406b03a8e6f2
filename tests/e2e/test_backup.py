"""docs/backup.md on a real Consul: what is kept comes back, with the same addresses, pins and rests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.support.consul import REAL_KINDS, note_version, require_binary
from tests.support.lab import CONSUL_PORT, Daemon, Lab, http_get, lab, tcp_route, until
from tests.support.pages import ROOT, blocks
from ztna.config import Endpoint
from ztna.leases import VIP_PREFIX, address_key, service_key
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.real_consul]

PAGE = ROOT / "docs/backup.md"
HTTP_PORT, MOVED, LATER, LATEST = 18080, "127.100.0.80", "127.100.0.81", "127.100.0.82"
MOVE = "ztna leases move web-app {} --force --config dnsd.yaml"
LOST, CHANGED = "consul kv delete -recurse ztna/", MOVE.format(LATER)
BACK_SECONDS = 15.0
"""A restored table is noticed by a watch at once, not only when its query has waited for 20 s; who asked while
Consul was busy asks again within 3 s."""
KEEPER_SECONDS = 30.0
"""A restored lock may be that of a session long gone: its holder is unseated after 10 s of silence."""


class Mesh:
    """A mesh with one service, which nobody restarts."""

    def __init__(self, made: Lab, kind: str) -> None:
        self.lab, self.host, self.kind = made, made.host("core"), kind
        made.start_consul(kind, acl=False)
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
        (programs / "consul").symlink_to(require_binary(kind))
        self.environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CONSUL_HTTP_ADDR": f"http://{self.host.address}:{CONSUL_PORT}",
        }
        made.address("web-app")

    def move_and_pin(self) -> None:
        """Give the service an address that nothing but a backup knows."""
        self.type(MOVE.format(MOVED))
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

    def until_served_at(self, address: str, within_s: float = 40.0) -> None:
        """Wait until the name has the address, and answers there."""
        ends = time.monotonic() + within_s
        until(f"web-app is {address}", lambda: self.lab.address("web-app") == address, within_s)
        until("it answers", lambda: self._answers_at(address), ends - time.monotonic())

    def _answers_at(self, address: str) -> bool:
        try:
            return http_get(self.host, f"http://{address}:8080/")[0] == 200
        except OSError:
            return False

    def connectors_epoch(self) -> int:
        """Return the epoch of the lease that the connector goes by."""
        epoch: int = self.connector.status()["connector"]["services"]["web-app"]["lease"]["epoch"]
        return epoch

    def keepers_addresses(self) -> list[str]:
        """Return what the keeper has leased, as it believes; nothing while there is none."""
        holdings = self.dnsd.status()["leases"]["holdings"]
        return [each["ip"] for each in holdings if each["state"] == "leased"]

    def leases(self) -> dict[str, Any]:
        """Return the table as it is in the KV, without the keeper's heartbeat."""
        return {key: value for key, value in self.lab.kv(VIP_PREFIX).items() if not key.endswith("/keeper")}


@pytest.fixture(scope="module", params=REAL_KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with lab("core") as made:
        yield Mesh(made, request.param)


@pytest.mark.parametrize(
    ("happening", "what"),
    [(LOST, "kv import"), (LOST, "snapshot restore"), (CHANGED, "snapshot restore")],
    ids=["lost-import", "lost-snapshot", "changed-snapshot"],
)
def test_what_was_kept_comes_back_and_is_served_at_once(
    mesh: Mesh, happening: str, what: str, request: pytest.FixtureRequest
) -> None:
    """Nobody is restarted: the connector goes by the older lease that came back, and by later ones after it."""
    note_version(request, mesh.kind)
    mesh.move_and_pin()
    (keep,) = blocks(PAGE, "sh", "Keep")
    for line in keep:
        assert mesh.type(line) or (mesh.lab.directory / "leases.json").stat().st_size
    kept = mesh.leases()
    assert kept[address_key(IPv4Address(MOVED))]["pinned"] is True
    assert b"PRIVATE KEY" not in (mesh.lab.directory / "leases.json").read_bytes()

    mesh.type(happening)
    (other,) = until(
        "the name has another address",
        lambda: [at for at in mesh.lab.dig("core", "web-app.ztna.local") if at != MOVED],
        40,
    )
    mesh.until_served_at(other)

    (restore,) = [block for block in blocks(PAGE, "sh", "Restore") if what in block[0]]
    for line in restore:
        assert mesh.type(line).strip()
    mesh.until_served_at(MOVED, BACK_SECONDS)
    assert {key: value for key, value in mesh.leases().items() if key in kept} == kept
    assert mesh.connectors_epoch() == kept[service_key(ServiceName("web-app"))]["epoch"]
    until("the keeper believes it", lambda: mesh.keepers_addresses() == [MOVED], KEEPER_SECONDS)

    mesh.type(MOVE.format(LATEST))
    mesh.until_served_at(LATEST, BACK_SECONDS)
