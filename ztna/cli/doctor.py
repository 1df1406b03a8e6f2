"""`ztna doctor`: find out what is wrong on this host. What an answer means is ztna.system_dns's to say."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import click
import msgspec

from ztna import config as configuration
from ztna import findings
from ztna.cli.dns import domain_option, endpoint, look, root_option, server_option
from ztna.cli.examine import examine
from ztna.config import Endpoint
from ztna.dns import Message, Type, decode, encode_query
from ztna.errors import ConfigError, ProtocolError
from ztna.names import Zone
from ztna.system_dns import DNS_PORT, RESOLV_CONF, Heard, Verdict, judge, nameservers

ANSWER_SECONDS = 2.0
UDP_PAYLOAD_BYTES = 1232


@click.group(invoke_without_command=True)
@click.option(
    "--config",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Configurations of this host's daemons; what is examined depends on which they are.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, files: tuple[Path, ...], as_json: bool) -> None:
    """Find out what is wrong on this host, and what to do about it.

    Packages, certificates, ports, Consul, the clock, token rights, resolvers, UDP and TCP to the relays, NAT, MTU.
    Exit status 1 when something is wrong.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not files:
        raise click.UsageError("name the configurations of this host's daemons: --config FILE")
    found = asyncio.run(_examine(files, as_json))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    sys.exit(1 if any(each.verdict is findings.Verdict.WRONG for each in found) else 0)


async def _examine(files: tuple[Path, ...], as_json: bool) -> list[findings.Finding]:
    found: list[findings.Finding] = []
    configs = []
    for file in files:
        try:
            configs.append(configuration.load(file, os.environ, {}))
        except ConfigError as error:
            found.append(
                findings.Finding("configuration", findings.Verdict.WRONG, str(error), f"mend {file}")
            )
            _tell(found[-1], as_json)
    async for finding in examine(configs):
        found.append(finding)
        _tell(finding, as_json)
    return found


def _tell(finding: findings.Finding, as_json: bool) -> None:
    """Print a finding as soon as there is one."""
    if as_json:
        return
    click.echo(f"{finding.verdict:<8}{finding.check}: {finding.told}")
    if finding.todo:
        click.echo(f"        {finding.todo}")


@doctor.command()
@domain_option
@server_option
@click.option(
    "--resolver", help="The host's resolver, host:port; without it those of resolv.conf and the C library."
)
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def dns(domain: str, server: str, resolver: str | None, root: Path, as_json: bool) -> None:
    """Ask dnsd and this host's resolver for a name that nobody has, and say what that shows.

    Exit status 0 when names come from dnsd, 1 when not.
    """
    zone = Zone(domain)
    if resolver:
        resolvers = [endpoint(resolver)]
    else:
        named = nameservers(look(root).files.get(RESOLV_CONF, ""))
        resolvers = [Endpoint(host, DNS_PORT) for host in named]
    name = f"{secrets.token_hex(8)}.{zone}"
    directly = _ask(endpoint(server), name, zone)
    by_host = Heard(None, None)
    for each in resolvers:
        by_host = _ask(each, name, zone)
        if by_host.random is not None or by_host.fresh is not None:
            break
    resolves = resolver is None and _resolves(name)
    verdict, told = judge(zone, directly, by_host, resolves_random=resolves)
    if as_json:
        asked = {"server": server, "resolvers": [str(each) for each in resolvers]}
        click.echo(json.dumps({"verdict": verdict, "told": told, **asked}))
    else:
        click.echo(f"{verdict}: {told}")
    if verdict is not Verdict.FINE:
        raise SystemExit(1)


def _ask(server: Endpoint, name: str, zone: Zone) -> Heard:
    return Heard(_exchange(server, name, Type.A), _exchange(server, f"_fresh.{zone}", Type.TXT))


def _exchange(server: Endpoint, name: str, kind: Type) -> Message | None:
    """Return the answer to one question over UDP, None when none comes in time."""
    message_id = secrets.randbits(16)
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect((server.host, server.port))
            sock.send(encode_query(message_id, name, kind, UDP_PAYLOAD_BYTES))
            message = decode(sock.recv(65_535))
        except (OSError, ProtocolError):
            return None
    return message if message.is_response and message.id == message_id else None


def _resolves(name: str) -> bool:
    """Return whether the C library finds an address for a name; what takes too long finds none."""
    try:
        done = subprocess.run(
            ["getent", "ahosts", name], capture_output=True, timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout)
