"""`ztna dns`: let a host ask dnsd for the mesh's names, and take that back.

Shows what it will change first. What is changed is decided in ztna.system_dns.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import click

from ztna.config import Config, DnsdConfig, Endpoint
from ztna.names import Zone
from ztna.system_dns import (
    OUR_FILES,
    RESOLV_CONF,
    SIGNS,
    Change,
    How,
    Plan,
    Seen,
    SystemDnsError,
    detect,
    install,
    installed,
    nameservers,
    uninstall,
)

COMMAND_SECONDS = 30.0
FILE_BYTES_MAX = 1 << 20

root_option = click.option(
    "--root",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path("/"),
    show_default=True,
    help="The host's file system, e.g. of an image; services are restarted only on /.",
)
_YES = click.option("--yes", is_flag=True, help="Do not ask.")


def look(root: Path) -> Seen:
    """Return what the host looks like that has its files under `root`."""
    files = {}
    for path in (*OUR_FILES, RESOLV_CONF):
        if (root / path).is_file():
            with (root / path).open(encoding="utf-8", errors="surrogateescape") as file:
                files[path] = file.read(FILE_BYTES_MAX)
    return Seen(files, frozenset(sign for sign in SIGNS if (root / sign).is_dir()))


def endpoint(text: str) -> Endpoint:
    """Read `host:port`. Raises click.BadParameter."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"expected host:port, got {text!r}")
    return Endpoint(host.strip("[]"), int(port))


domain_option = click.option(
    "--domain", default=str(Config().domain), show_default=True, help="The zone of the services' names."
)
server_option = click.option(
    "--server", default=str(DnsdConfig().listen), show_default=True, help="Where dnsd answers, host:port."
)


@click.group()
def dns() -> None:
    """Let this host ask dnsd for the mesh's names."""


@dns.command("install")
@domain_option
@server_option
@click.option(
    "--how",
    type=click.Choice([how.value for how in How]),
    help="Who resolves names here; without it that is found out.",
)
@root_option
@_YES
def install_command(domain: str, server: str, how: str | None, root: Path, yes: bool) -> None:
    """Route the names of the mesh to dnsd; shows what changes and asks first."""
    seen = look(root)
    way = How(how) if how else detect(seen)
    if way is How.RESOLV_CONF and (root / RESOLV_CONF).is_symlink():
        raise SystemDnsError(f"{root / RESOLV_CONF} is a link, so somebody else writes it: choose with --how")
    _carry_out(install(seen, way, Zone(domain), endpoint(server)), root, yes, f"installed for {way}")


@dns.command("uninstall")
@root_option
@_YES
def uninstall_command(root: Path, yes: bool) -> None:
    """Take back all that install did; shows what changes and asks first."""
    _carry_out(uninstall(look(root)), root, yes, "uninstalled")


@dns.command()
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(root: Path, as_json: bool) -> None:
    """Show who resolves names here, and whether the mesh's are routed to dnsd (exit status 1 when not)."""
    seen = look(root)
    ways = installed(seen)
    servers = nameservers(seen.files.get(RESOLV_CONF, ""))
    if as_json:
        click.echo(json.dumps({"resolver": detect(seen), "installed": ways, "nameservers": servers}))
    else:
        click.echo(f"resolver: {detect(seen)}; resolv.conf names {', '.join(servers) or 'nobody'}")
        click.echo(f"installed for: {', '.join(ways) or 'nothing'}")
    if not ways:
        raise SystemExit(1)


def _carry_out(plan: Plan, root: Path, yes: bool, done: str) -> None:
    if not plan.changes:
        click.echo(f"Nothing to change: {done} already.")
        return
    for change in plan.changes:
        click.echo(f"{'write' if change.text is not None else 'remove'} {root / change.path}")
        for line in (change.text or "").splitlines():
            click.echo(f"    {line}")
    is_live = root == Path("/")
    for command in plan.commands if is_live else ():
        click.echo(f"run {' '.join(command)}")
    if not yes:
        click.confirm("Go on?", abort=True)
    for change in plan.changes:
        try:
            _apply(change, root)
        except OSError as error:
            raise SystemDnsError(f"{root / change.path}: {error.strerror}") from None
    for command in plan.commands if is_live else ():
        _run(command)
    click.echo(f"{done.capitalize()}.")


def _apply(change: Change, root: Path) -> None:
    """Write a file whole or not at all."""
    path = root / change.path
    if change.text is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8", errors="surrogateescape"
    ) as file:
        file.write(change.text)
        os.fchmod(file.fileno(), 0o644)
    Path(file.name).replace(path)


def _run(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemDnsError(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        raise SystemDnsError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
