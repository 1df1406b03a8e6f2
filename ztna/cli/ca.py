"""`ztna ca`: make a certificate authority; issue, sign, renew and revoke certificates; show what one grants.

Writes files and prints; the certificates themselves are made by ztna.ca and judged by ztna.identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, Unpack

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ztna.ca import (
    CRL,
    CRL_DAYS,
    LEAF_DAYS,
    ROOT_CERTIFICATE,
    ROOT_DAYS,
    ROOT_KEY,
    Authority,
    KeyKind,
    certificates_of,
    leaf_of,
    replace_file,
    write_private,
)
from ztna.errors import ConfigError, IdentityError, ZtnaError
from ztna.identity import Grants, Trust, Usage
from ztna.reasons import Reason
from ztna.revocation import Revocations

COMMON_NAME_MAX = 64
"""Characters (ub-common-name, RFC 5280 appendix A.1)."""

_DIRECTORY = click.option(
    "--ca",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("ztna-ca"),
    show_default=True,
    help="The directory of the certificate authority.",
)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DAYS = click.IntRange(1, ROOT_DAYS)
"""No certificate outlives the root."""
_CRL_DAYS = click.option(
    "--days", type=_DAYS, default=CRL_DAYS, show_default=True, help="The CRL is good for so long."
)

Command = Callable[..., None]


@click.group()
def ca() -> None:
    """Make a certificate authority and certificates for agents, connectors and relays."""


@ca.command()
@_DIRECTORY
@click.option("--name", default="ZTNA CA", show_default=True, help="The subject of the root certificate.")
def init(directory: Path, name: str) -> None:
    """Make a new authority: a root, and an intermediate that signs."""
    if not 1 <= len(name) <= COMMON_NAME_MAX:
        raise click.BadParameter(f"expected 1 to {COMMON_NAME_MAX} characters", param_hint="--name")
    with _told():
        Authority.create(directory, name)
    click.echo(f"Made a certificate authority in {directory}.")
    click.echo(f"Give {directory / ROOT_CERTIFICATE} to every daemon (tls.ca).")
    click.echo(f"Move {directory / ROOT_KEY} to a safe place offline: nothing here needs it any more.")


class _Grants(TypedDict):
    agent: tuple[str, ...]
    connector: tuple[str, ...]
    connector_id: str | None
    relay: str | None
    days: int


def _grants(command: Command) -> Command:
    """Give a command the options that say what a certificate grants."""
    options = (
        click.option(
            "--agent", multiple=True, metavar="SERVICE", help="May use this service; `*` for all. Repeatable."
        ),
        click.option(
            "--connector",
            multiple=True,
            metavar="SERVICE",
            help="May serve this service; `*` for all. Repeatable.",
        ),
        click.option(
            "--connector-id", metavar="ID", help="The connector's id (`<name>` or `<name>--<instance>`)."
        ),
        click.option("--relay", metavar="NAME", help="Is the relay of this name."),
        click.option("--days", type=_DAYS, default=LEAF_DAYS, show_default=True, help="Valid for so long."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@ca.command()
@_DIRECTORY
@click.argument("name")
@_grants
@click.option(
    "--key",
    type=click.Choice(["ec", "ed25519"]),
    default="ec",
    show_default=True,
    help="The kind of its key.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where to write NAME.pem and NAME.key (default: here).",
)
def issue(directory: Path, name: str, key: KeyKind, out: Path, **grants: Unpack[_Grants]) -> None:
    """Issue a certificate for NAME with the grants given."""
    certificate_file, key_file = out / f"{name}.pem", out / f"{name}.key"
    with _told():
        authority = Authority.load(directory)
        chain, key_pem = authority.issue(name, key=key, **grants)
        out.mkdir(parents=True, exist_ok=True)
        write_private(key_file, key_pem)
        certificate_file.write_bytes(chain)
    click.echo(f"Wrote {certificate_file} and {key_file} (0600).")
    _tell_if_cut(authority, certificate_file, leaf_of(chain).not_valid_after_utc)


@ca.command("sign-csr")
@_DIRECTORY
@click.argument("request", type=_FILE)
@click.argument("name")
@_grants
@click.option("--out", type=click.Path(path_type=Path), help="Where to write it (default: NAME.pem).")
def sign_csr(directory: Path, request: Path, name: str, out: Path | None, **grants: Unpack[_Grants]) -> None:
    """Sign the key of a certificate signing REQUEST for NAME, with the grants given here and no other.

    The key never leaves the machine that made it: `openssl req -new -key NAME.key -subj / -out NAME.csr` there.
    """
    target = out or Path(f"{name}.pem")
    with _told():
        authority = Authority.load(directory)
    with _told(request):
        chain = authority.sign_request(request.read_bytes(), name, **grants)
    with _told():
        if target.exists():
            raise ConfigError(f"{target} exists already and is not overwritten")
        target.write_bytes(chain)
    click.echo(f"Wrote {target}.")
    _tell_if_cut(authority, target, leaf_of(chain).not_valid_after_utc)


@ca.command()
@_DIRECTORY
@click.argument("certificates", nargs=-1, required=True, type=_FILE)
@click.option(
    "--agent", multiple=True, metavar="SERVICE", help="May use this service from now on. Repeatable."
)
@click.option(
    "--connector", multiple=True, metavar="SERVICE", help="May serve this service from now on. Repeatable."
)
@click.option("--days", type=_DAYS, help="Valid for so long (default: as long as before).")
def renew(
    directory: Path,
    certificates: tuple[Path, ...],
    agent: tuple[str, ...],
    connector: tuple[str, ...],
    days: int | None,
) -> None:
    """Replace each of CERTIFICATES by a new one for the same key, name and grants; daemons take it up by themselves.

    What it grants can be added to. To take a grant away, issue another certificate and revoke this one.
    """
    with _told():
        authority = Authority.load(directory)
    revoked = _serials(directory)
    for file in certificates:
        with _told(file):
            chain = file.read_bytes()
            if leaf_of(chain).serial_number in revoked:
                raise ConfigError("it was revoked")
            renewed = authority.renew(chain, agent=agent, connector=connector, days=days)
            replace_file(file, renewed)
        click.echo(f"Renewed {file}.")
        _tell_if_cut(authority, file, leaf_of(renewed).not_valid_after_utc)


@ca.command()
@_DIRECTORY
@click.argument("certificates", nargs=-1, required=True, type=_FILE)
@_CRL_DAYS
def revoke(directory: Path, certificates: tuple[Path, ...], days: int) -> None:
    """Take CERTIFICATES back: add them to the CRL, which every daemon has to get (tls.crl_file or tls.crl_url)."""
    with _told():
        authority = Authority.load(directory)
    leaves = []
    for file in certificates:
        with _told(file):
            leaves.append(leaf_of(file.read_bytes()))
            if not authority.issued(leaves[-1]):
                raise ConfigError("the certificate is not of this CA")
    _write_crl(directory, authority, leaves, days)
    for file in certificates:
        click.echo(f"Revoked {file}.")


@ca.command()
@_DIRECTORY
@_CRL_DAYS
def crl(directory: Path, days: int) -> None:
    """Write the CRL anew: daemons refuse new sessions once it is out of date, so do it often."""
    with _told():
        authority = Authority.load(directory)
    _write_crl(directory, authority, [], days)


def _write_crl(directory: Path, authority: Authority, leaves: list[x509.Certificate], days: int) -> None:
    file = directory / CRL
    with _told(file):
        before = file.read_bytes() if file.exists() else None
        made = authority.crl(before, leaves, days=days)
        replace_file(file, made)
    until = x509.load_pem_x509_crl(made).next_update_utc
    assert until is not None
    click.echo(f"Wrote {file}, good until {until:%Y-%m-%d %H:%M} UTC.")
    _tell_if_cut(authority, file, until)


def _tell_if_cut(authority: Authority, file: Path, until: datetime) -> None:
    """Tell of what could not be made to last as long as was asked for."""
    if until == authority.intermediate.not_valid_after_utc:
        click.echo(
            f"{file} is good until {until:%Y-%m-%d %H:%M} UTC and no longer: the CA's intermediate certificate "
            "ends then. Make another CA with `ztna ca init` and trust both until all certificates are of the new one.",
            err=True,
        )


def _serials(directory: Path) -> frozenset[int]:
    file = directory / CRL
    if not file.exists():
        return frozenset()
    with _told(file):
        lists = Revocations.from_bytes(file.read_bytes()).lists
    return frozenset[int]().union(*(each.serials for each in lists))


@contextmanager
def _told(file: Path | None = None) -> Iterator[None]:
    """Tell what goes wrong in one line, and with which file."""
    place = "" if file is None else f"{file}: "
    try:
        yield
    except OSError as error:
        at = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{place or at}{error.strerror}") from None
    except (ZtnaError, ValueError) as error:
        raise click.ClickException(f"{place}{error}") from None


@ca.command()
@_DIRECTORY
@click.argument("certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--trust", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another CA file."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(directory: Path, certificate: Path, trust: Path | None, as_json: bool) -> None:
    """Show what a certificate grants and whether the mesh would accept it; exit status 1 if not."""
    with _told(certificate):
        chain = certificates_of(certificate.read_bytes())
    trust_file = trust or directory / ROOT_CERTIFICATE
    with _told(trust_file):
        authorities = Trust.from_pem(trust_file.read_bytes())
    with _told(certificate):
        found = _describe(chain, authorities, datetime.now(UTC))
    if trust is None and chain[0].serial_number in _serials(directory):
        found |= {"accepted_as": [], "refused": [f"{Reason.REVOKED}: {directory / CRL} has it"]}
    if as_json:
        click.echo(json.dumps(found))
    else:
        for field, value in found.items():
            click.echo(f"{field:<12} {', '.join(value) if isinstance(value, list) else value or ''}")
    if not found["accepted_as"]:
        raise SystemExit(1)


def _describe(
    chain: list[x509.Certificate], trust: Trust, now: datetime
) -> dict[str, str | list[str] | None]:
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
