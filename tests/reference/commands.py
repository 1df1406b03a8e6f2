"""Each command from its click definition: usage, what it does, options, and which of them print JSON."""

from __future__ import annotations

from collections.abc import Iterator

import click

from dnsd.main import main as dnsd
from relay.main import main as relay
from sidecar.main import main as sidecar
from tests.reference import markdown
from ztna.cli.main import cli

PROGRAMS: dict[str, click.Command] = {
    "ztna": cli,
    "ztna-dnsd": dnsd,
    "ztna-relay": relay,
    "ztna-sidecar": sidecar,
}
INTRODUCTION = """Exit status of every command: 0 fine, 1 failed or something is not as it should be, 2 wrong
usage or configuration. What a command has beyond that stands with it. `--json` prints one JSON document on
standard output and everything else on standard error. `--help` works everywhere. Daemons log on standard error,
end cleanly on SIGTERM and SIGINT, and read files anew on SIGHUP."""


def page() -> str:
    """Return the page."""
    found = [each for name, command in PROGRAMS.items() for each in _leaves(command, name, None)]
    rows = [
        (f"[`{name}`](#{markdown.anchor(name)})", _short(command), "yes" if _has_json(command) else "")
        for name, command, _ in found
    ]
    parts = [part for name, command, context in found for part in _described(name, command, context)]
    overview = markdown.table(("Command", "What it does", "JSON"), rows)
    return markdown.page("Commands", "the click definitions", INTRODUCTION, overview, *parts)


def _leaves(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield each command that does something, groups that do included, with its whole name."""
    context = click.Context(command, parent=parent, info_name=name.rpartition(" ")[2])
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield name, command, context
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _leaves(found, f"{name} {inner}", context)


def _described(name: str, command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## `{name}`"
    yield f"```text\nUsage: {' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    for paragraph in (command.help or "").split("\n\n"):
        if paragraph.strip():
            yield markdown.text(" ".join(paragraph.split()))
    rows = [
        record
        for parameter in command.get_params(context)
        if not isinstance(parameter, click.Argument)
        and parameter.name not in ("help", "version")
        and (record := parameter.get_help_record(context)) is not None
    ]
    if rows:
        yield markdown.table(
            ("Option", "Meaning"), [(markdown.code(option), meaning) for option, meaning in rows]
        )


def _short(command: click.Command) -> str:
    return markdown.sentence(command.help)


def _has_json(command: click.Command) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)
