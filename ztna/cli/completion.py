"""`ztna completion`: the script that a shell sources to complete `ztna`, by click's own mechanism."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ztna.errors import ZtnaError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_ZTNA_COMPLETE"
"""What the script sets when it asks `ztna` how to go on: click derives it from the name."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes `ztna` in SHELL, to be sourced: eval "$(ztna completion bash)".

    The Debian package has it installed already.
    """
    found = get_completion_class(shell)
    if found is None:
        raise ZtnaError(f"click knows no completion for {shell}")
    click.echo(found(ctx.find_root().command, {}, "ztna", VARIABLE).source())
