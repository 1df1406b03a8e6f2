"""`ztna.testing` as others have it: from an installed wheel, in an environment with nothing but the extra."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID

from tests.support import docker
from tests.support.distribution import ROOT, locked_wheels, run, wheels_for_testing
from tests.support.pages import blocks
from ztna.errors import BadName
from ztna.testing import MeshContainers, MeshNotReady, NoDockerEngine

pytestmark = [pytest.mark.docker, pytest.mark.slow]

PAGE = ROOT / "docs/testing.md"
BACKENDS = ROOT / "tests/support/backends.py"
KINDS = ["ps", "--all"], ["volume", "ls"], ["network", "ls"]
RUN_EXAMPLE = """
import unittest
from testcontainers.core.labels import SESSION_ID
print(SESSION_ID, flush=True)
unittest.main("test_orders", argv=["example", "-v"])
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[str | None]:
    with docker.required_engine() as host:
        yield host


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return docker.our_wheel(tmp_path_factory.mktemp("wheel") / "built")


@pytest.fixture(scope="module")
def make(engine: str | None, wheel: Path) -> Callable[[], MeshContainers]:
    """Make a mesh of these sources, where no registry and no index is asked."""
    base = docker.base_image(engine)
    return lambda: MeshContainers(base=base, wheel=wheel, wheels=locked_wheels())


def there(engine: str | None, session: str) -> list[int]:
    """Return how many containers, volumes and networks of a process' testcontainers the engine has."""
    told = ("--quiet", "--filter", f"label={LABEL_SESSION_ID}={session}")
    return [len(docker.docker(engine, *words, *told).split()) for words in KINDS]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ZTNA_", "PYTHON"))}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | more


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment where the page's command was run, with folders for an index."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", place)
    folders = (wheel.parent, locked_wheels(), wheels_for_testing())
    variables = environment(
        PATH=f"{place / 'bin'}:{os.environ['PATH']}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=" ".join(map(str, folders)),
    )
    for (line,) in blocks(PAGE, "sh"):
        run("sh", "-c", line, environment=variables)
    return place / "bin/python"


def test_the_example_of_the_page_runs_from_an_installed_wheel(
    engine: str | None, installed: Path, tmp_path: Path
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "test_orders.py").write_text(example)
    variables = {"ZTNA_TESTING_BASE": docker.base_image(engine), "ZTNA_TESTING_WHEELS": str(locked_wheels())}
    done = subprocess.run(
        [installed, "-c", RUN_EXAMPLE],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "test_orders_are_served_by_name (test_orders.Orders.test_orders_are_served_by_name) ... ok"
        in done.stderr
    )
    assert there(engine, done.stdout.split()[0]) == [0, 0, 0]


def test_two_meshes_at_once_keep_to_themselves(
    make: Callable[[], MeshContainers], engine: str | None
) -> None:
    """Both have a service of the same name; each finds its own backend, over TCP and UDP, byte for byte."""
    with make() as one, make() as other, ExitStack() as backends:
        assert there(engine, SESSION_ID) == [10, 2, 2]
        for mesh, label in ((one, "one"), (other, "other")):
            backend = DockerContainer(mesh.image).with_network(mesh.network).with_network_aliases("backend")
            backend.with_volume_mapping(BACKENDS, "/backends.py")
            words = ["python3", "/backends.py", "--address", "0.0.0.0", "--label", label]
            backend.with_command([*words, "--tcp", "7000", "--udp", "7007"])
            backends.enter_context(backend)
            mesh.add("shell", "backend:7000", port=22)
            mesh.add("echo", "backend:7007", protocol="udp")
        for mesh, label in ((one, b"one"), (other, b"other")):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.settimeout(10)
                sender.connect(mesh.address("echo"))
                sender.send(b" hello")
                assert sender.recv(2048) == label + b" hello"
            sent = os.urandom(2 << 20)
            with socket.create_connection(mesh.address("shell"), 10) as shell:
                writer = threading.Thread(target=shell.sendall, args=(sent,))
                writer.start()
                with shell.makefile("rb") as back:
                    received = back.read(len(sent))
                writer.join()
            assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()
        assert one.address("shell") != other.address("shell")
        before_again = one.address("shell")
        one.add("shell", "backend:7000", port=23)
        assert one.address("shell") not in (before_again, one.address("echo"))
        with pytest.raises(BadName, match="nothing was not added to this mesh; there are shell, echo"):
            one.address("nothing")
        with pytest.raises(MeshNotReady, match=r"nothing\.ztna\.local has no address"):
            one.resolve("nothing")
    assert there(engine, SESSION_ID) == [0, 0, 0]
    with pytest.raises(MeshNotReady, match="use it within `with MeshContainers"):
        one.resolve("shell")


def test_what_does_not_come_up_is_named_and_removed(
    make: Callable[[], MeshContainers], engine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are not its own: the daemon's words are in the error, at once, as it ended."""
    monkeypatch.setattr("ztna.container.mesh_files.USER", 0)
    with pytest.raises(MeshNotReady, match=r"relay ended(.|\n)*relay\.key.*Permission denied"), make():
        pass
    assert there(engine, SESSION_ID) == [0, 0, 0]


def test_without_an_engine_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    told = rf"no Docker engine answers at unix://{tmp_path}/nothing\.sock: start Docker, or set DOCKER_HOST"
    with pytest.raises(NoDockerEngine, match=told), MeshContainers():
        pass


def test_without_the_extra_the_error_names_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "testcontainers.py").write_text("raise ImportError('No module named testcontainers')")
    script = "from ztna.testing import MeshContainers\nwith MeshContainers(): pass"
    done = subprocess.run(
        [installed, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ExtraMissing: No module named testcontainers: pip install 'ztna-mesh[testing]'" in done.stderr
