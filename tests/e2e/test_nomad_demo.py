"""`make nomad` as its user meets it: it serves, what it prints works, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.console import require_tools
from tests.support.consul import require_binary
from tests.support.lab import until
from tests.support.namespaces import Host, network

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SERVED_SECONDS = 150
END_SECONDS = 90.0


@dataclass
class Demo:
    """One that runs, and what it printed."""

    host: Host
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def printed(self) -> str:
        """All that it printed so far."""
        return (self.folder / "printed").read_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo on a host of its own, whose folder for temporary files is empty before."""
    require_tools("dig", "curl", "make")
    for kind in ("nomad", "newest"):
        require_binary(kind)
    folder = tmp_path_factory.mktemp("demo")
    with network("core") as made:
        host = made.hosts["core"]
        environment = os.environ | {"TMPDIR": str(folder)}
        argv = [*host.prefix, sys.executable, str(ROOT / "nomad" / "demo.py")]
        with (folder / "printed").open("wb") as printed:
            process = subprocess.Popen(argv, stdout=printed, stderr=printed, env=environment, cwd=ROOT)
        running = Demo(host, process, folder)
        try:
            until(
                "what to try",
                lambda: "Ctrl-C ends" in running.printed or process.poll() is not None,
                SERVED_SECONDS,
            )
            assert process.poll() is None, running.printed
            yield running
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pid in host.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_what_it_prints_works(demo: Demo) -> None:
    lines = [line.strip() for line in demo.printed.splitlines() if line.startswith("  ")]
    export, *commands = lines
    assert export.startswith("export NOMAD_ADDR=") and len(commands) == 8
    said = []
    for line in commands:
        argv = [*demo.host.prefix, "sh", "-c", f"{export}; {line}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=demo.folder)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.stdout}{done.stderr}"
        said.append(done.stdout)
    (address,) = re.findall(r"^web-app\.ztna\.local\.\s+\d+\s+IN\s+A\s+(\S+)$", said[0], re.MULTILINE)
    assert f"http://{address}:" in demo.printed
    assert "nomad--" in said[1] and all("Directory listing" in page for page in said[2:4])


def test_ctrl_c_ends_everything_and_leaves_nothing(demo: Demo) -> None:
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(END_SECONDS) == 0, demo.printed
    left = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in demo.host.processes()]
    assert left == [], demo.printed
    assert [path.name for path in demo.folder.iterdir()] == ["printed"]
