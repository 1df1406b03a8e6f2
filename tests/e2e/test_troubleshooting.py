"""The tools that say what is wrong, on a mesh of real processes: a sound one, then one thing broken after the other."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import Clocks
from tests.support.lab import Daemon, Lab, lab, tcp_route, udp_route, until
from ztna.config import Endpoint
from ztna.sections import Server

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

PAGE = Path(__file__).resolve().parents[2] / "docs/troubleshooting.md"
HTTP_PORT, UDP_PORT = 18080, 18007


class Mesh:
    """A sound mesh: two services, an agent on another host whose resolver is dnsd."""

    def __init__(self, made: Lab) -> None:
        self.lab = made
        core = made.host("core")
        self.backends = made.python(
            "backends", core, "-m", "tests.support.backends", "--http", str(HTTP_PORT), "--udp", str(UDP_PORT)
        )
        self.dnsd = made.dnsd(listen=Endpoint(core.address, 53), allow=(IPv4Network("0.0.0.0/0"),))
        self.relay = made.relay(resolvers=(Server(core.address, 53),), dns_insecure=True)
        routes = [
            tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT), 8080),
            udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
        ]
        self.connector = made.connector("alpha", routes)
        self.socket = made.directory / "agent.sock"
        self.agent: Daemon = made.agent(
            "laptop", ["web-app", "echo-service"], host="laptop", admin_socket=str(self.socket)
        )
        for name, daemon in {"connector": self.connector, "agent": self.agent}.items():
            assert daemon.config_file is not None
            (made.directory / f"{name}.yaml").symlink_to(daemon.config_file)
        for daemon in (self.dnsd, self.relay, self.connector, self.agent):
            daemon.wait_ready()
        self.vip = made.address("web-app", "laptop", server=core.address, port=53)

    def ztna(self, line: str, host: str = "laptop") -> tuple[int, str]:
        """Run a command line in the lab's folder on a host; its status and all it printed."""
        argv = [
            "sh",
            "-c",
            f"cd {self.lab.directory} && PATH={Path(sys.executable).parent}:$PATH exec {line}",
        ]
        done = self.lab.host(host).try_run(*argv)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    def findings(
        self, *names: str, host: str = "laptop", environment: Mapping[str, str] | None = None
    ) -> dict[str, dict[str, str]]:
        """Return what the doctor finds, by check; the last of a name counts."""
        files = " ".join(f"--config {name}.yaml" for name in names)
        given = " ".join(f"{name}={value}" for name, value in (environment or {}).items())
        _, text = self.ztna(f"env {given} ztna doctor {files} --json", host)
        return {each["check"]: each for each in json.loads(text)}

    def steps(self, service: str) -> dict[str, dict[str, Any]]:
        """Return the steps of a trace by name."""
        _, text = self.ztna(f"ztna trace {service} --config agent.yaml --json")
        return {each["step"]: each for each in json.loads(text)}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with lab("core", "laptop") as made:
        place = Path("/etc/netns") / made.host("laptop").namespace
        place.mkdir(parents=True)
        try:
            # `ip netns exec` shows this to what runs there as /etc/resolv.conf.
            (place / "resolv.conf").write_text(f"nameserver {made.host('core').address}\n")
            made.start_consul("newest")
            yield Mesh(made)
        finally:
            shutil.rmtree(place)


def test_the_commands_of_the_page_work_on_a_sound_mesh(mesh: Mesh) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        # Loopback is each host's own: what asks the daemons runs where they do.
        host = "core" if "relay.yaml" in line else "laptop"
        until(line, lambda line=line, host=host: _said(mesh, line, host))


def _said(mesh: Mesh, line: str, host: str) -> bool:
    if "status" in line:  # the agent is on the other host
        line = line.replace(" --config agent.yaml", "")
    (mesh.lab.directory / "report.tar.gz").unlink(missing_ok=True)
    code, text = mesh.ztna(line, host)
    wrong = [each for each in text.splitlines() if each.startswith("wrong")]
    # The doctor finds the agent's other host's view of loopback resolvers and ports fine too.
    if code != 0 or wrong:
        raise ValueError(f"{code}: {text}")
    return bool(text.strip())


def test_a_trace_goes_to_the_backend(mesh: Mesh) -> None:
    def sound() -> bool:
        steps = mesh.steps("web-app")
        failed = [step for step in steps.values() if step["ok"] is not True]
        if failed:
            raise ValueError(failed)
        assert list(steps) == [
            "name",
            "grant",
            "lease",
            "SRV",
            "relay",
            "session",
            "packet carrier",
            "backend tcp:8080",
        ]
        return True

    until("every step", sound)
    assert mesh.vip in mesh.steps("web-app")["name"]["told"]
    assert mesh.steps("web-app")["SRV"]["told"] == "alpha (weight 1)"
    assert mesh.steps("echo-service")["backend udp:7"]["ok"] is None, (
        "nobody knows what a UDP program answers"
    )
    steps = mesh.steps("billing")
    assert steps["grant"] == {
        "step": "grant",
        "ok": False,
        "told": "spiffe://ztna/laptop may not use billing",
        "reason": "no_grant",
    }
    code, text = mesh.ztna("ztna trace billing --config agent.yaml")
    assert code == 1 and "agent.<service>.ztna" in text, "it says what to do"


def test_a_trace_says_that_no_instance_passes(mesh: Mesh) -> None:
    mesh.backends.stop()
    try:

        def failed() -> bool:
            steps = mesh.steps("web-app")
            told = {name: step["reason"] for name, step in steps.items() if step["ok"] is False}
            return told == {"SRV": "no_healthy_connector", "session": "no_healthy_connector"}

        until("SRV and session fail", failed, 30)
        assert "none of its instances passes" in mesh.steps("web-app")["SRV"]["told"]
        at = f"{mesh.lab.host('core').address}:1"
        code, text = mesh.ztna(f"ztna trace web-app --config agent.yaml --dns {at}")
        assert code == 1 and "SRV: not known here" in text
    finally:
        mesh.backends.start()
    until("all is well", lambda: all(step["ok"] for step in mesh.steps("web-app").values()), 30)


def test_pings_say_the_path(mesh: Mesh) -> None:
    code, text = mesh.ztna("ztna ping echo-service --config agent.yaml --count 2 --interval 0.1 --json")
    pongs = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [each["connector_id"] for each in pongs] == ["alpha", "alpha"]
    assert all(each["ms"] > 0 and each["path"] in ("forwarded", "direct") for each in pongs)
    code, text = mesh.ztna("ztna ping billing --config agent.yaml --count 1")
    assert code == 1 and "no_such_service" in text and "0 answered" in text
    assert mesh.ztna("ztna ping web-app --count 1")[0] == 2, "it needs the agent's socket"


def test_status_shows_services_paths_and_refusals(mesh: Mesh) -> None:
    echo = mesh.lab.address("echo-service", "laptop", server=mesh.lab.host("core").address, port=53)
    with mesh.lab.host("laptop").socket(socket.SOCK_DGRAM) as program:
        program.settimeout(20.0)
        program.connect((echo, 7))
        program.send(b"hello")
        assert program.recv(100)
    code, text = mesh.ztna("ztna status --config agent.yaml")
    assert code == 0, text
    for words in ("agent ready", "relays", "web-app", mesh.vip, "alpha", "links", "forwarded", "refused: "):
        assert words in text, f"{words}: {text}"
    code, text = mesh.ztna("ztna status --config agent.yaml --json")
    told = json.loads(text)["agent"]["status"]["agent"]
    (relay,) = told["relays"]
    assert (relay["state"], relay["preferred"]) == ("up", True) and relay["rtt_ms"] > 0, relay
    (service,) = [each for each in told["services"] if each["service"] == "echo-service"]
    assert service["ip"] and service["listening"], service
    (link,) = told["links"]
    assert (link["connector"], link["carrier"]) == ("alpha", "quic"), link
    assert link["path"] in ("forwarded", "direct") and link["rtt_ms"] > 0, link
    assert link["sent_bytes"] > 0 and link["received_bytes"] > 0, link
    code, text = mesh.ztna(
        "ztna status --config relay.yaml --config connector.yaml --config dnsd.yaml --json", "core"
    )
    assert code == 0
    seen = json.loads(text)
    assert set(seen) == {"relay", "connector", "dnsd"}
    assert seen["relay"]["status"]["connections"]
    code, text = mesh.ztna("ztna status")
    assert code == 1 and "no daemon answers" in text, "the lab's admin ports are not the default ones"


def test_a_sound_host_passes_the_examination(mesh: Mesh) -> None:
    found = mesh.findings("dnsd", "relay", "connector", host="core") | mesh.findings("agent")
    wrong = {name: each for name, each in found.items() if each["verdict"] == "wrong"}
    assert wrong == {}
    for check in ("packages", "clock", "Consul", "UDP", "NAT", "MTU"):
        assert found[check]["verdict"] == "fine", found[check]
    for daemon in ("dnsd", "connector", "agent"):
        assert "has the" in found[f"{daemon} token"]["told"], "with exactly its policy of docs/policies"
    assert found["relay ports"]["told"].startswith("it runs")


def test_what_is_broken_is_named_with_what_to_do(mesh: Mesh) -> None:
    agent = (mesh.lab.directory / "agent.yaml").read_text()
    core = mesh.lab.host("core")

    def broken(old: str, new: str) -> dict[str, dict[str, str]]:
        changed = re.sub(old, new, agent, count=1)
        assert changed != agent
        (mesh.lab.directory / "broken.yaml").write_text(changed)
        return mesh.findings("broken")

    found = broken(r"token: \S+", "token: 00000000-0000-0000-0000-000000000000")
    assert any(
        each["verdict"] == "wrong" and "token" in each["told"] + each["todo"] for each in found.values()
    )
    less = mesh.lab.token_for('key "ztna/schema" { policy = "read" }')
    found = broken(r"token: \S+", f"token: {less}")
    assert found["agent token"]["verdict"] == "wrong" and "service any: read" in found["agent token"]["told"]
    assert "docs/policies/agent.hcl" in found["agent token"]["todo"]
    found = broken(r"address: http://\S+", f"address: http://{core.address}:1")
    assert found["Consul"]["verdict"] == "wrong" and "consul.address" in found["Consul"]["todo"]
    found = broken(r"name: relay\n", "name: another\n")
    assert found["UDP"]["verdict"] == "wrong"
    found = broken(r"certificate: /\S+", "certificate: /nowhere.pem")
    assert (
        found["agent certificate"]["verdict"] == "wrong"
        and "/nowhere.pem" in found["agent certificate"]["told"]
    )
    found = broken(r"agent:\n", "agent:\n  mode: lisen\n")
    assert "lisen" in found["configuration"]["told"]
    with mesh.lab.host("laptop").dropping("udp dport 4433"):
        found = mesh.findings("agent")
        assert found["UDP"]["verdict"] == "wrong" and "let UDP through" in found["UDP"]["todo"]
        assert found["NAT"]["verdict"] == "unknown"
    with socket_of(mesh, "laptop", 29434):
        found = broken(r"admin: \S+", "admin: 127.0.0.1:29434")
        assert "somebody else has it" in found["agent ports"]["told"]


def test_what_is_odd_about_a_host_is_named_with_what_to_do(mesh: Mesh, tmp_path: Path) -> None:
    laptop, clocks = mesh.lab.host("laptop"), Clocks(tmp_path, ("doctor",), 600)
    found = mesh.findings("agent", environment=clocks.environment("doctor"))
    assert found["clock"]["verdict"] == "wrong" and "600." in found["clock"]["told"], found["clock"]
    assert "NTP" in found["clock"]["todo"]

    other = tmp_path / "other"
    (other / "sidecar").mkdir(parents=True)
    (other / "sidecar/__init__.py").touch()
    found = mesh.findings("agent", environment={"PYTHONPATH": str(other)})
    assert (
        found["packages"]["verdict"] == "wrong" and "an environment of its own" in found["packages"]["todo"]
    )
    assert f"sidecar comes from {other}" in found["packages"]["told"]

    network = mesh.lab.network
    narrow = ("ip", "link", "set", network.port(laptop), "mtu")
    network.switch.run(*narrow, "1300")
    try:
        found = mesh.findings("agent")
        assert "small MTU" in found["MTU"]["todo"] and found["MTU"]["verdict"] == "warning", found["MTU"]
    finally:
        network.switch.run(*narrow, "1500")


def socket_of(mesh: Mesh, host: str, port: int) -> Any:
    made = mesh.lab.host(host).socket()
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_a_report_has_no_secret(mesh: Mesh) -> None:
    made = mesh.lab
    token = re.search(r"token: (\S+)", (made.directory / "agent.yaml").read_text())
    assert token is not None
    key = (made.directory / "laptop.key").read_text()
    (made.directory / "app.log").write_text(f"started with CONSUL_HTTP_TOKEN={token[1]}\n{key}\nthe end\n")
    target = made.directory / "secrets.tar.gz"
    code, text = mesh.ztna(f"ztna debug --config agent.yaml --log app.log --output {target}")
    assert code == 0 and target.stat().st_mode & 0o777 == 0o600, text
    with tarfile.open(target) as archive:
        parts = {each.name: archive.extractfile(each).read().decode() for each in archive.getmembers()}  # type: ignore[union-attr]
    everything = "\n".join(parts.values())
    assert token[1] not in everything and "PRIVATE KEY" not in everything
    body = "".join(key.splitlines()[1:-1])
    assert body[:40] not in everything
    assert "the end" in everything and "ztna_refusals" in everything and '"verdict"' in everything
    again = subprocess.run(
        [
            Path(sys.executable).with_name("ztna"),
            "debug",
            "--config",
            made.directory / "agent.yaml",
            "-o",
            target,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode == 2 and "exists" in again.stderr, "a file that is there is not written over"
