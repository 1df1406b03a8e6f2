"""The units: systemd takes them, their exposure is low, and daemons accept what they hand over."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.certificates import Pki
from tests.support.console import command, require_tools
from tests.support.distribution import run
from ztna.cli import init
from ztna.names import ServiceName

HOST = Path(__file__).resolve().parents[2] / "ztna/host"
EXPOSURE_TENTHS_MAX = 25
WITH_DROP_INS = [
    *((name, ()) for name in init.DAEMONS),
    ("agent", ("agent-anyip.conf", "consul-token.conf")),
    ("agent", ("agent-tun.conf",)),
    ("relay", ("low-ports.conf",)),
    ("relay", ("relay-kernel.conf",)),
    ("dnsd", ("low-ports.conf", "consul-token.conf")),
    ("connector", ("consul-token.conf",)),
]


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The units of this installation; verify wants programs that are there."""
    require_tools("systemd-analyze")
    monkeypatch.setattr(init, "HIDDEN_FROM_UNITS", ())
    argv = ["host", "--dir", str(tmp_path / "etc"), "--units", str(tmp_path / "units")]
    done = CliRunner().invoke(init.init, argv)
    assert done.exit_code == 0, done.output
    return tmp_path / "units"


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("name", "drop_ins"), WITH_DROP_INS, ids=lambda value: "+".join(value) or "plain")
def test_systemd_takes_it_and_its_exposure_is_low(units: Path, name: str, drop_ins: tuple[str, ...]) -> None:
    unit = units / f"ztna-{name}.service"
    for drop_in in drop_ins:
        (units / f"{unit.name}.d").mkdir(exist_ok=True)
        shutil.copy(HOST / "drop-ins" / drop_in, units / f"{unit.name}.d")
    verified = analyze("verify", "--man=no", unit)
    assert (verified.returncode, verified.stderr) == (0, "")
    judged = analyze("security", "--offline=yes", f"--threshold={EXPOSURE_TENTHS_MAX}", unit)
    assert judged.returncode == 0, judged.stdout
    if any("AmbientCapabilities" in (HOST / "drop-ins" / each).read_text() for each in drop_ins):
        assert re.search(r"✗ AmbientCapabilities=", judged.stdout), "the drop-in was not read"


def test_no_unit_has_a_capability_of_its_own() -> None:
    for unit in (HOST / "systemd").iterdir():
        assert re.findall(r"^\w*Capabilit\w*=.*$", unit.read_text(), re.MULTILINE) == [
            "CapabilityBoundingSet="
        ]


def given(unit: Path, credentials: Path) -> Iterator[tuple[str, str]]:
    """Return the environment that the unit sets."""
    yield "CREDENTIALS_DIRECTORY", str(credentials)
    for line in unit.read_text().splitlines():
        if line.startswith("Environment="):
            name, _, value = line.removeprefix("Environment=").partition("=")
            yield name, value.replace("%d", str(credentials))


def test_the_key_that_the_unit_hands_over_is_used_in_place_of_roots(units: Path, tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    services = [ServiceName("web-app")]
    etc, credentials = tmp_path / "etc", tmp_path / "credentials"
    credentials.mkdir()
    made = {
        "relay": pki.relay("edge-1"),
        "connector": pki.connector("rack-7", services),
        "agent": pki.agent(),
    }
    for name, tls in made.items():
        shutil.copy(tls.certificate, etc / f"{name}.pem")
        shutil.copy(tls.ca, etc / "ca.pem")
        key = credentials / "key"
        key.unlink(missing_ok=True)
        shutil.copy(tls.key, key)
        key.chmod(0o400)
        argv = [command("ztna"), "check-config", str(etc / f"{name}.yaml")]
        without = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert (
            without.returncode == 2 and f"{name}.tls.key: {etc}/{name}.key cannot be read" in without.stderr
        )
        environment = os.environ | dict(given(units / f"ztna-{name}.service", credentials))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr


def allowed(words: str) -> set[str]:
    """Return the system calls of a filter line, sets of sets expanded."""
    found: set[str] = set()
    for word in words.split():
        if not word.startswith("@"):
            found.add(word)
            continue
        listed = analyze("syscall-filter", word).stdout.splitlines()[1:]
        found |= allowed(" ".join(line for line in map(str.strip, listed) if not line.startswith("#")))
    return found


@pytest.mark.slow
def test_the_filter_of_system_calls_lets_a_whole_mesh_through(tmp_path: Path) -> None:
    require_tools("strace", "systemd-analyze")
    filters = {
        tuple(re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE))
        for unit in (HOST / "systemd").iterdir()
    }
    ((granted, taken),) = filters
    assert taken.startswith("~")
    argv = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "signal=none",
        "-o",
        tmp_path / "trace",
        command("ztna"),
        "up",
        "--check",
    ]
    run(*argv)
    called = set(re.findall(r"^\d+ +(\w+)\(", (tmp_path / "trace").read_text(errors="replace"), re.MULTILINE))
    assert {"recvmsg", "epoll_ctl", "prlimit64"} <= called, "the trace has the daemons in it"
    assert called - (allowed(granted) - allowed(taken.removeprefix("~"))) == set()
