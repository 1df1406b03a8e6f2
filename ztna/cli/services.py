"""`ztna services`: what a connector of this host fronts, and adding, removing and judging services by its local API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ztna import config as configuration
from ztna import sections
from ztna.cli.admin import ask
from ztna.cli.status import printable
from ztna.errors import BadName, ConfigError
from ztna.jsontypes import to_json
from ztna.names import ServiceName

DEFAULT_API = "/run/ztna/connector.sock"
_WHO = "connector"


class Shown(msgspec.Struct, frozen=True):
    """One service as the connector shows it; what is about its health is there when it is fronted."""

    service: str
    origin: str = msgspec.field(name="from")
    shadowed: tuple[str, ...]
    problem: str | None
    fronted: bool
    ports: tuple[str, ...]
    verdict: str | None = None
    output: str = ""
    registered: bool = False


class _All(msgspec.Struct, frozen=True):
    services: tuple[Shown, ...]


@click.group()
def services() -> None:
    """Show, add and remove the services of a connector on this host."""


def _reaching(command: Any) -> Any:
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    command = click.option("--api", help=f"The path of its connector.api socket; default {DEFAULT_API}.")(
        command
    )
    return click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path),
        help="The connector's configuration, for where it is.",
    )(command)


@services.command("list")
@_reaching
def list_(file: Path | None, api: str | None, as_json: bool) -> None:
    """List every service that is defined: where, its ports, its health, and what is wrong.

    Exit status 1 when one of them cannot be fronted.
    """
    target = _api(file, api)
    if as_json:
        _, raw = ask(target, "/v1/services", dict[str, Any], who=_WHO)
        click.echo(to_json(raw["services"]).decode())
        found = msgspec.convert(raw, _All).services
    else:
        _, everything = ask(target, "/v1/services", _All, who=_WHO)
        found = everything.services
        grid = Grid("service", "from", "ports", "health", "in Consul", "detail")
        for each in found:
            grid.add_row(
                each.service,
                escape(printable(each.origin)),
                " ".join(each.ports),
                each.verdict or "not fronted",
                "yes" if each.registered else "no",
                escape(_detail(each)),
            )
        Console().print(grid)
    sys.exit(1 if any(each.problem for each in found) else 0)


@services.command()
@_reaching
@click.argument("name")
@click.option("--port", type=click.IntRange(1, 65535), help="The port on its virtual address.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="HOST:PORT",
    help="Where it really listens, or srv://NAME; several share the flows.",
)
@click.option(
    "--protocol",
    type=click.Choice(["tcp", "udp"]),
    default="tcp",
    show_default=True,
    help="What its port and its backends speak.",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="KIND[,KEY=VALUE...]",
    help="How its health is found out, e.g. http,path=/health or ttl,ttl_s=30.",
)
@click.option(
    "--routes",
    type=click.Path(path_type=Path),
    help="A file with `routes:` instead, as in connector.routes_dir.",
)
def add(
    file: Path | None,
    api: str | None,
    as_json: bool,
    name: str,
    port: int | None,
    backends: tuple[str, ...],
    protocol: str,
    checks: tuple[str, ...],
    routes: Path | None,
) -> None:
    """Add a service, or put another definition in the place of the one that was added before.

    It is kept over restarts. Exit status 1 when the connector refuses it.
    """
    service = _service(name)
    if routes is not None:
        body = _read(routes)
    elif port is None or not backends:
        raise click.UsageError("expected --port and --backend, or --routes FILE")
    else:
        body = {"routes": [_route(port, backends, protocol, checks)]}
    _, shown = ask(
        _api(file, api),
        f"/v1/services/{service}",
        dict[str, Any],
        method="PUT",
        body=to_json(body),
        who=_WHO,
    )
    if as_json:
        click.echo(to_json(shown).decode())
        return
    made = msgspec.convert(shown, Shown)
    detail = _detail(made)
    click.echo(f"{service} added" + (f": {detail}" if detail else ""))


@services.command()
@_reaching
@click.argument("name")
def remove(file: Path | None, api: str | None, as_json: bool, name: str) -> None:
    """Remove a service that was added; its flows may end. Exit status 1 when it was not added here."""
    service = _service(name)
    _, done = ask(_api(file, api), f"/v1/services/{service}", dict[str, Any], method="DELETE", who=_WHO)
    click.echo(to_json(done).decode() if as_json else f"{service} removed")


@services.command()
@_reaching
@click.argument("name")
@click.option("--pass", "status", flag_value="passing", help="It is well.")
@click.option("--warn", "status", flag_value="warning", help="It works, but somebody should look.")
@click.option("--fail", "status", flag_value="critical", help="It does not work.")
@click.option("--output", default="", help="What to tell people.")
def check(
    file: Path | None, api: str | None, as_json: bool, name: str, status: str | None, output: str
) -> None:
    """Say how a service is whose check is of kind ttl; within its ttl_s it has to be said again."""
    if status is None:
        raise click.UsageError("expected --pass, --warn or --fail")
    service = _service(name)
    _, done = ask(
        _api(file, api),
        f"/v1/services/{service}/check",
        dict[str, Any],
        method="PUT",
        body=to_json({"status": status, "output": output}),
        who=_WHO,
    )
    click.echo(to_json(done).decode() if as_json else f"{service} is {status}")


def _api(file: Path | None, api: str | None) -> str:
    if api is not None:
        return _path(api)
    if file is None:
        return DEFAULT_API
    try:
        connector = configuration.load(file, os.environ, {}, "connector").connector
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    if connector is None or connector.api is None:
        raise click.UsageError(f"{file} has no connector.api")
    return _path(connector.api)


def _path(text: str) -> str:
    """Return the path so that it is not taken for a host's name."""
    return text if "/" in text else f"./{text}"


def _service(name: str) -> ServiceName:
    try:
        return ServiceName(name)
    except BadName as error:
        raise click.UsageError(str(error)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return sections.read_file(path)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def _route(port: int, backends: tuple[str, ...], protocol: str, checks: tuple[str, ...]) -> dict[str, Any]:
    """Return the route of the flags, for the connector to judge."""
    route: dict[str, Any] = {"port": port, "protocol": protocol}
    if len(backends) == 1:
        route["backend"] = backends[0]
    else:
        route["backends"] = [{"address": each} for each in backends]
    if checks:
        route["checks"] = [_check(each) for each in checks]
    return route


def _check(text: str) -> dict[str, Any]:
    kind, *settings = text.split(",")
    made: dict[str, Any] = {"kind": kind}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--check {text}: expected KEY=VALUE, got {setting!r}")
        try:
            made[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise click.UsageError(f"--check {text}: expected a value after {key}=, got {value!r}") from None
    return made


def _detail(each: Shown) -> str:
    conflict = f"also defined by {', '.join(each.shadowed)}, which does not count" if each.shadowed else ""
    health = each.output if each.verdict != "passing" else ""
    return printable("; ".join(filter(None, (each.problem, conflict, health))))
