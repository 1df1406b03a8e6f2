"""`ztna check-config FILE`: say whether a daemon would accept a configuration, and what it would use."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from ztna import config as configuration
from ztna.config import DAEMON_SECTIONS, Config, shown_in_consul
from ztna.credentials import Credentials
from ztna.crl_fetch import check_url
from ztna.errors import ConfigError


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON object.")
@click.option(
    "--show", is_flag=True, help="Print the whole configuration with its defaults (secrets hidden)."
)
@click.option(
    "--files/--no-files", default=True, help="Read the certificates, keys, CAs and CRLs too (the default)."
)
def check_config(file: Path, as_json: bool, show: bool, files: bool) -> None:
    """Read FILE as the daemons do, the environment (ZTNA_...) included, and the certificate files that it names."""
    try:
        config = configuration.load(file, os.environ, {})
    except ConfigError as error:
        _refuse(file, [str(error)], as_json)
    wrong = _wrong_files(config) if files else []
    if wrong:
        _refuse(file, wrong, as_json)
    connector = config.connector
    risks = (
        []
        if connector is None
        else [f"connector.routes: {each}" for each in shown_in_consul(connector.routes).values()]
    )
    sections = [name for name in DAEMON_SECTIONS if getattr(config, name) is not None]
    if as_json:
        click.echo(json.dumps({"ok": True, "file": str(file), "sections": sections, "warnings": risks}))
    else:
        for risk in risks:
            click.echo(f"{file}: warning: {risk}", err=True)
        click.echo(f"{file}: fine; for {', '.join(sections) or 'no daemon'}")
    if show:
        click.echo(configuration.dump(config))


def _refuse(file: Path, errors: list[str], as_json: bool) -> NoReturn:
    text = "\n".join(errors)
    told = json.dumps({"ok": False, "file": str(file), "error": text}) if as_json else text
    click.echo(told, err=not as_json)
    sys.exit(2)


def _wrong_files(config: Config) -> list[str]:
    """Return what is wrong with the certificate files of each daemon's section."""
    wrong = []
    for name in DAEMON_SECTIONS:
        tls = getattr(getattr(config, name), "tls", None)
        if tls is None:
            continue
        try:
            Credentials.load(tls)
            if tls.crl_url is not None:
                check_url(tls.crl_url)
        except ConfigError as error:
            wrong.append(f"{name}.{error}")
    return wrong
