"""Every command of the documents is run, as it stands, in the order of the page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Pki
from tests.support.console import require_tools
from tests.support.consul import free_ports
from tests.support.lab import until
from tests.support.pages import blocks, fences
from ztna import config as configuration
from ztna.config import Config
from ztna.names import ServiceName

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tests/peers").glob("*.md")),
]
SECONDARIES = ROOT / "docs/secondaries.md"
CERTIFICATES = ROOT / "docs/certificates.md"
DISCOVERY = ROOT / "docs/discovery.md"
HOSTS = ROOT / "docs/hosts.md"
SECURITY = ROOT / "docs/security.md"
V1 = ROOT / "docs/v1.md"
HERE = "tests/e2e/test_docs.py"
RUN_BY = {
    "docs/backup.md": "tests/e2e/test_backup.py",
    "docs/certificates.md": HERE,
    "docs/containers.md": "tests/e2e/test_compose.py",
    "docs/discovery.md": HERE,
    "docs/hosts.md": HERE,
    "docs/monitoring.md": "tests/e2e/test_monitoring.py",
    "docs/nomad.md": "tests/e2e/test_nomad.py",
    "docs/operations.md": HERE,
    "docs/secondaries.md": HERE,
    "docs/testing.md": "tests/e2e/test_testing_extra.py",
    "docs/troubleshooting.md": "tests/e2e/test_troubleshooting.py",
    "docs/tutorial.md": "tests/e2e/test_tutorial.py",
    "docs/v1.md": HERE,
    "docs/virtual.md": "tests/e2e/test_beside_virtual.py",
}
"""Which test runs the `sh` blocks of a page, in its order."""
ELSEWHERE = {
    "make demo": "tests/e2e/test_up.py",
    "make test": "this run",
    "apt-get install --yes ./dist/ztna-mesh_*.deb": "tests/e2e/test_debian_package.py",
}
"""Commands of other pages, and which tests run them."""
CANNOT_BE_RUN = {
    "$ vault write": "no Vault; tests/unit/test_foreign_certificates.py has certificates such as its roles make",
    "$ python -m ztna.container.context": "as tests/e2e/test_container_image.py has it built",
}
"""What `console` blocks begin with, and what is tested of it."""
SHELLS = {"bash", "shell", "shellsession", "shell-session", "zsh", "ksh", "terminal", "cmd", "powershell"}
PROGRAMS = (
    "$ ",
    "ztna ",
    "ztna-",
    "make ",
    "consul ",
    "nomad ",
    "curl ",
    "dig ",
    "docker ",
    "pip ",
    "pipx ",
    "systemctl ",
    "apt",
)
"""What a line begins with that somebody may type."""


def commands(page: Path) -> list[str]:
    """Return the lines of a page's `sh` blocks."""
    lines = [line for block in blocks(page, "sh") for line in block]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_every_command_of_every_page_is_run_by_a_test() -> None:
    unknown = {
        f"{page.name}: {line}"
        for page in PAGES
        for line in commands(page)
        if str(page.relative_to(ROOT)) not in RUN_BY and line not in ELSEWHERE
    }
    assert unknown == set()


@pytest.mark.parametrize("name", RUN_BY)
def test_the_test_that_runs_a_page_is_there_and_the_page_has_something_to_run(name: str) -> None:
    assert commands(ROOT / name), f"{name} has no `sh` block any more"
    assert Path(name).name in (ROOT / RUN_BY[name]).read_text()


def test_no_command_passes_by_as_something_else_than_sh() -> None:
    for page in PAGES:
        assert "~~~" not in page.read_text(), page.name
        for language, lines in fences(page.read_text()):
            assert language, f"{page.name}: a block without a language: {lines[:1]}"
            assert language not in SHELLS, f"{page.name}: {language}: write `sh`, and run it"
            if language == "console":
                told = [line for line in lines if line.startswith("$ ")]
                assert all(line.startswith(tuple(CANNOT_BE_RUN)) for line in told) and told, (
                    f"{page.name}: {told}"
                )
            elif language != "sh":
                assert not [line for line in lines if line.startswith(PROGRAMS)], f"{page.name}: {language}"
        outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        indented = [
            line
            for line in outside.splitlines()
            if line.startswith(tuple(f"    {each}" for each in PROGRAMS))
        ]
        assert not indented, f"{page.name}: {indented}"


def test_what_cannot_be_run_says_what_is_tested_of_it() -> None:
    told = [
        line
        for page in PAGES
        for language, lines in fences(page.read_text())
        if language == "console"
        for line in lines
    ]
    for begins, what in CANNOT_BE_RUN.items():
        assert any(line.startswith(begins) for line in told), f"no page has {begins!r} any more"
        (test,) = re.findall(r"tests/[\w/]+\.py", what)
        assert (ROOT / test).exists()


@pytest.mark.parametrize("page", [SECONDARIES, V1], ids=lambda page: page.stem)
def test_the_commands_of_the_page_work_in_order(page: Path, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands(page):
        argv = ["sh", "-c", line]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
    assert [key.stat().st_mode & 0o777 for key in tmp_path.glob("*.key")] == [0o600]


def test_the_commands_of_the_page_on_certificates_work_in_order(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands(CERTIFICATES):
        argv = ["sh", "-c", line]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
    assert (tmp_path / "ztna-ca/crl.pem").exists()


def test_the_commands_of_the_page_on_hosts_work_in_order(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands(HOSTS):
        if line in ELSEWHERE:
            continue
        argv = ["sh", "-c", line]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"


def test_the_commands_of_the_page_on_discovery_work_in_order(tmp_path: Path) -> None:
    require_tools("curl")
    pki = Pki(tmp_path)
    tls = pki.connector("alpha", [ServiceName("web-app"), ServiceName("db")])
    link, admin, nobody = free_ports(3)
    (tmp_path / "routes.d").mkdir()
    (tmp_path / "connector.yaml").write_text(
        f"consul: {{address: 'http://127.0.0.1:{nobody}'}}\n"
        f"connector: {{id: alpha, tls: {{certificate: {tls.certificate}, key: {tls.key}, ca: {tls.ca}}}, "
        f"relays: [{{address: 127.0.0.1:{nobody}, name: edge}}], link: 127.0.0.1:{link}, "
        f"admin: 127.0.0.1:{admin}, api: connector.sock, api_state: services.json, routes_dir: routes.d}}\n"
    )
    (tmp_path / "db.yaml").write_text("routes: [{port: 5432, backend: 'srv://_db._tcp.example.net'}]\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    argv = ["ztna-sidecar", "connector", "--config", "connector.yaml"]
    connector = subprocess.Popen(argv, cwd=tmp_path, env=environment)
    try:
        until("the socket", lambda: (tmp_path / "connector.sock").exists() or connector.poll() is not None)
        for line in commands(DISCOVERY):
            done = subprocess.run(
                ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
            )
            said = f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
            assert done.returncode == 0 and done.stdout and '"error"' not in done.stdout, said
        assert json.loads((tmp_path / "services.json").read_text())["routes"][0]["service"] == "web-app"
    finally:
        connector.send_signal(signal.SIGTERM)
        assert connector.wait(30) == 0


def test_each_promise_of_the_page_on_security_names_tests_that_exist() -> None:
    promises = SECURITY.read_text().partition("## Promises and their tests")[2]
    rows = [line for line in promises.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        _, promise, tests, _ = (cell.strip() for cell in row.split("|"))
        for test in tests.split(", "):
            assert re.fullmatch(r"tests/\w+/test_\w+\.py", test), f"{promise}: {test}"
            assert (ROOT / test).exists(), f"{promise}: {test} does not exist"
            assert "def test_" in (ROOT / test).read_text(), f"{promise}: {test} tests nothing"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with the configurations that the operations page starts daemons with, on ports of this run."""
    dns, relay, forwarder, link, consul, *admin = free_ports(9)
    configs = {
        "dnsd": f"dnsd: {{listen: 127.0.0.1:{dns}, admin: 127.0.0.1:{admin[0]}, pool: {{cidr: 127.101.0.0/16}}}}",
        "relay": (
            "relay: {name: edge, tls: {certificate: relay.pem, key: relay.key, ca: ztna-ca/ca.pem}, "
            f"listen: 127.0.0.1:{relay}, forwarder: 127.0.0.1:{forwarder}, admin: 127.0.0.1:{admin[1]}, "
            f"resolvers: [127.0.0.1:{dns}], admin_socket: {tmp_path}/r.sock, audit_log: {tmp_path}/audit.log}}"
        ),
        "connector": (
            "connector: {id: alpha, tls: {certificate: connector.pem, key: connector.key, ca: ztna-ca/ca.pem}, "
            f"relays: [{{address: 127.0.0.1:{relay}, name: edge}}], link: 127.0.0.1:{link}, "
            f"admin: 127.0.0.1:{admin[2]}, "
            "routes: [{service: web-app, backend: 127.0.0.1:9, port: 8080, protocol: tcp, checks: [{kind: none}]}]}"
        ),
        "agent": (
            "agent: {tls: {certificate: laptop.pem, key: laptop.key, ca: ztna-ca/ca.pem}, pool: 127.101.0.0/16, "
            f"relays: [{{address: 127.0.0.1:{relay}, name: edge}}], admin: 127.0.0.1:{admin[3]}}}"
        ),
    }
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(f"consul: {{address: 'http://127.0.0.1:{consul}'}}\n{text}\n")
    (tmp_path / "consul-port").write_text(str(consul))
    yield tmp_path


def test_the_operations_page_works_from_top_to_bottom(place: Path) -> None:
    require_tools("curl")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    consul = (place / "consul-port").read_text()
    started: list[subprocess.Popen[bytes]] = []

    def start(line: str) -> None:
        log = (place / f"{len(started)}.log").open("wb")
        process = subprocess.Popen(
            ["sh", "-c", f"exec {line}"], cwd=place, env=environment, stdout=log, stderr=log
        )
        started.append(process)
        file = re.search(r"--config (\S+)", line)
        if file is not None:
            until(f"{line} is ready", lambda: _ready(place / file.group(1), process, place), 30)

    try:
        start(f"{sys.executable} -m ztna.consul.embedded --listen 127.0.0.1:{consul}")
        for line in commands(ROOT / "docs/operations.md"):
            if line.startswith("ztna-"):
                start(line)
                continue
            done = subprocess.run(
                ["sh", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{line}: status {done.returncode}: {done.stdout}{done.stderr}"
            assert done.stdout.strip(), f"{line} says nothing"
    finally:
        begun = time.monotonic()
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            process.wait(30)
    assert time.monotonic() - begun < 30


def _ready(file: Path, process: subprocess.Popen[bytes], place: Path) -> bool:
    logs = "".join(path.read_text() for path in place.glob("*.log"))
    assert process.poll() is None, f"{file.name} ended: {logs[-3000:]}"
    section = getattr(configuration.load(file, {}, {}), file.stem)
    url = f"http://{section.admin}/readyz"
    return subprocess.run(["curl", "-sS", "--fail", url], capture_output=True, timeout=10).returncode == 0


@pytest.mark.parametrize("section", ["dnsd", "relay", "connector", "agent"])
def test_the_example_configurations_are_accepted(section: str) -> None:
    config = configuration.load(ROOT / f"docs/examples/{section}.yaml", {}, {})
    assert isinstance(config, Config)
    assert getattr(config, section) is not None


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_policies_are_those_the_page_names() -> None:
    assert {path.stem for path in (ROOT / "docs/policies").glob("*.hcl")} >= {"dnsd", "connector", "agent"}
