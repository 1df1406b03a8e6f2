"""A real Nomad with clients on test hosts, each beside a Consul agent of its own, and the job files run on it.

One host is server and client, of the class `edge`; the others are clients, of the class `apps`. All keep their tasks
over a restart, as in production. Everything ends with the lab; tasks that a failed test left are ended by their pids.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import vault
from tests.support.consul import MANAGEMENT_TOKEN, agent_argv, require_binary
from tests.support.lab import CONSUL_PORT, Lab, Running, http_get, until
from tests.support.namespaces import Host
from ztna.config import TlsConfig

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "nomad"
CONSUL_PAGE = ROOT / "docs" / "consul.md"
METHOD = "nomad-workloads"
NOMAD_PORT = 4646
JOB_SECONDS = 150.0

_SERVER = """
server {{
  enabled          = true
  bootstrap_expect = 1
}}
"""
_CONFIG = """
name           = "{name}"
data_dir       = "{data}"
bind_addr      = "{address}"
leave_on_terminate = false
disable_update_check = true
log_level      = "warn"
consul {{
  address = "{consul}"
  token   = "{token}"
}}
client {{
  enabled           = true
  node_class        = "{node_class}"
  network_interface = "{device}"
  servers           = ["{server}:4647"]
  gc_interval       = "1s"
  options           = {{ "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }}
}}
plugin "raw_exec" {{ config {{ enabled = true }} }}
"""
_VAULT = f"""
vault {{
  enabled = true
  address = "http://127.0.0.1:{vault.PORT}"

  default_identity {{
    aud = ["vault.io"]
    ttl = "1h"
  }}
}}
"""


@dataclass
class NomadCluster:
    """Nomad on a lab's hosts; the first one is the server."""

    lab: Lab
    names: tuple[str, ...]
    login: bool = False
    """Whether the jobs log in to Consul, which then denies by default."""
    loopback: bool = False
    """Whether tasks have ports on loopback, as in dev mode; for a single host."""
    vault: bool = False
    """Whether the server's host has a stand-in for Vault (tests.support.vault), and Nomad knows of it."""
    agents: dict[str, Running] = field(default_factory=dict)
    consuls: dict[str, Running] = field(default_factory=dict)
    abandoned: str = ""
    """The token of a task that was killed, which had no time to give it up."""

    def __post_init__(self) -> None:
        self.binary = str(require_binary("nomad"))

    def start(self, consul: str = "newest") -> None:
        """Start Consul and Nomad everywhere and wait until every client is ready."""
        server, *clients = self.names
        self.consuls[server] = self.lab.start_consul(
            consul, server, acl=self.login, more={"client_addr": f"127.0.0.1 {self.core.address}"}
        )
        for name in clients:
            at = self.lab.host(name)
            argv = agent_argv(
                require_binary(consul),
                self.lab.directory / f"consul-{name}",
                bind=at.address,
                http=CONSUL_PORT,
                server_serf=f"{self.lab.host(server).address}:{CONSUL_PORT + 1}",
                node=name,
                acl=self.login,
            )
            self.consuls[name] = self.lab.spawn(f"consul-{name}", at, *argv)
        if self.vault:
            self.lab.python("vault", self.core, "-m", vault.__name__, str(self.lab.directory))
        self._start_nomad(server)
        until("Nomad has a leader", lambda: self.get("/v1/status/leader"), 60)
        for name in clients:
            self._start_nomad(name)
        until("every client is ready", self.ready, 90)

    def _start_nomad(self, name: str) -> None:
        at, server = self.lab.host(name), self.lab.host(self.names[0])
        text = _CONFIG.format(
            name=name,
            data=self.lab.directory / f"nomad-{name}",
            address=at.address,
            consul=f"127.0.0.1:{CONSUL_PORT}",
            token=MANAGEMENT_TOKEN if self.login else "",
            node_class="edge" if at is server else "apps",
            server=server.address,
            device="lo" if self.loopback else "eth0",
        )
        config = self.lab.directory / f"nomad-{name}.hcl"
        config.write_text(text + (_SERVER.format() if at is server else "") + (_VAULT if self.vault else ""))
        argv = (self.binary, "agent", "-config", str(config))
        # Tasks find the console scripts by name, as the job files call them.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"AWS_CA_BUNDLE": "", "PATH": path}
        self.agents[name] = self.lab.spawn(f"nomad-{name}", at, *argv, environment=environment)

    def ready(self) -> bool:
        """Whether every client is and knows its Consul, before which it is given no job with a service; and variables
        can be sealed."""
        nodes = [each for each in self.get("/v1/nodes") if each["Status"] == "ready"]
        knowing = {
            each["Name"]
            for each in nodes
            if "consul.version" in self.get(f"/v1/node/{each['ID']}")["Attributes"]
        }
        keys = self.get("/v1/operator/keyring/keys") or ()
        return knowing == set(self.names) and any(key["State"] == "active" for key in keys)

    # -- asking and telling Nomad --------------------------------------------------------------------

    @property
    def core(self) -> Host:
        """The host of the server."""
        return self.lab.host(self.names[0])

    @property
    def address(self) -> str:
        """Where Nomad's HTTP API is."""
        return f"http://{self.core.address}:{NOMAD_PORT}"

    def get(self, path: str) -> Any:
        """Return what Nomad's HTTP API answers; OSError when it does not with 200."""
        code, text = http_get(self.core, self.address + path)
        if code != 200:
            raise OSError(f"Nomad {path}: {code} {text[:200]}")
        return json.loads(text)

    def run(self, *argv: str, fails: bool = False) -> str:
        """Run the nomad command to its end and return what it printed; AssertionError with that when it fails."""
        done = self.core.try_run("env", f"NOMAD_ADDR={self.address}", self.binary, *argv, seconds=JOB_SECONDS)
        assert done.returncode == 0 or fails, f"nomad {' '.join(argv)}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, name: str, **variables: object) -> None:
        """Run a job of nomad/ and wait until its deployment is healthy."""
        flags = [
            f"-var={key}={json.dumps(value) if isinstance(value, list) else value}"
            for key, value in variables.items()
        ]
        try:
            self.run("job", "run", *flags, str(JOBS / f"{name}.nomad.hcl"))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def keep(self, path: str, tls: TlsConfig) -> None:
        """Put a certificate, its key and the CA where the job of a daemon reads them."""
        items = {"certificate": tls.certificate, "key": tls.key, "ca": tls.ca}
        self.run("var", "put", "-force", path, *(f"{key}=@{file}" for key, file in items.items()))

    def allocations(self, job: str, *statuses: str) -> list[dict[str, Any]]:
        """Return a job's allocations of these client statuses, the newest first."""
        found = self.get(f"/v1/job/{job}/allocations")
        wanted = statuses or ("running",)
        return sorted(
            (each for each in found if each["ClientStatus"] in wanted), key=lambda each: -each["CreateIndex"]
        )

    def logs(self, lines: int = 20) -> str:
        """Return the last lines that each task printed, those that have ended too."""
        told = []
        for file in sorted(self.lab.directory.glob("nomad-*/alloc/*/alloc/logs/*.std*.0")):
            last = file.read_text(errors="replace").splitlines()[-lines:]
            told.append(f"-- {file.parents[2].name[:8]} {file.name}\n" + "\n".join(last))
        return "\n".join(told)

    def node(self, name: str) -> str:
        """Return the id of a client."""
        (found,) = [each["ID"] for each in self.get("/v1/nodes") if each["Name"] == name]
        return str(found)

    def tasks(self, *hosts: str) -> set[int]:
        """Return the pids on these hosts, or all, of tasks and what runs them: not Nomad's own and Consul's."""
        ours = {running.pid for running in (*self.agents.values(), *self.consuls.values())}
        return {pid for name in hosts or self.names for pid in self.lab.host(name).processes()} - ours

    # -- Consul's ACLs -------------------------------------------------------------------------------

    def trust(self, services: Mapping[str, list[str]]) -> None:
        """Have Consul give a job's tasks, when they log in, the smallest policy of their daemon.

        `services` are those of each connector's job.
        """

        def write(kind: str, body: object) -> None:
            until(kind, lambda: self.lab.consul_put(f"/v1/acl/{kind}", body))

        (text,) = re.findall(r"^```json\n(.*?)^```", CONSUL_PAGE.read_text(), re.MULTILINE | re.DOTALL)
        method = json.loads(text)
        keys = {"JWKSURL": f"{self.address}/.well-known/jwks.json"}
        write("auth-method", method | {"Config": method["Config"] | keys})
        rules = {"dnsd": self.lab.rules("dnsd"), "agent": self.lab.rules("agent")}
        rules |= {job: self.lab.rules("connector", served) for job, served in services.items()}
        for job, text in rules.items():
            write("policy", {"Name": job, "Rules": text})
            write("role", {"Name": job, "Policies": [{"Name": job}]})
            bound = {"AuthMethod": METHOD, "BindType": "role", "BindName": job}
            write("binding-rule", bound | {"Selector": f'value.nomad_job_id=="{job}"'})

    def logins(self) -> dict[str, str]:
        """The accessors of the tokens that logins made, and of each the job whose task it is for."""
        return {
            each["AccessorID"]: " ".join(role["Name"] for role in each["Roles"])
            for each in self.lab.consul_get("/v1/acl/tokens")
            if each.get("AuthMethod")
        }

    # -- the end -------------------------------------------------------------------------------------

    def purge(self, *jobs: str) -> None:
        """Have jobs stopped and forgotten, and do not wait for it."""
        for job in jobs:
            self.run("job", "stop", "-detach", "-purge", job, fails=True)

    def end(self) -> None:
        """End Nomad, then whatever task is left, by its pid: namespaces that go do not end their processes."""
        for agent in self.agents.values():
            agent.stop()
        for pid in self.tasks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster(
    made: Lab,
    *names: str,
    login: bool = False,
    consul: str = "newest",
    loopback: bool = False,
    vault: bool = False,
) -> Iterator[NomadCluster]:
    """A Nomad on these hosts of a lab, started and ready."""
    nomad = NomadCluster(made, names, login, loopback, vault)
    try:
        nomad.start(consul)
        yield nomad
    finally:
        nomad.end()
