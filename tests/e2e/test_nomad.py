"""docs/nomad.md as it stands, with the oldest Consul, which denies by default: all log in as the page says.

And the files of nomad/: formatted and valid, each with each driver.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.consul import note_version, require_binary
from tests.support.lab import http_get, lab, until
from tests.support.nomad import JOBS, METHOD, NomadCluster, cluster
from tests.support.pages import blocks
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.slow]

FILES = sorted(JOBS.glob("*.nomad.hcl"))
PAGE = JOBS.parent / "docs" / "nomad.md"
COMMAND_SECONDS = 120
CERTIFICATES = JOBS.parent / "docs" / "certificates.md"
VAULT_JOB = """
job "vault" {
  group "vault" {
    task "task" {
      driver = "raw_exec"
      vault {}
      config {
        command = "sh"
        args    = ["-c", "cp -p secrets/connector.pem local/ && exec sleep infinity"]
      }
      TEMPLATE
    }
  }
}
"""
NEEDED = ["net_admin", "net_raw"]


@pytest.fixture(scope="module")
def nomad() -> Iterator[NomadCluster]:
    with (
        lab("core") as made,
        cluster(made, "core", login=True, consul="oldest", loopback=True, vault=True) as nomad,
    ):
        nomad.trust({"web-app": ["web-app"], "connector": ["plain-web"]})
        yield nomad


def test_every_file_is_formatted(nomad: NomadCluster) -> None:
    listed = re.findall(r"^\| \[[a-z-]+\.nomad\.hcl\]\(\.\./nomad/(\S+)\) \|", PAGE.read_text(), re.MULTILINE)
    assert {file.name for file in FILES} == set(listed)
    nomad.run("fmt", "-check", str(JOBS))


@pytest.mark.parametrize("driver", ["raw_exec", "exec", "docker"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.partition(".")[0])
def test_every_file_is_valid(nomad: NomadCluster, file: Path, driver: str) -> None:
    relay = ["-var=relay=192.0.2.1:4433"] if 'variable "relay"' in file.read_text() else []
    said = nomad.run("job", "validate", f"-var=driver={driver}", *relay, str(file))
    assert "validation successful" in said and "Warning" not in said, said
    described = re.findall(r'^variable "(\w+)" \{\n(.*?)^\}', file.read_text(), re.MULTILINE | re.DOTALL)
    assert described and all("description" in body and "type " in body for _, body in described)


@pytest.mark.parametrize(("driver", "owner"), [("raw_exec", -1), ("exec", 65534), ("docker", 65532)])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.partition(".")[0])
def test_a_key_is_read_by_its_task_alone(file: Path, driver: str, owner: int) -> None:
    """Who runs the task owns the key; Nomad takes -1 for whoever the client runs as, and `exec` runs as nobody."""
    for task in tasks(file, driver):
        made = {each["DestPath"]: each for each in task["Templates"] or ()}
        keys = [each for path, each in made.items() if path.endswith(".key")]
        assert len(keys) == any(path.endswith(".pem") for path in made)
        for each in keys:
            wanted = -1 if task["User"] == "root" else owner
            assert (each["Perms"], each["Uid"], each["Gid"]) == ("0600", wanted, wanted)


@pytest.mark.parametrize(
    ("mode", "capabilities"), [("listen", ["net_bind_service"]), ("anyip", NEEDED), ("tun", NEEDED)]
)
def test_an_agent_in_docker_is_given_what_its_mode_needs(mode: str, capabilities: list[str]) -> None:
    """Nomad takes away from Docker's own what a client does not allow, so each is asked for by name."""
    (task,) = tasks(JOBS / "agent.nomad.hcl", "docker", f"-var=mode={mode}")
    assert task["Config"]["cap_add"] == capabilities
    assert len(task["Config"]["devices"]) == (mode == "tun")


def tasks(file: Path, driver: str, *variables: str) -> list[dict[str, Any]]:
    """Return the tasks of a job as Nomad parses it, which takes no agent."""
    relay = ["-var=relay=192.0.2.1:4433"] if 'variable "relay"' in file.read_text() else []
    argv = [
        require_binary("nomad"),
        "job",
        "run",
        "-output",
        f"-var=driver={driver}",
        *variables,
        *relay,
        file,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr
    return [task for group in json.loads(done.stdout)["Job"]["TaskGroups"] for task in group["Tasks"]]


@pytest.fixture
def place(nomad: NomadCluster, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with the job files, and an environment with the programs that the page calls by name."""
    (tmp_path / "nomad").symlink_to(JOBS)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nomad").symlink_to(nomad.binary)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A variable of every file that has it, as Nomad takes them from the environment.
    login = {"NOMAD_VAR_login_method": METHOD}
    return tmp_path, os.environ | {"PATH": path, "NOMAD_ADDR": nomad.address} | login


def test_the_page_works_from_top_to_bottom(
    nomad: NomadCluster, place: tuple[Path, dict[str, str]], request: pytest.FixtureRequest
) -> None:
    note_version(request, "oldest")
    folder, environment = place
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line != "make nomad"]
    *deploying, stopping = lines
    assert stopping == "nomad job stop -purge web-app"
    for line in deploying:
        _run(nomad, line, folder, environment)
    address = nomad.lab.address("web-app")
    answer = until("served by name", lambda: http_get(nomad.core, f"http://{address}:8080/"), 30)
    assert answer[0] == 200 and "Directory listing" in answer[1]
    address = nomad.lab.address("plain-web")
    answer = until(
        "served by its host's connector", lambda: http_get(nomad.core, f"http://{address}:80/"), 30
    )
    assert answer[0] == 200 and "Directory listing" in answer[1]
    assert len(nomad.logins()) == 4, "dnsd, agent and two connectors"
    _run(nomad, stopping, folder, environment)
    until("no service is left", lambda: nomad.lab.consul_get("/v1/health/service/web-app") == [], 60)
    until("its connector has logged out", lambda: len(nomad.logins()) == 3, 30)


def test_the_template_for_vault_writes_a_file_that_a_connector_takes(
    nomad: NomadCluster, tmp_path: Path
) -> None:
    """The template and the configuration of docs/certificates.md, as they stand; Vault is a stand-in.

    Nobody but the task and Nomad sees its `secrets`, so the task shows what it was given in `local`.
    """
    (template,) = [block for block in blocks(CERTIFICATES, "hcl") if "pkiCert" in "".join(block)]
    (told,) = [block for block in blocks(CERTIFICATES, "yaml") if "secrets/connector.pem" in "".join(block)]
    job = tmp_path / "vault.nomad.hcl"
    job.write_text(VAULT_JOB.replace("TEMPLATE", "\n".join(template)))
    nomad.run("job", "run", str(job))
    (allocation,) = nomad.allocations("vault")
    place = nomad.lab.directory / "nomad-core" / "alloc" / allocation["ID"] / "task"
    shutil.copy(nomad.lab.directory / "ca.pem", place / "local")
    until("the task has shown it", lambda: (place / "local/connector.pem").exists())
    tls = yaml.safe_load("\n".join(told).replace("secrets/", "local/"))["connector"]["tls"]
    config = TlsConfig(**{key: str(place / file) for key, file in tls.items()})
    identity = Credentials.load(config).identity
    assert identity.id_name == "rack-7" and identity.may_serve(ServiceName("web-app"))
    assert not identity.may_serve(ServiceName("db"))
    nomad.purge("vault")


def _run(nomad: NomadCluster, line: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*nomad.core.prefix, "sh", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0 and done.stdout, f"{line}: {done.stdout}{done.stderr}\n{nomad.logs()}"
