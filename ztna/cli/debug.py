"""`ztna debug`: one file for a bug report, with no secret in it."""

from __future__ import annotations

import asyncio
import io
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import click
import msgspec

from ztna import config as configuration
from ztna.cli import admin
from ztna.cli.examine import examine
from ztna.cli.status import admins
from ztna.config import Config
from ztna.errors import ConfigError, ZtnaError

COMMAND_SECONDS = 10.0
LOG_BYTES_MAX = 4 * 1024 * 1024
MODE = 0o600
PAGES = ("/status", "/readyz", "/metrics")
COMMANDS = {
    "addresses": ("ip", "address"),
    "routes": ("ip", "route", "show", "table", "all"),
    "rules": ("ip", "rule"),
    "sockets": ("ss", "-lntu"),
    "nft": ("nft", "list", "ruleset"),
}
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?i:(?<=token[\"'=: ]))[\"'=: ]*[0-9a-f-]{32,}"
    r"|\beyJ[\w-]+\.[\w-]+\.[\w-]+"
    r"|(?<=://)[^/\s@]+(?=@)"
    r"|(?i:(?<=authorization:)|(?<=cookie:)|(?<=api-key:)|(?<=auth-token:)|(?<=password=))[^'\"\n]+",
    re.DOTALL,
)
"""Private keys, tokens of Consul, JWTs, and what HTTP headers and URLs show who asks, wherever that was written."""


@click.command()
@click.option(
    "--config",
    "files",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A daemon's configuration.",
)
@click.option(
    "--log", "logs", multiple=True, type=click.Path(path_type=Path), help="A log file to put in (its end)."
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Where to; ztna-debug-<time>.tar.gz otherwise."
)
def debug(files: tuple[Path, ...], logs: tuple[Path, ...], output: Path | None) -> None:
    """Bundle what a bug report needs: configurations, states, metrics, findings, versions, routes; no secret.

    Tokens and keys are left out; names of services, peers and hosts are in it.
    """
    target = output or Path(f"ztna-debug-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
    except OSError as error:
        raise click.UsageError(f"{target}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in _parts(files, logs):
            click.echo(f"  {name}", err=True)
            data = clean(text).encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"ztna-debug/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), MODE
            archive.addfile(entry, io.BytesIO(data))
    click.echo(str(target))


def clean(text: str) -> str:
    """Return the text without what looks like a private key or a token."""
    return _SECRETS.sub("***", text)


def _parts(files: tuple[Path, ...], logs: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    yield "system.txt", _system()
    for name, argv in COMMANDS.items():
        yield f"{name}.txt", _run(argv)
    configs = []
    for number, file in enumerate(files):
        try:
            config = configuration.load(file, os.environ, {})
        except ConfigError as error:
            yield f"{number}-{file.name}", f"cannot be read: {error}\n"
            continue
        configs.append(config)
        yield f"{number}-{file.name}", configuration.dump(config, secrets=False)
        for name, address in admins(config):
            for page in PAGES:
                yield f"{number}-{name}{page.replace('/', '-')}.txt", _page(address, page)
    yield "findings.json", asyncio.run(_findings(configs))
    for number, log in enumerate(logs):
        yield f"log-{number}-{log.name}", _tail(log)


def _system() -> str:
    versions = sorted(f"{each.metadata['Name']} {each.version}" for each in distributions())
    return "\n".join((platform.platform(), sys.version, *versions)) + "\n"


def _run(argv: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(argv)}: {error}\n"
    return done.stdout + done.stderr


async def _findings(configs: list[Config]) -> str:
    found = [each async for each in examine(configs)]
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def _page(address: str, page: str) -> str:
    try:
        return admin.fetch(address, page)[1].decode("utf-8", "replace")
    except ZtnaError as error:
        return f"{address}{page}: {error}\n"


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES_MAX))
            return file.read(LOG_BYTES_MAX).decode("utf-8", "replace")
    except OSError as error:
        return f"{log}: {error.strerror}\n"
