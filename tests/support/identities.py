"""Identities for tests of what only decides: no certificate was ever made for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime

from ztna.identity import Grants, Identity
from ztna.names import ServiceName


def grants(services: Iterable[str]) -> Grants:
    """Grants of these services; `*` is every service."""
    names = set(services)
    return Grants(frozenset(ServiceName(each) for each in names - {"*"}), "*" in names)


def identity(
    name: str = "alice",
    *,
    agent: Iterable[str] = (),
    connector: Iterable[str] = (),
    id_name: str | None = None,
    relay: str | None = None,
    not_before: datetime = datetime(2020, 1, 1, tzinfo=UTC),
    not_after: datetime = datetime(2040, 1, 1, tzinfo=UTC),
) -> Identity:
    """An identity that nobody verified."""
    return Identity(
        name=name,
        fingerprint=hashlib.sha256(name.encode()).hexdigest(),
        agent=grants(agent),
        connector=grants(connector),
        relay=relay,
        id_name=id_name,
        not_before=not_before,
        not_after=not_after,
    )
