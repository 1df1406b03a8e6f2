"""The certificate authority: what it issues is accepted, its keys are private, its chain is bounded."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ztna.ca import Authority
from ztna.errors import ConfigError
from ztna.identity import Trust, Usage


def names(pem: bytes) -> list[bytes]:
    chain = x509.load_pem_x509_certificates(pem)
    return [each.public_bytes(serialization.Encoding.DER) for each in chain]


@pytest.mark.parametrize(
    ("grants", "usages"),
    [
        ({"agent": ["web"]}, {"client"}),
        ({"relay": "eu"}, {"server"}),
        ({"connector": ["*"], "connector_id": "c--1"}, {"client", "server"}),
        ({"agent": ["*"], "connector": ["web"], "connector_id": "c"}, {"client", "server"}),
    ],
)
@pytest.mark.parametrize("key", ["ec", "ed25519"])
def test_each_role_is_accepted_in_its_usages_only(
    tmp_path: Path, grants: dict[str, object], usages: set[str], key: str
) -> None:
    authority = Authority.create(tmp_path, "CA")
    chain, _ = authority.issue("x", key=key, **grants)  # type: ignore[arg-type]
    trust = Trust.from_pem(authority.ca_pem)
    both: tuple[Usage, ...] = ("client", "server")
    accepted = set()
    for usage in both:
        try:
            identity = trust.verify(names(chain), usage, datetime.now(UTC))
        except Exception as error:
            assert "extended key usage" in str(error)
        else:
            accepted.add(usage)
            assert identity.name == "spiffe://ztna/x"
    assert accepted == usages


def test_it_works_without_the_root_key_and_keys_are_private(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "ca", "CA")
    for key in (tmp_path / "ca").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (tmp_path / "ca" / "ca.key").unlink()
    loaded = Authority.load(tmp_path / "ca")
    assert loaded.root == made.root
    chain, _ = loaded.issue("x", agent=["web"])
    Trust.from_pem(made.ca_pem).verify(names(chain), "client", datetime.now(UTC))


def test_a_leaf_never_outlives_its_issuer(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path, "CA")
    chain, _ = authority.issue("x", agent=["web"], days=100_000)
    leaf = x509.load_pem_x509_certificates(chain)[0]
    assert leaf.not_valid_after_utc == authority.intermediate.not_valid_after_utc


def test_dates_come_from_the_clock_that_is_given(tmp_path: Path) -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    authority = Authority.create(tmp_path, "CA", now=moment)
    chain, _ = authority.issue("x", agent=["web"], days=1, now=moment)
    leaf = x509.load_pem_x509_certificates(chain)[0]
    assert leaf.not_valid_before_utc < moment < leaf.not_valid_after_utc == moment + timedelta(days=1)


def test_a_ca_whose_key_is_another_is_refused(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a", "A")
    Authority.create(tmp_path / "b", "B")
    (tmp_path / "a" / "intermediate.key").write_bytes((tmp_path / "b" / "intermediate.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key"):
        Authority.load(tmp_path / "a")
