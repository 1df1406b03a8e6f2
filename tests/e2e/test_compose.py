"""The compose file for a laptop: the commands of docs/containers.md, run as they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_docs import commands
from tests.support import docker
from tests.support.console import require_tools
from tests.support.consul import free_ports, require_binary
from tests.support.distribution import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.real_consul, pytest.mark.slow]

PAGE = ROOT / "docs/containers.md"
SECONDS = 180
CONSUL_IMAGE = "ztna-mesh-test-consul"
CONSUL_DOCKERFILE = 'ARG BASE\nFROM ${BASE}\nCOPY consul /bin/\nENTRYPOINT ["consul"]\n'
"""What is used of Consul's own image, which would have to be pulled: its command line is that of the program."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return what the commands run with: our images, and ports of this run."""
    require_tools("dig", "docker-compose")
    with docker.required_engine() as host:
        image = docker.our_image(host, tmp_path)
        place = tmp_path / "consul"
        place.mkdir()
        shutil.copy(require_binary("newest"), place / "consul")
        (place / "Dockerfile").write_text(CONSUL_DOCKERFILE)
        base = ("--build-arg", f"BASE={docker.base_image(host)}")
        docker.docker(host, "build", "--quiet", "--network", "none", "--tag", CONSUL_IMAGE, *base, str(place))
        consul, dns = free_ports(2)
        images = {"ZTNA_IMAGE": image, "CONSUL_IMAGE": CONSUL_IMAGE}
        project = {"COMPOSE_PROJECT_NAME": f"ztna-mesh-{os.getpid()}"}
        yield os.environ | images | project | {"CONSUL_PORT": str(consul), "DNS_PORT": str(dns)}


def test_the_page_works_from_top_to_bottom(environment: dict[str, str]) -> None:
    *lines, last = [here(line, environment) for line in commands(PAGE)]
    said = {}
    try:
        for line in lines:
            said[line] = run(line, environment)
        names = {line: name for name in ("ping", "urlopen", "dig") for line in lines if name in line}
        told = {name: said[line] for line, name in names.items()}
        assert "path" in told["ping"] or " ms" in told["ping"]
        assert told["urlopen"].strip() == "hello from behind the mesh"
        assert "laptop.connector.ztna.local." in told["dig"]
        compose = lines[0].removesuffix(" up --detach")
        with pytest.raises(AssertionError, match=r"Name or service not known|name resolution"):
            run(
                f"{compose} exec -T client python3 -c 'from socket import *; gethostbyname(\"web\")'",
                environment,
            )
    finally:
        run(last, environment)
    label = f"label=com.docker.compose.project={environment['COMPOSE_PROJECT_NAME']}"
    assert docker.docker(None, "ps", "--all", "--quiet", "--filter", label) == ""


def here(line: str, environment: dict[str, str]) -> str:
    """Return a command for this machine: Debian has compose as a program of its own, and the port is another."""
    return line.replace("docker compose", "docker-compose").replace(
        "-p 5533", f"-p {environment['DNS_PORT']}"
    )


def run(line: str, environment: dict[str, str]) -> str:
    """Run a line of the page and return what it printed; AssertionError when it failed."""
    done = subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout
