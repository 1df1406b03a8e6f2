"""`make nomad`: the job files of this folder on a dev Nomad and Consul of this machine, until Ctrl-C.

    python nomad/demo.py [--driver docker --image ztna-mesh:0.1.0 --app-image python:3.11-slim-bookworm]

Relay, dnsd, agent, a host's connector, an application with a connector beside it, and a service that has the tag alone.
Everything is on loopback and runs as the caller, with throw-away certificates; it is all gone at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from ztna.ca import Authority, write_private
from ztna.cli.mesh import DEMO_POOL, consul_version, dev_consul_argv
from ztna.cli.processes import Child, Ports, console_script, stop_in_order
from ztna.errors import ZtnaError

JOBS = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("ZTNA_PEERS_DIR", Path.home() / ".cache" / "ztna-mesh" / "peers"))
"""Where `make peers` keeps what it built; what is on PATH comes first."""
CERTIFICATE_DAYS = 2
AGENTS_SECONDS = 60.0
SERVED_SECONDS = 120.0
STOPPED_SECONDS = 60.0
ENDED_SECONDS = 15.0
POLL_SECONDS = 0.25
SERVICES = {"web-app": 8080, "plain-web": 8080}
"""The services and their ports at the virtual addresses."""

_SCRIPTS = {"dnsd": "ztna-dnsd", "relay": "ztna-relay"}
_WITH_KEYS = {"relay", "connector", "web-app"}
"""The jobs whose tasks run as the image's user and read a key."""
_NOMAD = """
data_dir = "{data}"
bind_addr = "127.0.0.1"
disable_update_check = true
ports {{
  http = {http}
  rpc  = {rpc}
  serf = {serf}
}}
consul {{
  address = "{consul}"
}}
plugin "raw_exec" {{
  config {{
    enabled = true
  }}
}}
client {{
  # Nothing on the network is asked what kind of machine this is.
  options = {{ "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }}
}}
"""


def binary(name: str) -> str:
    """Return the program of this name: on PATH, else the newest that `make peers` built. Raises ZtnaError."""
    found = shutil.which(name) or max(map(str, PEERS.glob(f"{name}-*")), key=_version, default=None)
    if found is None:
        raise ZtnaError(f"{name} is neither on PATH nor in {PEERS}: `make peers` builds it")
    return found


def _version(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.rpartition("-")[2].split(".") if part.isdigit())


@dataclass
class Demo:
    """The processes, and where everything is."""

    directory: Path
    options: argparse.Namespace
    ports: Ports = field(default_factory=Ports)
    jobs: list[str] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose = self.ports.choose
        self.nomad, self.consul = binary("nomad"), binary("consul")
        self.nomad_port, self.consul_port = choose("Nomad", 4646), choose("Consul", 8500)
        self.dns, self.relay, self.forwarder = (
            choose("dnsd", 5533),
            choose("relay", 4433),
            choose("forwarder", 4434),
        )
        serf, server = choose("Consul serf", 0), choose("Consul server", 0)
        argv = dev_consul_argv(self.consul, consul_version(self.consul), self.consul_port, serf, server)
        config = self.directory / "nomad.hcl"
        config.write_text(
            _NOMAD.format(
                data=self.directory / "nomad",
                http=self.nomad_port,
                rpc=choose("Nomad rpc", 0),
                serf=choose("Nomad serf", 0),
                consul=f"127.0.0.1:{self.consul_port}",
            )
        )
        self.consul_agent = Child("consul", argv, self.directory / "consul.log")
        self.nomad_agent = Child(
            "nomad",
            [self.nomad, "agent", "-dev", "-config", str(config)],
            self.directory / "nomad.log",
            {"AWS_CA_BUNDLE": ""},
        )

    @property
    def nomad_url(self) -> str:
        """Nomad's HTTP address."""
        return f"http://127.0.0.1:{self.nomad_port}"

    @property
    def consul_url(self) -> str:
        """Consul's HTTP address."""
        return f"http://127.0.0.1:{self.consul_port}"

    # -- starting ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the agents and the jobs; return when the services are reached at their addresses. Raises ZtnaError."""
        for purpose, wanted, given in self.ports.taken:
            print(f"port {wanted} ({purpose}) is taken; using {given}")
        print(f"starting {self.consul} and {self.nomad} in dev mode", flush=True)
        for child in (self.consul_agent, self.nomad_agent):
            await child.start()
        await self._until("Nomad has a ready client", AGENTS_SECONDS, self._client_is_ready)
        await self._until("Nomad has a key for its variables", AGENTS_SECONDS, self._keyring_is_ready)
        await self._keep_certificates()
        for job in ("dnsd", "relay", "agent", "connector", "web-app", "plain"):
            file = self.directory / f"{job}.vars.hcl"
            file.write_text(
                "".join(f"{key} = {json.dumps(value)}\n" for key, value in self._variables(job).items())
            )
            await self._run("job", "run", "-detach", f"-var-file={file}", str(JOBS / f"{job}.nomad.hcl"))
            self.jobs.append("plain-web" if job == "plain" else job)
            print(f"job {self.jobs[-1]} is submitted", flush=True)
        for service in SERVICES:
            await self._until(
                f"{service} is served", SERVED_SECONDS, functools.partial(self._is_served, service)
            )
        await self._until("the first deployment is over", SERVED_SECONDS, self._is_deployed)

    def _variables(self, job: str) -> dict[str, object]:
        pool, consul = {"pool": str(DEMO_POOL)}, {"consul": self.consul_url}
        driver, app = self._driver(job)
        sidecar = {"relay": f"127.0.0.1:{self.relay}", **driver, **consul}
        found: dict[str, dict[str, object]] = {
            "dnsd": {"port": self.dns, **pool, **driver, **consul},
            "relay": {
                "port": self.relay,
                "forwarder_port": self.forwarder,
                "resolver": f"127.0.0.1:{self.dns}",
                **driver,
            },
            "agent": {"mode": "listen", **pool, **sidecar},
            "connector": sidecar,
            "web-app": {
                "virtual_port": SERVICES["web-app"],
                **{f"app_{key}": value for key, value in app.items()},
                **sidecar,
            },
            "plain": {"virtual_port": SERVICES["plain-web"], "driver": self.options.driver, **app},
        }
        return found[job]

    def _driver(self, job: str) -> tuple[dict[str, object], dict[str, object]]:
        """Return what a daemon's and an application's task are run by."""
        script = _SCRIPTS.get(job, "ztna-sidecar")
        if self.options.driver == "raw_exec":
            return {"command": console_script(script)}, {"command": sys.executable}
        image: dict[str, object] = {"driver": self.options.driver, "image": self.options.image}
        if self.options.image_uid is not None and job in _WITH_KEYS:
            image["image_uid"] = self.options.image_uid
        return image, {"image": self.options.app_image}

    async def _keep_certificates(self) -> None:
        authority = Authority.create(self.directory / "ca", "make nomad")
        days = CERTIFICATE_DAYS
        issued = {
            "nomad/jobs/relay": authority.issue("relay", relay="edge-1", days=days),
            "nomad/jobs/agent": authority.issue("agent", agent=tuple(SERVICES), days=days),
            "nomad/jobs/connector": authority.issue(
                "connector", connector=("plain-web",), connector_id="host", days=days
            ),
            "nomad/jobs/web-app/web/connector": authority.issue(
                "web-app", connector=("web-app",), connector_id="nomad", days=days
            ),
        }
        for number, (path, (chain, key)) in enumerate(issued.items()):
            file = self.directory / f"{number}.json"
            items = {"certificate": chain.decode(), "key": key.decode(), "ca": authority.ca_pem.decode()}
            write_private(file, json.dumps({"Items": items}).encode())
            await self._run("var", "put", "-in=json", path, f"@{file}")

    async def _client_is_ready(self) -> bool:
        nodes = await self._get(f"{self.nomad_url}/v1/nodes")
        return bool(nodes) and all(node["Status"] == "ready" for node in nodes)

    async def _keyring_is_ready(self) -> bool:
        """Whether Nomad takes variables: a new leader makes the key that seals them when its clients are there."""
        keys = await self._get(f"{self.nomad_url}/v1/operator/keyring/keys")
        return any(key["State"] == "active" for key in keys or ())

    async def _is_deployed(self) -> bool:
        """Whether Nomad has found the application healthy: it scales nothing before."""
        found = await self._get(f"{self.nomad_url}/v1/job/web-app/deployment")
        return bool(found["Status"] == "successful")

    async def _is_served(self, service: str) -> bool:
        found = await self._get(f"{self.consul_url}/v1/kv/ztna/vip/service/{service}?raw")
        self.addresses[service] = found["ip"]
        async with aiohttp.ClientSession() as http, http.get(self.url(service)) as answer:
            return answer.status == 200

    def url(self, service: str) -> str:
        """Where a service is reached."""
        return f"http://{self.addresses[service]}:{SERVICES[service]}/"

    # -- what can be tried ---------------------------------------------------------------------------

    def commands(self) -> list[str]:
        """Return the lines that say what to try, with this mesh's own addresses."""
        dig = f"dig @127.0.0.1 -p {self.dns}"
        again = f"-var-file={self.directory}/web-app.vars.hcl {JOBS / 'web-app.nomad.hcl'}"
        return [
            "",
            "Try, from another terminal:",
            f"  export NOMAD_ADDR={self.nomad_url}",
            f"  {dig} web-app.ztna.local",
            f"  {dig} web-app.ztna.local SRV",
            f"  curl {self.url('web-app')}",
            f"  curl {self.url('plain-web')}",
            f"  {self.nomad} job status web-app",
            f"  {self.nomad} alloc logs -stderr -task connector -job web-app",
            f"  {self.nomad} job scale -detach web-app 3",
            f"  {self.nomad} job run -detach -var=count=3 -var=release=2 {again}",
            f"In a browser: {self.nomad_url}/ui/ and {self.consul_url}/ui/",
            f"Variables, configurations and logs: {self.directory}",
            "Ctrl-C ends everything.",
            "",
        ]

    async def watch(self) -> None:
        """Raise ZtnaError when one of the agents has ended."""
        while True:
            self._require_agents()
            await asyncio.sleep(POLL_SECONDS)

    # -- the end -------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop the jobs, so that each task leaves in order, then the agents."""
        if self.nomad_agent.running:
            try:
                await self._stop_jobs()
            except ZtnaError as error:
                print(f"not everything was stopped in order: {error}", flush=True)
        await stop_in_order([[self.nomad_agent], [self.consul_agent]], ENDED_SECONDS)

    async def _stop_jobs(self) -> None:
        for job in self.jobs:
            await self._run("job", "stop", "-detach", "-purge", "-no-shutdown-delay", job)
        await self._until("every task has ended", STOPPED_SECONDS, self._nothing_is_left)

    async def _nothing_is_left(self) -> bool:
        """Whether no allocation has a directory any more: Nomad removes it, once asked, when its tasks have ended."""
        await self._run("system", "gc")
        return not any((self.directory / "nomad" / "alloc").iterdir())

    # -- how -----------------------------------------------------------------------------------------

    async def _run(self, *argv: str) -> None:
        process = await asyncio.create_subprocess_exec(
            self.nomad,
            *argv,
            env=os.environ | {"NOMAD_ADDR": self.nomad_url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
        if process.returncode != 0:
            raise ZtnaError(f"nomad {' '.join(argv)}: {printed.decode(errors='replace').strip()}")

    @staticmethod
    async def _get(url: str) -> Any:
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url) as answer:
            if answer.status != 200:
                raise aiohttp.ClientError(f"{url}: {answer.status}")
            return json.loads(await answer.read())

    async def _until(self, what: str, seconds: float, condition: Callable[[], Awaitable[bool]]) -> None:
        deadline, last = time.monotonic() + seconds, "not yet"
        while True:
            self._require_agents()
            try:
                if await condition():
                    return
            except (aiohttp.ClientError, TimeoutError, KeyError) as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise ZtnaError(f"{what}: not within {seconds:.0f} s ({last}); see {self.directory}")
            await asyncio.sleep(POLL_SECONDS)

    def _require_agents(self) -> None:
        for child in (self.consul_agent, self.nomad_agent):
            if not child.running:
                raise child.ended_error()


async def run(directory: Path, options: argparse.Namespace) -> int:
    """Run everything until SIGINT or SIGTERM and return the exit status."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    demo = Demo(directory, options)
    stopped = asyncio.create_task(stopping.wait(), name="signals")
    body = asyncio.create_task(_body(demo), name="make nomad")
    try:
        await asyncio.wait((stopped, body), return_when=asyncio.FIRST_COMPLETED)
        if body.done():
            body.result()
        return 0
    finally:
        for task in (stopped, body):
            task.cancel()
        await asyncio.wait((stopped, body))
        print("stopping the jobs, Nomad and Consul", flush=True)
        await demo.stop()


async def _body(demo: Demo) -> None:
    began = time.monotonic()
    await demo.start()
    print(f"served after {time.monotonic() - began:.0f} s")
    print("\n".join(demo.commands()), flush=True)
    await demo.watch()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make nomad", description="A whole mesh as Nomad's jobs, until Ctrl-C."
    )
    parser.add_argument(
        "--driver", choices=["raw_exec", "docker"], default="raw_exec", help="what tasks run by"
    )
    parser.add_argument("--image", default="ztna-mesh:0.1.0", help="with docker: the image of the daemons")
    parser.add_argument("--image-uid", type=int, help="with docker: that image's user, where it is another")
    parser.add_argument(
        "--app-image", default="python:3.11-slim-bookworm", help="with docker: one with python3"
    )
    return parser.parse_args()


def main() -> int:
    """Run it in a directory of its own, which is removed at the end."""
    options = _options()
    directory = Path(tempfile.mkdtemp(prefix="ztna-nomad-"))
    try:
        return asyncio.run(run(directory, options))
    except ZtnaError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
