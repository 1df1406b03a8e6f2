"""What an examination of a host found, and what to do about it: measurements in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from ztna.identity import Identity

SKEW_SECONDS_MAX = 5.0
EXPIRING_SHARE = 3
"""With less than a third of its lifetime left a certificate should have been renewed."""
ETHERNET_PAYLOAD_BYTES = 1350

Address = tuple[str, int]


class Verdict(StrEnum):
    """How bad a finding is."""

    FINE = "fine"
    UNKNOWN = "unknown"
    """It could not be found out."""
    WARNING = "warning"
    WRONG = "wrong"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at; `todo` is empty when nothing need be done."""

    check: str
    verdict: Verdict
    told: str
    todo: str = ""


def clock(skew_s: float, whose: str) -> Finding:
    """Judge how far this host's clock is from another's, in seconds: positive when it is ahead."""
    told = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} {whose}"
    if abs(skew_s) <= SKEW_SECONDS_MAX:
        return Finding("clock", Verdict.FINE, told)
    todo = "set the clock by NTP: certificates, leases' ages and freshness are judged by it"
    return Finding("clock", Verdict.WRONG, told, todo)


def certificate(identity: Identity, now: datetime, where: str) -> Finding:
    """Judge the lifetime of a certificate that its own trust accepts."""
    check, left = f"{where} certificate", identity.not_after - now
    told = f"{identity.name}, {left.total_seconds() / 86_400:.1f} days left"
    if left * EXPIRING_SHARE >= identity.lifetime:
        return Finding(check, Verdict.FINE, told)
    return Finding(
        check, Verdict.WARNING, told, "renew it (`ztna ca renew`): less than a third of its lifetime is left"
    )


def mapping(locally: Address, hosts: Collection[str], seen: Mapping[str, Address]) -> Finding:
    """Judge which NAT stands between one socket and the relays, by what each relay saw of it (RFC 4787, 4.1).

    `locally` is the socket's own address, `hosts` are this host's addresses, `seen` what each relay saw.
    """
    told = ", ".join(f"{relay} saw {_text(address)}" for relay, address in sorted(seen.items()))
    if not seen:
        return Finding("NAT", Verdict.UNKNOWN, "no relay said what it sees")
    if all(address[0] in hosts and address[1] == locally[1] for address in seen.values()):
        return Finding("NAT", Verdict.FINE, f"none: {told}")
    if len(set(seen.values())) > 1:
        todo = "direct paths work only to peers without such a NAT; others are forwarded by the relays"
        return Finding(
            "NAT", Verdict.WARNING, f"symmetric, another mapping for each destination: {told}", todo
        )
    kind = "one mapping for all of these relays" if len(seen) > 1 else "one relay cannot tell which kind"
    return Finding("NAT", Verdict.FINE, f"{kind}: {told}")


def payload(carried: int, relay: str) -> Finding:
    """Judge the largest UDP payload, in bytes, that came through to a relay and was acknowledged."""
    told = f"UDP payloads of {carried} bytes reach {relay}"
    if carried >= ETHERNET_PAYLOAD_BYTES:
        return Finding("MTU", Verdict.FINE, told)
    return Finding(
        "MTU",
        Verdict.WARNING,
        told,
        f"a tunnel on the way has a small MTU: all works, in smaller packets than {ETHERNET_PAYLOAD_BYTES} bytes",
    )


def rights(lacking: Collection[str], daemon: str, asked: int) -> Finding:
    """Judge which of the rules a daemon's token needs it lacks."""
    check = f"{daemon} token"
    if not lacking:
        return Finding(check, Verdict.FINE, f"has the {asked} rights that {daemon} needs")
    todo = f"give it the policy in docs/policies/{daemon}.hcl"
    return Finding(check, Verdict.WRONG, f"lacks {'; '.join(sorted(lacking))}", todo)


def distributions(
    found: Mapping[str, str | None], ours: str, others: Mapping[str, Collection[str]]
) -> Finding:
    """Judge whether the import names are ours: `found` has where each comes from, `others` who else brings it."""
    check = "packages"
    strange = sorted(name for name, place in found.items() if place != ours)
    claimed = sorted(f"{name} of {', '.join(sorted(by))}" for name, by in others.items() if by)
    todo = "install ztna-mesh in an environment of its own (pipx, or a venv)"
    if strange:
        told = ", ".join(f"{name} comes from {found[name] or 'nowhere'}" for name in strange)
        return Finding(check, Verdict.WRONG, f"{told}; ours are in {ours}", todo)
    if claimed:
        return Finding(
            check, Verdict.WARNING, f"another distribution brings the same name: {'; '.join(claimed)}", todo
        )
    return Finding(check, Verdict.FINE, f"{', '.join(sorted(found))} are ours")


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
