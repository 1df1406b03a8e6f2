"""What operators see of a mesh of real processes: a real Prometheus scrapes it, `ztna top` shows it, bash completes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.console import command, require_tools
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, udp_ask, udp_route, until
from tests.unit.test_prometheus_rules import RULES, rules, strangers
from ztna.config import Endpoint
from ztna.sections import Server
from ztna.telemetry import METRICS, Documented

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/monitoring.md"
DASHBOARD = ROOT / "ztna/host/prometheus/ztna-dashboard.json"
PROMETHEUS_PORT = 9090
TCP_PORT, UDP_PORT = 18081, 18007
ALTERNATE_SCREEN, MAIN_SCREEN, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
EXPECTED_SOON = {
    "agent": {"ztna_flows", "ztna_relays", "ztna_flow_open_seconds_count", "ztna_link_bytes_total"},
    "connector": {"ztna_connector_service_health", "ztna_sessions", "ztna_consul_requests_total"},
    "dnsd": {"ztna_dns_served", "ztna_keeper", "ztna_pool_addresses", "ztna_dns_queries_total"},
    "relay": {
        "ztna_relay_catalog_age_seconds",
        "ztna_forwarded_bytes_total",
        "ztna_relay_session_open_seconds_count",
    },
}
"""Of each daemon some that must be there once there was traffic."""


class Mesh:
    """Everything on one host, as `docs/monitoring.md` has it: all daemons, two services, and Prometheus."""

    def __init__(self, made: Lab) -> None:
        self.lab = made
        self.core = core = made.host("core")
        made.python(
            "backends", core, "-m", "tests.support.backends", "--tcp", str(TCP_PORT), "--udp", str(UDP_PORT)
        )
        self.dnsd = made.dnsd()
        self.relay = made.relay(resolvers=(Server("127.0.0.1", 5533),))
        routes = [
            tcp_route("web-app", Endpoint("127.0.0.1", TCP_PORT), 8080),
            udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
        ]
        self.connector = made.connector("alpha", routes)
        self.agent = made.agent("laptop", ["web-app", "echo-service"])
        self.daemons: dict[str, Daemon] = {
            "dnsd": self.dnsd,
            "relay": self.relay,
            "connector": self.connector,
            "agent": self.agent,
        }
        for daemon in self.daemons.values():
            daemon.wait_ready()
        self.vip = made.address("web-app")
        self.files = [
            arg for daemon in self.daemons.values() for arg in ("--config", str(daemon.config_file))
        ]

    def traffic(self) -> None:
        """Use both services once."""
        with self.flow() as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
        echo = self.lab.address("echo-service")
        until("an echo", lambda: udp_ask(self.core, echo, 7, b"hello"))

    @contextlib.contextmanager
    def flow(self) -> Iterator[socket.socket]:
        """A connection to the echo behind web-app."""
        with self.core.socket() as sock:
            sock.settimeout(20)
            sock.connect((self.vip, 8080))
            yield sock

    def argv(self, *argv: str) -> list[str]:
        """Return the arguments that run one of our commands on the host."""
        return [*self.core.prefix, command(argv[0]), *argv[1:]]

    def ztna(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run `ztna` on the host to its end."""
        return self.core.try_run(command("ztna"), *argv)

    def prometheus(self, path: str, **asked: str) -> Any:
        """Ask Prometheus's API."""
        url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
        code, text = http_get(self.core, url)
        answer = json.loads(text)
        assert code == 200 and answer["status"] == "success", f"{path} {asked}: {text}"
        return answer["data"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    require_tools("prometheus", "promtool")
    with lab("core") as made:
        made.start_consul("newest")
        mesh = Mesh(made)
        until("traffic", lambda: mesh.traffic() or True, 30)
        yield mesh


@pytest.fixture(scope="module")
def scraped(mesh: Mesh) -> Mesh:
    """The mesh once Prometheus has scraped all of it twice, by the configuration that we ship."""
    place = mesh.lab.directory / "prometheus"
    subprocess.run(
        mesh.argv("ztna", "init", "prometheus", "--dir", str(place)), check=True, capture_output=True
    )
    config = yaml.safe_load((place / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        daemon = mesh.daemons[job["job_name"].removeprefix("ztna-")]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{daemon.admin_port}"]}]
    (place / "prometheus.yml").write_text(yaml.safe_dump(config))
    mesh.lab.spawn(
        "prometheus",
        mesh.core,
        "prometheus",
        f"--config.file={place}/prometheus.yml",
        f"--storage.tsdb.path={place}/data",
        f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}",
        "--enable-feature=exemplar-storage",
    )
    until("all are scraped", lambda: _is_scraped(mesh), 60)
    return mesh


def _is_scraped(mesh: Mesh) -> bool:
    targets = mesh.prometheus("targets")["activeTargets"]
    wrong = [each["lastError"] for each in targets if each["lastError"]]
    if wrong:
        raise ValueError(wrong)
    counted = mesh.prometheus("query", query="min(count_over_time(ztna_ready[1m]))")["result"]
    return len(targets) == 4 and bool(counted) and float(counted[0]["value"][1]) >= 2


def test_prometheus_gets_of_each_daemon_what_the_list_says_and_nothing_else(scraped: Mesh) -> None:
    for role, expected in EXPECTED_SOON.items():
        found = scraped.prometheus("series", **{"match[]": f'{{job="ztna-{role}"}}'})
        names = {each["__name__"] for each in found}
        assert expected <= names, f"{role}: {expected - names}"
        for each in found:
            documented = _documented(each["__name__"])
            if each["__name__"].startswith("ztna_"):
                assert documented is not None, each
                assert role in documented.daemons, each
                assert each.keys() - {"__name__", "job", "instance", "le"} <= _as_scraped(documented), each


def test_what_goes_on_is_counted_where_it_happens(mesh: Mesh) -> None:
    def counts() -> dict[str, float]:
        agent, connector, relay, dnsd = mesh.agent, mesh.connector, mesh.relay, mesh.dnsd
        return {
            "agent sent": agent.metric("ztna_link_bytes_total", carrier="stream", direction="sent"),
            "agent received": agent.metric("ztna_link_bytes_total", carrier="stream", direction="received"),
            "connector sent": connector.metric("ztna_link_bytes_total", carrier="stream", direction="sent"),
            "datagrams": agent.metric("ztna_link_bytes_total", carrier="packet", direction="sent"),
            "flows opened": agent.metric("ztna_flow_open_seconds_count"),
            "relay forwarded udp": relay.metric("ztna_forwarded_bytes_total", carrier="udp"),
            "loop asked": relay.metric("ztna_event_loop_lag_seconds_count"),
            "Consul answered": dnsd.metric("ztna_consul_requests_total", outcome="answered"),
            "queries": dnsd.metric("ztna_dns_queries_total", transport="udp"),
        }

    def moved() -> bool:
        with mesh.flow() as sock:
            sock.sendall(b"x" * 20_000)
            assert len(sock.recv(20_000, socket.MSG_WAITALL)) == 20_000
            assert mesh.agent.metric("ztna_flows", protocol="tcp") == 1
        mesh.traffic()
        now = counts()
        return all(now[what] > count for what, count in before.items()) and now["agent sent"] >= 20_000

    before = counts()
    until("every count to rise", moved, 60)
    for daemon, where in ((mesh.relay, "relay"), (mesh.agent, "packet_carrier"), (mesh.connector, "tls")):
        assert daemon.metric("ztna_handshake_seconds_count", where=where) >= 1
    assert mesh.agent.metric("ztna_relays", state="connected") == 1
    assert mesh.connector.metric("ztna_connector_service_health", service="web-app") == 2
    assert mesh.relay.metric("ztna_relay_session_open_seconds_count") >= 2
    assert mesh.dnsd.metric("ztna_dns_services") == 2
    for daemon in (mesh.dnsd, mesh.connector, mesh.agent):
        assert daemon.metric("ztna_consul_requests_total", outcome="rejected") == 0


def _documented(series: str) -> Documented | None:
    names = {each.name: each for each in METRICS.values()}
    return names.get(series) or names.get(re.sub(r"_(bucket|sum|count)$", "", series))


def _as_scraped(documented: Documented) -> set[str]:
    return set(documented.labels)


def test_openmetrics_is_agreed_on_and_sessions_come_as_exemplars(scraped: Mesh) -> None:
    scraped.traffic()
    now = time.time()
    asked = {"query": "ztna_flow_open_seconds_bucket", "start": str(now - 300), "end": str(now + 300)}
    found = until("an exemplar", lambda: scraped.prometheus("query_exemplars", **asked))
    session = found[0]["exemplars"][0]["labels"]["session"]
    assert re.fullmatch("[0-9a-f]{16}", session)
    known = {each["session"] for each in scraped.relay.status()["sessions"]}
    assert session in known, "the very id that the relay has"


def test_the_alerts_are_well_on_a_sound_mesh_and_one_fires_when_a_service_is_critical(scraped: Mesh) -> None:
    loaded = [rule for group in scraped.prometheus("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == set(rules())

    def evaluated() -> bool:
        told = [rule for group in scraped.prometheus("rules")["groups"] for rule in group["rules"]]
        assert not [rule["lastError"] for rule in told if rule["health"] == "err"]
        return all(rule["health"] == "ok" for rule in told)

    until("all are evaluated", evaluated)
    alerts = scraped.prometheus("alerts")["alerts"]
    assert not [each for each in alerts if each["labels"]["severity"] == "critical"], alerts


def _panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text())["panels"])


def test_every_panel_of_the_dashboard_asks_what_prometheus_answers(scraped: Mesh) -> None:
    for panel in _panels():
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".+")
            scraped.prometheus("query", query=expr)


def test_panels_that_a_sound_mesh_fills_are_filled(scraped: Mesh) -> None:
    empty = []
    for panel in _panels():
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".+")
            if not scraped.prometheus("query", query=expr)["result"]:
                empty.append(panel["title"])
    # Nothing of it happened: no upstreams, nothing thrown away or refused, no carrier broke, no session ended.
    assert set(empty) <= {
        "Handed to upstreams",
        "Drops",
        "Refusals",
        "Broken carriers",
        "Sessions opened and closed",
        "Lease changes",
    }


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "ztna-mesh" and dashboard["id"] is None
    assert {each["name"]: each["type"] for each in dashboard["templating"]["list"]} == {
        "datasource": "datasource",
        "instance": "query",
    }
    panels = _panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Every daemon", "Consul", "dnsd", "Relays", "Agents and connectors", "Connectors"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$instance" in target["expr"] and not strangers(target["expr"]), target["expr"]


def test_the_commands_of_the_page_work_in_order(mesh: Mesh, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in (line for block in blocks for line in block.splitlines()):
        if line.startswith("ztna top"):
            line = f"{line} {shlex.join(mesh.files)}"
        path = f"PATH={Path(sys.executable).parent}:$PATH"
        done = mesh.core.try_run("sh", "-c", f"cd {tmp_path} && {path} && {line}")
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "monitoring/ztna-alerts.yaml").read_text() == RULES.read_text()
    again = mesh.ztna("init", "prometheus", "--dir", str(tmp_path / "monitoring"))
    assert again.stdout.count("kept") == 3


# --- ztna top


def test_top_follows_rates_as_json_a_line_each(mesh: Mesh) -> None:
    argv = mesh.argv("ztna", "top", "--json", "--interval", "0.3", *mesh.files)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process, mesh.flow() as sock:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                web = next(each for each in told["services"] if each["service"] == "web-app")
                sock.sendall(b"x" * 10_000)
                assert len(sock.recv(10_000, socket.MSG_WAITALL)) == 10_000
                if web["sent_per_s"] and web["received_per_s"]:
                    break
            assert set(told["daemons"]) == {"dnsd", "relay", "connector", "agent"}
            assert all(told["daemons"].values()) and not told["errors"]
            assert web["address"] == mesh.vip and web["health"] == "passing"
            assert (web["flows"], web["connectors"]) == (1, ["alpha"])
            assert web["sessions"] >= 1 and web["sent_bytes"] >= 10_000
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_top_without_a_terminal_says_so_and_prints_one_table(mesh: Mesh) -> None:
    done = mesh.ztna("top", "--interval", "0.3", *mesh.files)
    assert done.returncode == 0
    assert "no terminal" in done.stderr
    assert "web-app" in done.stdout and "relay ready" in done.stdout and "\x1b" not in done.stdout


def test_top_tells_two_daemons_of_one_kind_apart(mesh: Mesh) -> None:
    relay = str(mesh.relay.config_file)
    done = mesh.ztna("top", "--once", "--interval", "0.2", "--config", relay, "--config", relay)
    assert done.stdout.count(f"relay 127.0.0.1:{mesh.relay.admin_port} ready") == 1
    told = json.loads(mesh.ztna("top", "--once", "--interval", "0.2", "--json", "--config", relay).stdout)
    assert told["daemons"] == {"relay": True}


def test_top_with_nobody_there_fails_and_says_why(mesh: Mesh) -> None:
    done = mesh.ztna("top", "--once", "--interval", "0.2")
    assert done.returncode == 1
    assert "no daemon answers" in done.stdout


class Terminal:
    """A terminal of its own with a program on it."""

    def __init__(self, argv: list[str], columns: int = 80, lines: int = 24) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        environment = os.environ | {"TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *argv], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        self.slave = slave
        self.text = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shows(self, what: str, seconds: float = 20.0) -> str:
        """Read until that is shown; return what came with it, and forget what came before."""

        def seen() -> str:
            while select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65_536).decode(errors="replace")
            return self.text if what in CONTROL.sub("", self.text) else ""

        shown: str = until(f"{what!r} on the terminal", seen, seconds)
        self.text = ""
        return shown

    def ended(self, seconds: float = 10.0) -> int:
        """Wait for the end, reading on; return the status. The terminal must be as it was."""

        def over() -> bool:
            while select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65_536).decode(errors="replace")
            return self.process.poll() is not None

        until("the end", over, seconds)
        over()
        assert termios.tcgetattr(self.slave) == self.before
        assert self.text.rfind(MAIN_SCREEN) > self.text.rfind(ALTERNATE_SCREEN)
        assert CURSOR in self.text, "the cursor is shown again"
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self.slave)
        os.close(self.master)


@contextlib.contextmanager
def terminal(argv: list[str], **size: int) -> Iterator[Terminal]:
    made = Terminal(argv, **size)
    try:
        yield made
    finally:
        made.close()


def plain(text: str) -> list[str]:
    """Return the lines without what moves the cursor or colours."""
    return CONTROL.sub("", text).replace("\r", "").split("\n")


def test_top_lives_on_eighty_columns_sorts_resizes_and_leaves_the_terminal_as_it_was(mesh: Mesh) -> None:
    with terminal(mesh.argv("ztna", "top", "--interval", "0.5", *mesh.files)) as screen:
        shown = screen.shows("echo-service")
        assert ALTERNATE_SCREEN in shown
        assert max(map(len, plain(shown))) <= 80
        assert all(word in shown for word in ("web-app", "passing", mesh.vip, "by service", "q ends"))
        assert "connectors" not in shown, "for which there is no room"
        screen.type(b"s")
        screen.shows("by rate")
        screen.resize(120, 40)
        shown = screen.shows("connectors")
        assert "alpha" in shown
        screen.type(b"q")
        assert screen.ended() == 0


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_top_ends_cleanly_however_it_is_ended(mesh: Mesh, how: str) -> None:
    with terminal(mesh.argv("ztna", "top", *mesh.files)) as screen:
        screen.shows("web-app")
        if how == "ctrl-c":
            screen.type(b"\x03")
        else:
            screen.process.send_signal(signal.SIGTERM)
        assert screen.ended() == 0


# --- completion


def complete(mesh: Mesh, line: str) -> set[str]:
    """Return what a real bash offers for a line, by the script that `ztna completion bash` prints."""
    words = line.split(" ")
    script = f"""
        eval "$(ztna completion bash)"
        complete -p ztna >/dev/null || exit 3
        COMP_WORDS=({shlex.join(words[:-1])} {shlex.quote(words[-1])})
        COMP_CWORD={len(words) - 1}
        compopt() {{ :; }}
        _ztna_completion ztna
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    done = mesh.core.try_run("env", path, "bash", "--norc", "--noprofile", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_options_services_and_sessions(mesh: Mesh) -> None:
    assert complete(mesh, "ztna comp") == {"completion"}
    assert complete(mesh, "ztna completion ") == {"bash", "zsh", "fish"}
    assert complete(mesh, "ztna top --s") == {"--sort"}
    agent, relay = mesh.agent.config_file, mesh.relay.config_file
    assert complete(mesh, f"ztna ping --config {agent} ") == {"web-app", "echo-service"}
    assert complete(mesh, f"ztna trace --config {agent} we") == {"web-app"}
    mesh.traffic()
    sessions = {each["session"] for each in mesh.relay.status()["sessions"]}
    assert complete(mesh, f"ztna sessions close --config {relay} ") == sessions
    # Nobody answers: nothing is offered, and nothing is said.
    assert complete(mesh, "ztna ping ") == set()
    assert complete(mesh, "ztna ping --config /nowhere.yaml ") == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_of_its_shell(shell: str, tmp_path: Path) -> None:
    ztna = str(Path(sys.executable).parent / "ztna")
    script = subprocess.run(
        [ztna, "completion", shell], capture_output=True, text=True, timeout=30, check=True
    )
    assert f"_ZTNA_COMPLETE={shell}_complete" in script.stdout
    if shutil.which(shell):
        (tmp_path / "script").write_text(script.stdout)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=30)


# --- and last, what ends a daemon of the mesh


def test_a_daemon_that_goes_away_is_shown_and_so_is_its_return(mesh: Mesh) -> None:
    with terminal(mesh.argv("ztna", "top", "--interval", "0.3", *mesh.files), columns=100) as screen:
        screen.shows("agent ready")
        mesh.agent.signal(signal.SIGSTOP)
        screen.shows("agent does not answer")
        mesh.agent.signal(signal.SIGCONT)
        screen.shows("agent ready")
        assert mesh.agent.stop() == 0
        screen.shows("agent does not answer")
        screen.shows("web-app")
        mesh.agent.start()
        screen.shows("agent ready", 40)
        screen.type(b"q")
        assert screen.ended() == 0
