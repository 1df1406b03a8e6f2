"""`ztna sessions`: what a relay's sessions are, and ending some of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from ztna import config as configuration
from ztna.cli import admin, completing
from ztna.errors import BadName, ConfigError
from ztna.names import SessionId

DEFAULT_ADMIN = "127.0.0.1:9431"


class Shown(msgspec.Struct, frozen=True):
    """One session as a relay shows it."""

    session: str
    service: str
    agent: str
    connector_id: str
    open: bool
    age_s: float | None
    path: str
    bytes: int
    link_bytes: int


class _Relay(msgspec.Struct, frozen=True):
    sessions: int = 0


class _Status(msgspec.Struct, frozen=True):
    sessions: tuple[Shown, ...]
    relay: _Relay


class _Done(msgspec.Struct, frozen=True):
    done: bool


@click.group()
def sessions() -> None:
    """Show and end the sessions of a relay on this host."""


config_option = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="The relay's configuration, for where it is."
)


@sessions.command("list")
@config_option
@click.option("--relay", "address", help="Its admin address, host:port, or the path of its admin_socket.")
@click.option("--service", help="Only sessions with this service.", shell_complete=completing.services)
@click.option("--agent", help="Only sessions of the agent with this name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(
    file: Path | None, address: str | None, service: str | None, agent: str | None, as_json: bool
) -> None:
    """List sessions: who, service, connector, path, bytes seen by the relay, age."""
    found, total = _fetch(_admin(file, address))
    shown = [each for each in found if service in (None, each.service) and agent in (None, each.agent)]
    if as_json:
        click.echo(json.dumps([msgspec.structs.asdict(each) for each in shown]))
        return
    rows = [
        (
            each.session,
            # A name is whatever a certificate says; a terminal must not obey it.
            each.agent if each.agent.isprintable() else repr(each.agent),
            each.service,
            each.connector_id,
            each.path if each.open else "opening",
            str(each.bytes),
            str(each.link_bytes),
            "" if each.age_s is None else f"{each.age_s:.0f}s",
        )
        for each in shown
    ]
    _print(("session", "agent", "service", "connector", "path", "bytes", "link bytes", "age"), rows)
    if len(found) < total:
        click.echo(f"the relay shows {len(found)} of its {total} sessions", err=True)


@sessions.command("close")
@config_option
@click.option("--relay", "address", help="The path of its admin_socket.")
@click.argument("ids", nargs=-1, required=True, metavar="SESSION...", shell_complete=completing.sessions)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def close(file: Path | None, address: str | None, ids: tuple[str, ...], as_json: bool) -> None:
    """End sessions; both ends hear `closed_by_peer`. Takes the relay's admin_socket, so its owner's rights.

    Exit status 1 when one of them is no open session.
    """
    target = _admin(file, address)
    if not admin.is_socket(target):
        raise click.UsageError(
            f"{target} only shows; closing takes relay.admin_socket (--config or --relay PATH)"
        )
    closed = {each: _close(target, each) for each in map(_session_id, ids)}
    if as_json:
        click.echo(json.dumps(closed))
    else:
        for each, done in closed.items():
            click.echo(f"{each} {'closed' if done else 'is no open session'}")
    sys.exit(0 if all(closed.values()) else 1)


def _admin(file: Path | None, address: str | None) -> str:
    if address is not None:
        return address
    if file is None:
        return DEFAULT_ADMIN
    try:
        relay = configuration.load(file, os.environ, {}, "relay").relay
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    if relay is None:
        raise click.UsageError(f"{file} has no section relay")
    return relay.admin_socket or str(relay.admin)


def _fetch(target: str) -> tuple[tuple[Shown, ...], int]:
    _, status = admin.ask(target, "/status", _Status)
    return status.sessions, status.relay.sessions


def _close(target: str, session: SessionId) -> bool:
    _, answer = admin.ask(target, f"/close-session/{session}", _Done, method="POST")
    return answer.done


def _session_id(text: str) -> SessionId:
    try:
        return SessionId(text)
    except BadName as error:
        raise click.UsageError(str(error)) from None


def _print(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
