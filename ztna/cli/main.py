"""The `ztna` command and its subcommands; each is loaded only when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
from importlib.metadata import version

import click

from ztna.errors import ZtnaError

_COMMANDS = {
    "up": "ztna.cli.up:up",
    "init": "ztna.cli.init:init",
    "ca": "ztna.cli.ca:ca",
    "status": "ztna.cli.status:status",
    "top": "ztna.cli.top:top",
    "ping": "ztna.cli.reach:ping",
    "trace": "ztna.cli.reach:trace",
    "services": "ztna.cli.services:services",
    "sessions": "ztna.cli.sessions:sessions",
    "leases": "ztna.cli.leases:leases",
    "dns": "ztna.cli.dns:dns",
    "doctor": "ztna.cli.doctor:doctor",
    "debug": "ztna.cli.debug:debug",
    "completion": "ztna.cli.completion:completion",
    "check-config": "ztna.cli.check_config:check_config",
}


INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a command that Ctrl-C ended before it was done, as shells give it (POSIX 2.8.2)."""


class LazyGroup(click.Group):
    """A group whose commands are imported when asked for: `ztna ca` need not load QUIC."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order they are told."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None for an unknown name."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. One that Ctrl-C ended before it was done has not failed: that has a status of its own."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            if not any(isinstance(each, KeyboardInterrupt) for each in (error, error.__context__)):
                raise  # a question was answered with no
        click.echo("\nInterrupted", err=True)
        raise click.exceptions.Exit(INTERRUPTED)


@click.command(cls=LazyGroup)
@click.version_option(version("ztna-mesh"), prog_name="ztna")
def cli() -> None:
    """Zero-trust service mesh for Consul: private services, reached by name.

    Exit status: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted. Ctrl-C is how commands end that
    go on until then (top, up, ping, leases watch): no interruption.
    """


def main() -> None:
    """Run the command; what we raise on purpose becomes one line and status 1."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background by a script (POSIX 2.11). Whoever sends it means it nevertheless.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli()
    except ZtnaError as error:
        click.echo(f"ztna: {error}", err=True)
        sys.exit(1)
