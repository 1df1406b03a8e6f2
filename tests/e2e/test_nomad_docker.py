"""Every job file of nomad/ by Nomad's docker driver, on a real engine, with the product's image: `make nomad` by it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import docker
from tests.support.consul import require_binary
from tests.support.lab import http_get, until
from tests.support.namespaces import LocalHost

pytestmark = [pytest.mark.docker, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SERVED_SECONDS = 180
END_SECONDS = 90.0
LOW_PORTS = 1 << 10
"""CAP_NET_BIND_SERVICE (linux/capability.h)."""


def test_the_whole_mesh_runs_in_containers_and_is_gone_at_the_end(tmp_path: Path) -> None:
    for kind in ("nomad", "newest"):
        require_binary(kind)
    place, folder = tmp_path / "image", tmp_path / "demo"
    place.mkdir()
    folder.mkdir()
    with docker.required_engine() as host:
        image, base = docker.our_image(host, place), docker.base_image(host)
        before = _containers(host)
        options = ["--driver", "docker", "--image", image, "--app-image", base]
        argv = [sys.executable, str(ROOT / "nomad" / "demo.py"), *options]
        output = folder / "printed"
        with output.open("wb") as printed:
            environment = os.environ | {"TMPDIR": str(folder)} | ({"DOCKER_HOST": host} if host else {})
            process = subprocess.Popen(argv, stdout=printed, stderr=printed, env=environment)
        try:
            until(
                "served",
                lambda: "Ctrl-C ends" in output.read_text() or process.poll() is not None,
                SERVED_SECONDS,
            )
            assert process.poll() is None, output.read_text()
            urls = re.findall(r"^  curl (\S+)$", output.read_text(), re.MULTILINE)
            assert len(urls) == 2
            for url in urls:
                assert http_get(LocalHost("here", "", "127.0.0.1"), url)[0] == 200
            started = _containers(host) - before
            assert len(started) == 7, "four daemons, an application with its connector, one without"
            for container in started:
                _assert_hardened(host, container, image)
            process.send_signal(signal.SIGINT)
            assert process.wait(END_SECONDS) == 0, output.read_text()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(END_SECONDS)
        assert _containers(host) <= before
        assert [path.name for path in folder.iterdir()] == ["printed"]


def _containers(host: str | None) -> set[str]:
    """Return Nomad's: other tests have theirs on the engine meanwhile."""
    mine = ("--filter", "label=com.hashicorp.nomad.alloc_id")
    return set(docker.docker(host, "ps", "--all", "--quiet", "--no-trunc", *mine).split())


def _assert_hardened(host: str | None, container: str, image: str) -> None:
    """A daemon's first process has no right but, an agent's, to low ports; applications are their images' own."""
    (made,) = json.loads(docker.docker(host, "inspect", container))
    if made["Config"]["Image"] != image:
        return
    status = docker.docker(host, "exec", container, "cat", "/proc/1/status")
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    allowed = LOW_PORTS if "agent" in made["Args"] else 0
    held = {name: int(told[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert held["CapBnd"] == allowed and set(held.values()) <= {0, allowed}, made["Args"]
    assert told["NoNewPrivs"] == "1" and made["HostConfig"]["ReadonlyRootfs"]
