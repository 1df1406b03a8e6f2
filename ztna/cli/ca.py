"""`ztna ca`: make a certificate authority, issue certificates for the mesh, show what a certificate grants.

Writes files and prints; the certificates themselves are made by ztna.ca and judged by ztna.identity.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ztna.ca import LEAF_DAYS, ROOT_CERTIFICATE, ROOT_KEY, Authority, KeyKind, write_private
from ztna.errors import IdentityError, ZtnaError
from ztna.identity import Grants, Trust, Usage

_DIRECTORY = click.option(
    "--ca",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("ztna-ca"),
    show_default=True,
    help="The directory of the certificate authority.",
)


@click.group()
def ca() -> None:
    """Make a certificate authority and certificates for agents, connectors and relays."""


@ca.command()
@_DIRECTORY
@click.option("--name", default="ZTNA CA", show_default=True, help="The subject of the root certificate.")
def init(directory: Path, name: str) -> None:
    """Make a new authority: a root, and an intermediate that signs."""
    try:
        Authority.create(directory, name)
    except ZtnaError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Made a certificate authority in {directory}.")
    click.echo(f"Give {directory / ROOT_CERTIFICATE} to every daemon (tls.ca).")
    click.echo(f"Move {directory / ROOT_KEY} to a safe place offline: nothing here needs it any more.")


@ca.command()
@_DIRECTORY
@click.argument("name")
@click.option(
    "--agent", multiple=True, metavar="SERVICE", help="May use this service; `*` for all. Repeatable."
)
@click.option(
    "--connector", multiple=True, metavar="SERVICE", help="May serve this service; `*` for all. Repeatable."
)
@click.option("--connector-id", metavar="ID", help="The connector's id (`<name>` or `<name>--<instance>`).")
@click.option("--relay", metavar="NAME", help="Is the relay of this name.")
@click.option(
    "--days", type=click.IntRange(1), default=LEAF_DAYS, show_default=True, help="Valid for so long."
)
@click.option("--key", type=click.Choice(["ec", "ed25519"]), default="ec", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where to write NAME.pem and NAME.key (default: here).",
)
def issue(
    directory: Path,
    name: str,
    agent: tuple[str, ...],
    connector: tuple[str, ...],
    connector_id: str | None,
    relay: str | None,
    days: int,
    key: KeyKind,
    out: Path,
) -> None:
    """Issue a certificate for NAME with the grants given."""
    certificate_file, key_file = out / f"{name}.pem", out / f"{name}.key"
    try:
        chain, key_pem = Authority.load(directory).issue(
            name, agent=agent, connector=connector, relay=relay, connector_id=connector_id, days=days, key=key
        )
        out.mkdir(parents=True, exist_ok=True)
        write_private(key_file, key_pem)
    except ZtnaError as error:
        raise click.ClickException(str(error)) from None
    certificate_file.write_bytes(chain)
    click.echo(f"Wrote {certificate_file} and {key_file} (0600).")


@ca.command()
@_DIRECTORY
@click.argument("certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--trust", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another CA file."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(directory: Path, certificate: Path, trust: Path | None, as_json: bool) -> None:
    """Show what a certificate grants and whether the mesh would accept it; exit status 1 if not."""
    try:
        found = _describe(certificate, trust or directory / ROOT_CERTIFICATE, datetime.now(UTC))
    except (ZtnaError, OSError, ValueError) as error:
        raise click.ClickException(f"{certificate}: {error}") from None
    if as_json:
        click.echo(json.dumps(found))
    else:
        for field, value in found.items():
            click.echo(f"{field:<12} {', '.join(value) if isinstance(value, list) else value}")
    if not found["accepted_as"]:
        raise SystemExit(1)


def _describe(certificate: Path, trust_file: Path, now: datetime) -> dict[str, str | list[str] | None]:
    chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    trust = Trust.from_pem(trust_file.read_bytes())
    der = [each.public_bytes(Encoding.DER) for each in chain]
    usages: tuple[Usage, ...] = ("client", "server")
    accepted: list[str] = []
    found: dict[str, str | list[str] | None] = {}
    refusals: list[str] = []
    for usage in usages:
        try:
            identity = trust.verify(der, usage, now)
        except IdentityError as error:
            refusals.append(str(error))
            continue
        accepted.append(usage)
        found |= {
            "name": identity.name,
            "fingerprint": identity.fingerprint,
            "agent": _services(identity.agent),
            "connector": _services(identity.connector),
            "relay": identity.relay,
            "id": identity.id_name,
            "not_before": identity.not_before.isoformat(),
            "not_after": identity.not_after.isoformat(),
        }
    found["accepted_as"] = accepted
    found["refused"] = [] if accepted else refusals[:1]
    return found


def _services(grants: Grants) -> list[str]:
    return (["*"] if grants.every else []) + sorted(grants.services)
