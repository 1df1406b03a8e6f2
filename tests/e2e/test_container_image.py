"""The image: who it runs as, what it needs, how it ends, and what it is made of."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import docker
from tests.support.distribution import ROOT, locked_wheels, run
from tests.support.lab import until

pytestmark = [pytest.mark.docker, pytest.mark.slow]

HARDENED = ("--read-only", "--tmpfs", "/run", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
DNSD = ("ztna-dnsd", "--set", "consul.address=http://127.0.0.1:8500", "--set", "dnsd.listen=127.0.0.1:5533")
CONSUL = "python3 -m ztna.consul.embedded --listen 127.0.0.1:8500"
OWN_MB_MAX = 110
"""What the image may have beside its base: 80 MB, and room for the next releases of what it is made of."""
STOPPED_SECONDS = 9
"""`docker stop` sends SIGKILL after ten."""


class Container:
    """One container, removed at the end."""

    def __init__(
        self, host: str | None, image: str, *words: str, options: tuple[str, ...] = HARDENED
    ) -> None:
        self._host = host
        self.id = docker.docker(host, "run", "--detach", *options, image, *words).strip()

    def exec(self, *argv: str) -> str:
        return docker.docker(self._host, "exec", self.id, *argv)

    def inspect(self, format_: str) -> str:
        return docker.docker(self._host, "inspect", "--format", format_, self.id).strip()

    def docker(self, *argv: str) -> str:
        return docker.docker(self._host, *argv, self.id)

    def processes(self) -> list[tuple[str, str, str]]:
        """Return name, state and parent of each process: proc_pid_stat(5)."""
        script = "for each in /proc/[0-9]*/stat; do cat $each 2>/dev/null; done"
        rows = [line.rsplit(") ", 1) for line in self.exec("sh", "-c", script).splitlines()]
        return [(head.partition("(")[2], rest.split()[0], rest.split()[1]) for head, rest in rows]


@pytest.fixture(scope="module")
def engine() -> Iterator[str | None]:
    with docker.required_engine() as host:
        yield host


@pytest.fixture(scope="module")
def made(engine: str | None) -> Iterator[tuple[str, float]]:
    """The image that `make image` builds, without any network, and the size in MB that it says."""
    base, name = docker.base_image(engine), f"ztna-mesh-made-{os.getpid()}"
    words = [f"BASE={base}", f"WHEELS={locked_wheels()}", f"IMAGE={name}"]
    done = subprocess.run(
        ["make", "--no-print-directory", "image", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    image, _, size = done.stdout.splitlines()[-1].partition(": ")
    assert image == f"{name}:0.1.0" and size.endswith(" MB")
    yield image, float(size.removesuffix(" MB"))
    docker.docker(engine, "rmi", "--force", image)


@pytest.fixture(scope="module")
def image(made: tuple[str, float]) -> str:
    return made[0]


@pytest.fixture
def started(engine: str | None, image: str) -> Iterator[type[Container]]:
    """Make containers of the image."""
    made: list[Container] = []

    class Made(Container):
        def __init__(self, *words: str, options: tuple[str, ...] = HARDENED) -> None:
            super().__init__(engine, image, *words, options=options)
            made.append(self)

    yield Made  # type: ignore[misc]
    for each in made:
        each.docker("rm", "--force", "--volumes")


def test_a_daemon_needs_no_root_no_capability_and_no_writable_root(started: type[Container]) -> None:
    dnsd = started("sh", "-c", f"{CONSUL} & exec {' '.join(DNSD)}")
    until("the engine finds it healthy", lambda: dnsd.inspect("{{.State.Health.Status}}") == "healthy", 60)
    status = dnsd.exec("cat", "/proc/1/status")
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert values["Uid"].split() == ["65532"] * 4
    assert values["CapEff"] == values["CapBnd"] == "0" * 16
    with pytest.raises(AssertionError, match="Read-only file system"):
        dnsd.exec("touch", "/opt/ztna/new")
    dnsd.exec("touch", "/run/a.sock")
    assert "0.1.0" in dnsd.exec("ztna", "--version")


def test_the_health_says_what_is_awaited(started: type[Container]) -> None:
    dnsd = started(*DNSD)

    def answered() -> list[dict[str, Any]]:
        probes = json.loads(dnsd.inspect("{{json .State.Health.Log}}"))
        return [each for each in probes if "awaiting" in each["Output"]]

    said = until("a probe of the engine that was answered", answered, 60)[-1]
    assert said["ExitCode"] == 1
    answer = json.loads(said["Output"])
    assert answer["ready"] is False and answer["awaiting"]


def test_the_health_of_what_is_no_daemon_says_where_it_asked(started: type[Container], image: str) -> None:
    idle = started("sleep", "600", options=(*HARDENED, "--env", "READY_AT=127.0.0.1:9999"))
    with pytest.raises(AssertionError, match=r"no daemon answers at 127\.0\.0\.1:9999"):
        idle.exec("python3", "/opt/ztna/container/health.py")


def test_sigterm_ends_it_with_its_own_status(started: type[Container]) -> None:
    dnsd = started(*DNSD)
    asked = "python3 /opt/ztna/container/health.py || true"
    until("it answers", lambda: '"ready": false' in dnsd.exec("sh", "-c", asked), 60)
    dnsd.docker("stop", "--time", str(STOPPED_SECONDS))
    assert dnsd.inspect("{{.State.ExitCode}}") == "0"
    wrong = started("ztna-dnsd", "--set", "dnsd.no_such_key=1")
    until("its end", lambda: wrong.inspect("{{.State.Status}}") == "exited", 60)
    assert wrong.inspect("{{.State.ExitCode}}") == "2"


def test_what_is_left_behind_is_reaped(started: type[Container]) -> None:
    """Each inner shell ends before its child does, which the first process gets (credentials(7))."""
    orphans = started("sh", "-c", "for i in 1 2 3 4 5; do (sh -c 'sleep 0.1 &'); done; exec sleep 600")
    until("the orphans' end", lambda: len([p for p in orphans.processes() if p[0] == "sleep"]) == 1, 30)
    until("no zombie", lambda: not [each for each in orphans.processes() if each[1] == "Z"], 30)
    first = [name for name, _, parent in orphans.processes() if parent == "1"]
    assert first == ["sleep"]


def test_a_command_that_is_not_there_is_named(engine: str | None, image: str) -> None:
    argv = ["docker", *(["--host", engine] if engine else []), "run", "--rm", *HARDENED, image, "ztna-dnssd"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (127, "init: ztna-dnssd: No such file or directory\n")


def test_it_says_what_it_is_and_holds_no_compiler(engine: str | None, image: str) -> None:
    labels = json.loads(docker.docker(engine, "inspect", "--format", "{{json .Config.Labels}}", image))
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert told["title"] == "ztna-mesh" and told["licenses"] == "Apache-2.0"
    assert told["version"] == "0.1.0"
    # Whoever checked it out may not be who runs the tests.
    git = ("git", "-c", "safe.directory=*", "-C", ROOT)
    assert told["revision"] == run(*git, "describe", "--always", "--dirty", "--abbrev=40").strip()
    script = "command -v gcc cc pip make; ls /opt/ztna/bin"
    listed = docker.docker(engine, "run", "--rm", *HARDENED, image, "sh", "-c", script).split()
    assert {"ztna", "ztna-dnsd", "ztna-relay", "ztna-sidecar"} <= set(listed)
    assert not {each for each in listed if each.startswith(("pip", "/"))}


def test_it_holds_the_lock_and_nothing_else(engine: str | None, image: str) -> None:
    names = "(f'{each.name}=={each.version}'.lower() for each in distributions())"
    script = f"from importlib.metadata import distributions; print(*{names})"
    installed = docker.docker(engine, "run", "--rm", *HARDENED, image, "python3", "-c", script).split()
    wheels = {tuple(wheel.name.lower().split("-")[:2]) for wheel in locked_wheels().glob("*.whl")}
    locked = {f"{name.replace('_', '-')}=={version}" for name, version in wheels}
    assert {each.replace("_", "-") for each in installed} == locked | {"ztna-mesh==0.1.0"}


def test_its_size_is_told_and_bounded(engine: str | None, made: tuple[str, float]) -> None:
    image, told = made
    sizes = {
        name: int(docker.docker(engine, "inspect", "--format", "{{.Size}}", name)) / 1e6
        for name in (image, docker.BASE_IMAGE)
    }
    assert abs(told - sizes[image]) < 1
    assert told - sizes[docker.BASE_IMAGE] < OWN_MB_MAX, (
        f"{told} MB, of which the base is {sizes[docker.BASE_IMAGE]}"
    )
