"""The connector as a prestart sidecar of a Nomad job: deployed, reached by name, stopped without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.console import command
from tests.support.consul import require_binary
from tests.support.lab import Lab, http_get, lab, until

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

JOB = Path(__file__).resolve().parents[2] / "nomad" / "connector.nomad.hcl"

AGENT_CONFIG = """
data_dir = "{directory}/nomad"
bind_addr = "127.0.0.1"
consul {{ address = "{consul}" }}
plugin "raw_exec" {{ config {{ enabled = true }} }}
client {{ options = {{ "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }} }}
"""


def test_the_job_file_is_formatted_and_valid() -> None:
    nomad = require_binary("nomad")
    with lab("core") as made:
        core = made.host("core")
        done = core.try_run(str(nomad), "fmt", "-check", str(JOB))
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_with_a_connector_is_reached_by_name_and_leaves_nothing() -> None:
    nomad = str(require_binary("nomad"))
    with lab("core") as made:
        core = made.host("core")
        made.start_consul("newest", acl=False)
        made.dnsd().wait_ready()
        made.relay().wait_ready()
        made.agent("laptop", ["web-app"])
        certificate = made.certificate("connector", connector=["web-app"], connector_id="nomad")
        assert Path(certificate.certificate).parent == made.directory

        config = made.directory / "nomad.hcl"
        config.write_text(
            AGENT_CONFIG.format(directory=made.directory, consul=made.consul.address.partition("//")[2])
        )
        agent = ("agent", "-dev", "-config", str(config))
        made.spawn("nomad", core, nomad, *agent, environment={"AWS_CA_BUNDLE": ""})
        until("Nomad has a ready client", lambda: "ready" in core.try_run(nomad, "node", "status").stdout, 60)

        variables = {
            "certificates": str(made.directory),
            "relay": f"{core.address}:4433",
            "relay_name": "relay",
            "sidecar": command("ztna-sidecar"),
            "consul": made.consul.address,
        }
        flags = [f"-var={key}={value}" for key, value in variables.items()]
        done = core.try_run(nomad, "job", "validate", *flags, str(JOB))
        assert done.returncode == 0, done.stdout + done.stderr
        done = core.try_run(nomad, "job", "run", "-detach", *flags, str(JOB))
        assert done.returncode == 0, done.stdout + done.stderr

        try:
            _wait_healthy(made, nomad)
            address = made.address("web-app")
            answer = until("served by name", lambda: http_get(core, f"http://{address}:8080/"), 30)
            assert answer[0] == 200
            assert "Directory listing" in answer[1]
        finally:
            done = core.try_run(nomad, "job", "stop", "-purge", "web-app")
        assert done.returncode == 0, done.stdout + done.stderr
        until("no service is left", lambda: made.consul_get("/v1/health/service/web-app") == [], 60)


def _wait_healthy(made: Lab, nomad: str) -> None:
    try:
        until("healthy in Consul", lambda: made.check_states("web-app") == ["passing"], 60)
    except AssertionError as error:
        logs = ("alloc", "logs", "-job", "-task", "connector", "-stderr", "web-app")
        said = made.host("core").try_run(nomad, *logs).stdout
        raise AssertionError(f"{error}; the connector said:\n{said[-3000:]}") from None
