"""`ztna check-config FILE`: say whether a daemon would accept a configuration, and what it would use."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from ztna import config as configuration
from ztna.errors import ConfigError


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON object.")
@click.option(
    "--show", is_flag=True, help="Print the whole configuration with its defaults (secrets hidden)."
)
def check_config(file: Path, as_json: bool, show: bool) -> None:
    """Read FILE as the daemons do, the environment (ZTNA_...) included."""
    try:
        config = configuration.load(file, os.environ, {})
    except ConfigError as error:
        click.echo(
            json.dumps({"ok": False, "file": str(file), "error": str(error)}) if as_json else str(error),
            err=not as_json,
        )
        sys.exit(2)
    sections = [name for name in ("relay", "dnsd", "connector", "agent") if getattr(config, name) is not None]
    if as_json:
        click.echo(json.dumps({"ok": True, "file": str(file), "sections": sections}))
    else:
        click.echo(f"{file}: fine; for {', '.join(sections) or 'no daemon'}")
    if show:
        click.echo(configuration.dump(config))
