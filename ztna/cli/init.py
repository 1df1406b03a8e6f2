"""`ztna init host | laptop | prometheus`: write first configurations and units, and say what comes next.

Never over a file that is there: such a file is left as it is, and named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from ipaddress import IPv4Network
from pathlib import Path
from string import Template
from typing import TypedDict, Unpack

import click
import yaml

from ztna import sections
from ztna.cli.processes import console_script
from ztna.config import Config
from ztna.errors import ConfigError

DAEMONS = ("dnsd", "relay", "connector", "agent")
DIRECTORY = Path("/etc/ztna")
PORTS_OF_ANYBODY = 1024
"""Listening below needs a capability (ip(7), net.ipv4.ip_unprivileged_port_start)."""
LOOPBACK = IPv4Network("127.0.0.0/8")
PACKAGED_UNITS = Path("/usr/lib/systemd/system")
PACKAGED_DROP_INS = Path("/usr/lib/ztna-mesh/drop-ins")
HIDDEN_FROM_UNITS = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""What ProtectHome= and PrivateTmp= of the units hide from the daemons."""

_FILES = resources.files("ztna") / "host"
_GRANTS = {
    "relay": "--relay {relay_name}",
    "connector": "--connector web-app --connector-id {connector_id}",
    "agent": "--agent web-app",
}
_PROGRAMS = {
    "dnsd": "ztna-dnsd",
    "relay": "ztna-relay",
    "connector": "ztna-sidecar connector",
    "agent": "ztna-sidecar agent",
}
_COMMON = (
    click.option(
        "--dir",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        default=DIRECTORY,
        show_default=True,
        help="Where configurations and certificates are.",
    ),
    click.option("--relay", default="relay.example.net:4433", show_default=True, help="Where the relay is."),
    click.option("--relay-name", default="edge-1", show_default=True, help="The name in its certificate."),
    click.option("--pool", default="127.100.0.0/16", show_default=True, help="The mesh's virtual addresses."),
    click.option(
        "--units",
        type=click.Path(file_okay=False, path_type=Path),
        help="Write systemd units to this directory too, /etc/systemd/system for one; a package brings its own.",
    ),
)


class _Asked(TypedDict):
    """The options that both have."""

    directory: Path
    relay: str
    relay_name: str
    pool: str
    units: Path | None


@dataclass(frozen=True)
class _Plan:
    """What is written: each daemon's template, and what stands in it."""

    templates: Mapping[str, str]
    directory: Path
    units: Path | None
    values: Mapping[str, str]

    @property
    def mode(self) -> str:
        """Of the agent."""
        return self.values["mode"]


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_COMMON):
        command = option(command)
    return command


@click.group()
def init() -> None:
    """Write a first configuration, and say what comes next."""


@init.command()
@_common
@click.option("--daemon", "daemons", multiple=True, type=click.Choice(DAEMONS), help="Only this; repeatable.")
@click.option("--connector-id", default="rack-7", show_default=True, help="The connector's id.")
def host(daemons: Sequence[str], connector_id: str, **asked: Unpack[_Asked]) -> None:
    """Write the configurations of the daemons that a host beside Consul may run."""
    templates = {name: name for name in DAEMONS if name in daemons or not daemons}
    _carry_out(_plan(templates, "anyip", asked, connector_id))


@init.command()
@_common
def laptop(**asked: Unpack[_Asked]) -> None:
    """Write the configuration of an agent that reaches nothing but a relay."""
    _carry_out(_plan({"agent": "laptop"}, "tun", asked))


@init.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default=True,
    help="Where to write them.",
)
def prometheus(directory: Path) -> None:
    """Write a scrape configuration and the alerts for Prometheus, and a dashboard for Grafana to import."""
    for file in sorted((_FILES / "prometheus").iterdir(), key=lambda each: each.name):
        _tell(directory / file.name, file.read_text(), "name another --dir")
    _say_next(_steps_to_see(directory))


def _plan(templates: Mapping[str, str], mode: str, asked: _Asked, connector_id: str = "") -> _Plan:
    """Choose the agent's mode by the pool; `mode` is for one that needs privileges."""
    try:
        pool = IPv4Network(asked["pool"])
    except ValueError as error:
        raise click.BadParameter(f"{error}; expected one as 127.100.0.0/16", param_hint="--pool") from None
    relay_host, _, relay_port = asked["relay"].rpartition(":")
    if not relay_host or not relay_port.isdecimal():
        raise click.BadParameter(f"expected host:port, got {asked['relay']!r}", param_hint="--relay")
    values = {
        "directory": str(asked["directory"].absolute()),
        "relay": asked["relay"],
        "relay_name": asked["relay_name"],
        "relay_port": relay_port,
        "pool": str(pool),
        "mode": "listen" if pool.subnet_of(LOOPBACK) else mode,
        "connector_id": connector_id,
    }
    return _Plan(templates, Path(values["directory"]), asked["units"], values)


def _carry_out(plan: _Plan) -> None:
    texts = {plan.directory / f"{name}.yaml": _configuration(plan, name) for name in plan.templates}
    units = {} if plan.units is None else dict(_units(plan, plan.units))
    for option, files in (("--dir", texts), ("--units", units)):
        for path, text in files.items():
            _tell(path, text, f"name another {option}", "run it as root")
    _say_next(_next_steps(plan))


def _configuration(plan: _Plan, name: str) -> str:
    """Return the text of a daemon's configuration, which the daemon accepts."""
    template = (_FILES / "config" / f"{plan.templates[name]}.yaml").read_text()
    text = Template(template).substitute(plan.values)
    try:
        sections.build(Config, yaml.safe_load(text))
    except (ConfigError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise click.UsageError(f"with these options {name} would refuse its configuration: {told}") from None
    return text


def _units(plan: _Plan, folder: Path) -> Iterator[tuple[Path, str]]:
    """Return the units that start this installation's programs, and the drop-in that the agent's mode needs."""
    for name in plan.templates:
        program = Path(console_script(_PROGRAMS[name].partition(" ")[0]))
        if any(program.is_relative_to(hidden) for hidden in HIDDEN_FROM_UNITS):
            raise click.UsageError(
                f"{program} is hidden from units (ProtectHome=, PrivateTmp=): install it elsewhere, "
                "e.g. PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx install ztna-mesh"
            )
        text = (_FILES / "systemd" / f"ztna-{name}.service").read_text()
        text = text.replace(f"/usr/bin/{program.name} ", f"{program} ")
        yield folder / f"ztna-{name}.service", text.replace(f"{DIRECTORY}/", f"{plan.directory}/")
    for name, drop_in in _drop_ins(plan):
        yield folder / f"ztna-{name}.service.d" / drop_in, (_FILES / "drop-ins" / drop_in).read_text()


def _drop_ins(plan: _Plan) -> Iterator[tuple[str, str]]:
    """Return what gives a daemon the capabilities that its configuration needs."""
    if "agent" in plan.templates and plan.mode != "listen":
        yield "agent", f"agent-{plan.mode}.conf"
    if "relay" in plan.templates and int(plan.values["relay_port"]) < PORTS_OF_ANYBODY:
        yield "relay", "low-ports.conf"


def _tell(path: Path, text: str, advice: str, with_rights: str = "") -> None:
    """Write a file that is not there. Raises ConfigError with the advice; `with_rights` is for who lacks them."""
    try:
        was_written = _write(path, text)
    except PermissionError as error:
        told = f"{with_rights}, or {advice}" if with_rights and os.geteuid() != 0 else advice
        raise ConfigError(f"{path} cannot be written: {error.strerror}; {told}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; mend that, or {advice}") from None
    click.echo(f"wrote {path}" if was_written else f"kept  {path}, which was there")


def _write(path: Path, text: str) -> bool:
    """Write a file whole, or not at all; return False when there is one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink()  # half a file would be kept by the next attempt
        raise
    return True


def _say_next(steps: Iterator[str]) -> None:
    click.echo("\nNext:")
    for number, step in enumerate(steps, 1):
        click.echo(f"{number}. {step}")


def _steps_to_see(directory: Path) -> Iterator[str]:
    file = directory / "prometheus.yml"
    yield (
        "Name the hosts' admin ports in it where they are not the default ones, and have it checked:"
        f"\n     promtool check config {file}"
    )
    yield f"Have Prometheus read it:\n     prometheus --config.file={file}"
    yield f"Import {directory / 'ztna-dashboard.json'} into Grafana"
    yield "What each alert means and what to do about it: docs/runbook.md"


def _next_steps(plan: _Plan) -> Iterator[str]:
    certified = [name for name in plan.templates if name in _GRANTS]
    if certified:
        yield (
            "Where the authority is (`ztna ca init` makes one), issue certificates, and bring them, their keys "
            f"and ztna-ca/ca.pem to {plan.directory}:"
            + "".join(
                f"\n     ztna ca issue {name} {_GRANTS[name].format(**plan.values)}" for name in certified
            )
        )
    files = [str(plan.directory / f"{name}.yaml") for name in plan.templates]
    yield "Change what is different here, and have it checked:" + "".join(
        f"\n     ztna check-config {file}" for file in files
    )
    yield _how_to_start(plan)
    if plan.templates.get("agent") == "laptop" or "dnsd" in plan.templates:
        yield "Have this host ask for the zone:\n     ztna dns install --server 127.0.0.1:5533"
    yield "See what is wrong, if anything is:\n     ztna doctor " + " ".join(
        f"--config {file}" for file in files
    )


def _how_to_start(plan: _Plan) -> str:
    units = [f"ztna-{name}" for name in plan.templates]
    if plan.units is not None or (PACKAGED_UNITS / f"{units[0]}.service").exists():
        lines = ["systemctl daemon-reload", f"systemctl enable --now {' '.join(units)}"]
        if plan.units is None:
            lines = [
                f"install -Dm644 -t /etc/systemd/system/ztna-{name}.service.d {PACKAGED_DROP_INS / drop_in}"
                for name, drop_in in _drop_ins(plan)
            ] + lines
        return "Start:" + "".join(f"\n     {line}" for line in lines)
    return "Start (--units writes units for systemd):" + "".join(
        f"\n     {_PROGRAMS[name]} --config {plan.directory / name}.yaml" for name in plan.templates
    )
