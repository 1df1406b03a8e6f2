"""What a shell is offered for an argument: names and ids that daemons on this host know, if they say so at once.

Nobody who presses Tab wants an error or a wait: whatever goes wrong means that nothing is offered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec
from click.shell_completion import CompletionItem

from ztna import config as configuration
from ztna.cli import admin
from ztna.config import DAEMON_SECTIONS, Config
from ztna.errors import ZtnaError
from ztna.jsontypes import from_json

ANSWER_SECONDS = 0.3
OFFERED_MAX = 200
DEFAULT_PORTS = {"relay": 9431, "dnsd": 9432, "connector": 9433, "agent": 9434}


class _Service(msgspec.Struct, frozen=True):
    service: str
    ip: str | None = None


class _Listed(msgspec.Struct, frozen=True):
    services: tuple[_Service, ...] = ()


class _Connector(msgspec.Struct, frozen=True):
    services: dict[str, Any] = {}


class _Session(msgspec.Struct, frozen=True):
    session: str
    agent: str
    service: str


class _State(msgspec.Struct, frozen=True):
    agent: _Listed = _Listed()
    names: _Listed = _Listed()
    connector: _Connector = _Connector()
    sessions: tuple[_Session, ...] = ()


def services(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the services that the daemons here know."""
    found: dict[str, str] = {}
    for state in _states(ctx):
        for name in (*(each.service for each in state.sessions), *state.connector.services):
            found.setdefault(name, "")
        for each in (*state.agent.services, *state.names.services):
            found[each.service] = each.ip or found.get(each.service, "")
    return _offered(found, incomplete)


def sessions(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the sessions of the relay here, each with who has it and to what."""
    found: dict[str, str] = {}
    for state in _states(ctx):
        found |= {each.session: f"{each.agent} {each.service}" for each in state.sessions}
    return _offered(found, incomplete)


def _offered(found: dict[str, str], incomplete: str) -> list[CompletionItem]:
    fitting = sorted(name for name in found if name.startswith(incomplete) and name.isprintable())
    return [
        CompletionItem(name, help=found[name] if found[name].isprintable() else None)
        for name in fitting[:OFFERED_MAX]
    ]


def _states(ctx: click.Context) -> Iterator[_State]:
    """Ask the daemons that the command line names, or those at the default ports."""
    for address in _addresses(ctx):
        with suppress(ValueError, ZtnaError):
            _, body = admin.fetch(address, "/status", seconds=ANSWER_SECONDS)
            yield from_json(body, _State)


def _addresses(ctx: click.Context) -> list[str]:
    given: str | None = ctx.params.get("path") or ctx.params.get("address")
    if given:
        return [given]
    file: Path | None = ctx.params.get("file")
    if file is not None:
        with suppress(ZtnaError):
            return _of_config(configuration.load(file, os.environ, {}))
    return [f"127.0.0.1:{port}" for port in DEFAULT_PORTS.values()]


def _of_config(config: Config) -> list[str]:
    sections = [getattr(config, name) for name in DAEMON_SECTIONS]
    return [str(section.admin) for section in sections if section is not None]
