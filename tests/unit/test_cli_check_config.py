"""`ztna check-config` as a user types it: the configuration and the certificate files that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.certificates import Pki
from ztna import config as configuration
from ztna.cli.check_config import check_config
from ztna.config import AgentConfig, Config, Endpoint, RelayConfig, RelayTarget, TlsConfig


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(check_config, [str(each) for each in arguments])


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def written(tmp_path: Path, relay: TlsConfig, agent: TlsConfig) -> Path:
    target = RelayTarget(address=Endpoint("127.0.0.1", 4433), name="edge")
    config = Config(relay=RelayConfig(name="edge", tls=relay), agent=AgentConfig(tls=agent, relays=(target,)))
    file = tmp_path / "mesh.yaml"
    file.write_text(configuration.dump(config))
    return file


def test_a_good_one_is_fine(tmp_path: Path, pki: Pki) -> None:
    file = written(tmp_path, pki.with_crl(pki.relay("edge")), pki.agent())
    done = run(file)
    assert done.exit_code == 0 and "fine; for relay, agent" in done.output
    assert json.loads(run(file, "--json").output) == {
        "ok": True,
        "file": str(file),
        "sections": ["relay", "agent"],
        "warnings": [],
    }
    assert "sessions_per_identity" in run(file, "--show").output


def test_every_bad_certificate_file_is_named_with_its_section(tmp_path: Path, pki: Pki) -> None:
    relay, agent = pki.with_crl(pki.relay("edge")), pki.agent()
    Path(agent.key).chmod(0o644)
    pki.crl_file.write_bytes(b"junk")
    file = written(tmp_path, relay, agent)
    done = run(file)
    assert done.exit_code == 2
    first, second = done.output.splitlines()
    assert first.startswith("relay.tls.crl_file: ") and str(pki.crl_file) in first
    assert second.startswith("agent.tls.key: ") and agent.key in second and "0644" in second
    told = json.loads(run(file, "--json").output)
    assert told["ok"] is False and agent.key in told["error"]
    assert run(file, "--no-files").exit_code == 0


def test_a_crl_url_that_nothing_can_fetch_is_named(tmp_path: Path, pki: Pki) -> None:
    tls = pki.relay("edge")
    odd = TlsConfig(certificate=tls.certificate, key=tls.key, ca=tls.ca, crl_url="ldap://x")
    done = run(written(tmp_path, odd, pki.agent()))
    assert done.exit_code == 2 and "relay.tls.crl_url: ldap://x" in done.output


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("relay: {nmae: edge}\n")
    done = run(file)
    assert done.exit_code == 2 and "relay.nmae" in done.output
    assert json.loads(run(file, "--json").output)["ok"] is False


CHECKED = """
connector:
  id: c1
  tls: {{certificate: c, key: k, ca: a}}
  routes:
    - service: web
      port: 80
      backend: 127.0.0.1:8080
      checks:
        - {{kind: http, runner: {runner}, headers: ["{header}: hunter2", "Host: web.internal"]}}
"""


@pytest.mark.parametrize(
    ("runner", "header", "warns"),
    [
        ("consul", "Authorization", True),
        ("consul", "x-api-key", True),
        ("consul", "Accept", False),
        ("sidecar", "Authorization", False),
    ],
)
def test_secrets_that_go_into_consul_are_a_warning(
    tmp_path: Path, runner: str, header: str, warns: bool
) -> None:
    file = tmp_path / "connector.yaml"
    file.write_text(CHECKED.format(runner=runner, header=header))
    done = run(file, "--no-files")
    said = f"{file}: warning: connector.routes: web: checks.headers: {header} can be read in Consul"
    assert done.exit_code == 0 and (said in done.output) == warns
    assert "hunter2" not in done.output and "Host" not in done.output
    told = json.loads(run(file, "--no-files", "--json").output)
    assert told["ok"] and len(told["warnings"]) == warns


def test_secrets_of_all_routes_of_a_service_are_told(tmp_path: Path) -> None:
    file = tmp_path / "connector.yaml"
    both = CHECKED.format(runner="consul", header="Cookie")
    other = CHECKED.format(runner="consul", header="X-Api-Key").partition("routes:\n")[2]
    file.write_text(both + other.replace("port: 80\n", "port: 81\n"))
    assert "web: checks.headers: Cookie, X-Api-Key can be read in Consul" in run(file, "--no-files").output
