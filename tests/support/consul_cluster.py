"""Three real Consul servers on loopback that elect a leader, each of which may be killed and started again.

Ports and data folders are their own, and each is ended by its process id.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.consul import binary_version, free_ports, require_binary, server_argv
from ztna.config import ConsulConfig

SERVERS = 3
ELECTION_SECONDS = 60.0


class Server:
    """One of the servers; `raft` is how the others and `/v1/status/leader` call it."""

    def __init__(self, number: int, folder: Path, ports: tuple[int, int, int]) -> None:
        self.number = number
        self.folder = folder
        self.http, self.serf, self.server = ports
        self.address = f"http://127.0.0.1:{self.http}"
        self.raft = f"127.0.0.1:{self.server}"
        self.config = ConsulConfig(address=self.address)
        self.process: subprocess.Popen[bytes] | None = None

    def get(self, path: str) -> Any:
        """Return what it answers as JSON; None when it does not."""
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(self.address + path, timeout=5) as got,
        ):
            return json.load(got)
        return None

    def kill(self) -> None:
        """End it at once; a Consul keeps all that a majority has."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=15)
            self.process = None


class Cluster:
    """The servers, started and with a leader; `stop` ends all."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind = kind
        self._binary = require_binary(kind)
        self.version = binary_version(self._binary)
        ports = free_ports(3 * SERVERS)
        self.servers: list[Server] = []
        for number in range(SERVERS):
            home = folder / f"server-{number}"
            home.mkdir()
            mine = (ports[3 * number], ports[3 * number + 1], ports[3 * number + 2])
            self.servers.append(Server(number, home, mine))

    def start(self, server: Server | None = None) -> None:
        """Start one server, or all; returns at once."""
        for each in self.servers if server is None else (server,):
            argv = server_argv(
                self._binary,
                self._kind,
                each.folder / "data",
                bind="127.0.0.1",
                http=each.http,
                serf=each.serf,
                server=each.server,
                joins=[f"127.0.0.1:{other.serf}" for other in self.servers if other is not each],
                node=f"server-{each.number}",
            )
            with (each.folder / "log").open("ab") as log:
                each.process = subprocess.Popen(argv, stdout=log, stderr=log)

    def leader(self, *, other_than: Server | None = None) -> Server:
        """Wait until every server that runs knows the same leader, and that is not `other_than`."""
        end = time.monotonic() + ELECTION_SECONDS
        while True:
            alive = [each for each in self.servers if each.process is not None]
            named = {each.get("/v1/status/leader") for each in alive}
            found = [each for each in alive if each is not other_than and named == {each.raft}]
            if found:
                return found[0]
            assert time.monotonic() < end, f"no leader: {named}"
            time.sleep(0.05)  # processes of their own clocks

    def stop(self) -> None:
        """End all that run."""
        for each in self.servers:
            each.kill()
