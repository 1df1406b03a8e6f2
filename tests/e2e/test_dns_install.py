"""What `ztna dns install` writes works in a real dnsmasq, and `ztna doctor dns` tells the difference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab import Lab, lab, until
from ztna.cli.processes import console_script
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

DNSMASQ = shutil.which("dnsmasq") or shutil.which("dnsmasq", path="/usr/sbin")
PORTS = {"installed": 5401, "plain": 5402, "hijacking": 5403}


def doctor(made: Lab, port: int) -> dict[str, Any]:
    """Return what the doctor says of a resolver on this port."""
    argv = [console_script("ztna"), "doctor", "dns", f"--resolver=127.0.0.1:{port}", "--json"]
    done = made.host("core").try_run(*argv)
    told: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == (told["verdict"] == "fine")
    return told


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    """A dnsd with one service, and three dnsmasq: with what was installed, without, and one that lies."""
    if DNSMASQ is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("dnsmasq is not installed")
    with lab("core") as made:
        made.start_consul("embedded")
        made.dnsd(listen=Endpoint("127.0.0.1", 5533)).wait_ready()
        core, root = made.host("core"), made.directory / "root"
        (root / "etc/dnsmasq.d").mkdir(parents=True)
        argv = [console_script("ztna"), "dns", "install", f"--root={root}", "--yes"]
        assert core.try_run(*argv).returncode == 0
        empty = Path("/dev/null")
        for name, arguments in (
            ("installed", [f"--conf-file={root}/etc/dnsmasq.d/ztna.conf", "--stop-dns-rebind"]),
            ("plain", [f"--conf-file={empty}"]),
            ("hijacking", [f"--conf-file={empty}", "--address=/local/192.0.2.80"]),
        ):
            common = ["--keep-in-foreground", "--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file="]
            where = [f"--port={PORTS[name]}", "--listen-address=127.0.0.1", "--user=root", *common]
            made.spawn(f"dnsmasq-{name}", core, str(DNSMASQ), *where, *arguments)
        yield made


def test_the_hosts_own_resolver_gives_virtual_addresses(made: Lab) -> None:
    with made.registered("web-app"):
        address = made.address("web-app")
        until(
            "dnsmasq answers with it",
            lambda: made.dig("core", "web-app.ztna.local", port=PORTS["installed"]) == [address],
        )


@pytest.mark.parametrize(
    ("resolver", "verdict"), [("installed", "fine"), ("plain", "not_registered"), ("hijacking", "hijacked")]
)
def test_the_doctor_tells_one_from_the_other(made: Lab, resolver: str, verdict: str) -> None:
    told = until(
        "the doctor finds it",
        lambda: (found := doctor(made, PORTS[resolver]))["verdict"] == verdict and found,
    )
    assert told["told"]
