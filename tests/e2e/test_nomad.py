"""The connector as a prestart sidecar of a Nomad job: deployed, reached by name, stopped without a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.console import command
from tests.support.consul import MANAGEMENT_TOKEN, REAL_KINDS, note_version, require_binary
from tests.support.lab import Lab, http_get, lab, until

pytestmark = [pytest.mark.namespaces, pytest.mark.nomad, pytest.mark.real_consul, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "nomad" / "connector.nomad.hcl"
METHOD, ROLE = "nomad-workloads", "web-app-connector"

AGENT_CONFIG = """
data_dir = "{directory}/nomad"
bind_addr = "127.0.0.1"
consul {{
  address = "{consul}"
  token   = "{token}"
}}
plugin "raw_exec" {{ config {{ enabled = true }} }}
client {{ options = {{ "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }} }}
"""


def test_the_job_file_is_formatted_and_valid() -> None:
    nomad = require_binary("nomad")
    with lab("core") as made:
        core = made.host("core")
        done = core.try_run(str(nomad), "fmt", "-check", str(JOB))
        assert done.returncode == 0, done.stdout + done.stderr


def trust_nomad(made: Lab) -> None:
    """Have Consul take the identities of Nomad's tasks, as docs/consul.md says, for a connector of web-app."""

    def write(kind: str, body: object) -> None:
        until(kind, lambda: made.consul_put(f"/v1/acl/{kind}", body))

    page = (ROOT / "docs" / "consul.md").read_text()
    (method,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    write("auth-method", json.loads(method))
    write("policy", {"Name": ROLE, "Rules": made.rules("connector", ["web-app"])})
    write("role", {"Name": ROLE, "Policies": [{"Name": ROLE}]})
    selector = 'value.nomad_job_id=="web-app"'
    bound = {"AuthMethod": METHOD, "BindType": "role", "BindName": ROLE, "Selector": selector}
    write("binding-rule", bound)


def logins(made: Lab) -> list[str]:
    """The accessors of the tokens that logins made."""
    return [each["AccessorID"] for each in made.consul_get("/v1/acl/tokens") if each.get("AuthMethod")]


@pytest.mark.parametrize("kind", [None, *REAL_KINDS], ids=["open", *(f"login-{kind}" for kind in REAL_KINDS)])
def test_a_job_with_a_connector_is_reached_by_name_and_leaves_nothing(
    request: pytest.FixtureRequest, kind: str | None
) -> None:
    nomad = str(require_binary("nomad"))
    note_version(request, kind or "newest")
    with lab("core") as made:
        core = made.host("core")
        made.start_consul(kind or "newest", acl=kind is not None)
        made.dnsd().wait_ready()
        made.relay().wait_ready()
        made.agent("laptop", ["web-app"])
        certificate = made.certificate("connector", connector=["web-app"], connector_id="nomad")
        assert Path(certificate.certificate).parent == made.directory

        config = made.directory / "nomad.hcl"
        config.write_text(
            AGENT_CONFIG.format(
                directory=made.directory,
                consul=made.consul.address.partition("//")[2],
                token=MANAGEMENT_TOKEN if kind is not None else "",
            )
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
        if kind is not None:
            trust_nomad(made)
            variables["login_method"] = METHOD
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
            assert len(logins(made) if kind is not None else [""]) == 1
        finally:
            done = core.try_run(nomad, "job", "stop", "-purge", "web-app")
        assert done.returncode == 0, done.stdout + done.stderr
        until("no service is left", lambda: made.consul_get("/v1/health/service/web-app") == [], 60)
        if kind is not None:
            until("it has logged out", lambda: not logins(made), 30)


def _wait_healthy(made: Lab, nomad: str) -> None:
    try:
        until("healthy in Consul", lambda: made.check_states("web-app") == ["passing"], 60)
    except AssertionError as error:
        logs = ("alloc", "logs", "-job", "-task", "connector", "-stderr", "web-app")
        said = made.host("core").try_run(nomad, *logs).stdout
        raise AssertionError(f"{error}; the connector said:\n{said[-3000:]}") from None


TAGGED_JOB = """
job "web-app" {
  group "web" {
    count = 2
    network {
      port "http" {}
    }
    task "web" {
      driver = "raw_exec"
      config {
        command = "python3"
        args    = ["-m", "http.server", "${NOMAD_PORT_http}", "--bind", "127.0.0.1"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
    service {
      name = "web-app"
      port = "http"
      tags = ["ztna"]
      meta {
        ztna-ports = "tcp:8080"
      }
      check {
        type     = "tcp"
        interval = "1s"
        timeout  = "1s"
      }
    }
  }
}
"""


def test_a_nomad_service_with_the_tag_is_fronted_by_a_connector_that_never_heard_of_it() -> None:
    nomad = str(require_binary("nomad"))
    with lab("core") as made:
        core = made.host("core")
        made.start_consul("newest", acl=False)
        made.dnsd().wait_ready()
        made.relay().wait_ready()
        made.agent("laptop", ["web-app"])
        connector = made.connector("beside", [], grants=["web-app"], consul_services=True).wait_ready()
        config = made.directory / "nomad.hcl"
        consul = made.consul.address.partition("//")[2]
        config.write_text(AGENT_CONFIG.format(directory=made.directory, consul=consul, token=""))
        agent = ("agent", "-dev", "-config", str(config))
        made.spawn("nomad", core, nomad, *agent, environment={"AWS_CA_BUNDLE": ""})
        until("Nomad has a ready client", lambda: "ready" in core.try_run(nomad, "node", "status").stdout, 60)
        job = made.directory / "tagged.nomad.hcl"
        job.write_text(TAGGED_JOB)

        def ids() -> list[str]:
            found = made.consul_get("/v1/agent/services").values()
            return sorted(each["ID"] for each in found if each["Service"] == "web-app")

        done = core.try_run(nomad, "job", "run", "-detach", str(job))
        assert done.returncode == 0, done.stdout + done.stderr
        try:
            address = made.address("web-app", seconds=90)
            answer = until("served by name", lambda: http_get(core, f"http://{address}:8080/"), 60)
            assert answer[0] == 200 and "Directory listing" in answer[1]
            until("both instances, and ours beside them", lambda: len(ids()) == 3, 60)
            assert [each.partition("-")[0] for each in ids()] == ["_nomad", "_nomad", "web"]

            def backends() -> set[str]:
                found = connector.status()["connector"]["services"]["web-app"]["backends"]
                return {each["backend"] for each in found if each["verdict"] == "passing"}

            until("both are backends", lambda: len(backends()) == 2)
            theirs = ids()[:2]
            connector.stop()
            until("only ours is gone", lambda: ids() == theirs)
            connector.start()
            until("ours again", lambda: ids() == [*theirs, "web-app@beside"], 60)
        finally:
            done = core.try_run(nomad, "job", "stop", "-purge", "web-app")
        assert done.returncode == 0, done.stdout + done.stderr
        until("gone with theirs", lambda: ids() == [], 60)
