"""Grants from SANs and the verdict on a chain: every certificate that must be refused, with its reason."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from tests.support.certificates import BOTH, CLIENT, DAY, SERVER, Pki, Presented, forge
from ztna import identity as identity_module
from ztna.errors import ConfigError, IdentityError
from ztna.identity import (
    INTERMEDIATES_MAX,
    PRESENTED_CERTIFICATES_MAX,
    Identity,
    Trust,
    require_agent,
    require_connector,
    require_relay,
)
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.revocation import Revocations

WEB, DB = ServiceName("web-app"), ServiceName("db")
CONNECTOR_DNS = ["connector.web-app.ztna", "id.c1.ztna"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def trust(pki: Pki) -> Trust:
    return Trust.from_pem(pki.ca_file.read_bytes())


def now() -> datetime:
    return datetime.now(UTC)


def judge(trust: Trust, presented: Presented, usage: str = "client") -> Identity:
    return trust.verify(presented.der, usage, now())  # type: ignore[arg-type]


def refusal(trust: Trust, presented: Presented, usage: str = "client") -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        judge(trust, presented, usage)
    return caught.value


def test_an_agent_of_our_ca_has_its_grants(pki: Pki, trust: Trust) -> None:
    identity = judge(
        trust, pki.signed(dns=["agent.web-app.ztna", "AGENT.db.ZTNA", "host.example"], eku=[CLIENT])
    )
    assert identity.agent.services == {WEB, DB}
    assert (
        identity.may_use(WEB) and not identity.may_use(ServiceName("other")) and not identity.may_serve(WEB)
    )
    assert identity.relay is None and identity.id_name is None
    assert identity.name == "forged"
    assert not identity.carries(ConnectorId("c1"))


@pytest.mark.parametrize("dns", ["agent.*.ztna", "*.agent.ztna"])
def test_the_wildcard_grants_every_service_in_its_role_only(pki: Pki, trust: Trust, dns: str) -> None:
    identity = judge(trust, pki.signed(dns=[dns], eku=[CLIENT]))
    assert identity.may_use(WEB) and identity.may_use(DB) and not identity.may_serve(WEB)
    assert bool(identity.agent) and not identity.connector


@pytest.mark.parametrize("dns", ["connector.*.ztna", "*.connector.ztna"])
def test_a_connector_serves_in_both_usages(pki: Pki, trust: Trust, dns: str) -> None:
    presented = pki.signed(dns=[dns, "id.c1.ztna"], eku=BOTH)
    for usage in ("client", "server"):
        identity = judge(trust, presented, usage)
        assert identity.may_serve(WEB) and not identity.may_use(WEB)
        assert identity.carries(ConnectorId("c1")) and identity.carries(ConnectorId("c1--b"))
        assert not identity.carries(ConnectorId("c2"))


def test_a_connector_of_the_first_version_has_no_id(pki: Pki, trust: Trust) -> None:
    identity = judge(trust, pki.signed(dns=["connector.web-app.ztna"]))
    assert identity.may_serve(WEB) and not identity.carries(ConnectorId("c1"))


def test_a_relay_is_known_by_its_san(pki: Pki, trust: Trust) -> None:
    identity = judge(trust, pki.signed(dns=["relay.eu-1.ztna"], eku=[SERVER]), "server")
    assert identity.relay == "eu-1"
    require_relay(identity, "eu-1")
    with pytest.raises(IdentityError) as caught:
        require_relay(identity, "eu-2")
    assert caught.value.reason is Reason.NO_GRANT


def test_the_name_is_the_spiffe_uri_before_the_cn(pki: Pki, trust: Trust) -> None:
    dns, uri = ["agent.db.ztna"], "spiffe://example/agent"
    assert judge(trust, pki.signed(dns=dns, uris=["https://x.example/", uri])).name == uri
    assert judge(trust, pki.signed(dns=dns, uris=["https://x.example/"], cn="laptop")).name == "laptop"


@pytest.mark.parametrize(
    ("cn", "uris"),
    [
        ("", []),
        ("spiffe://example/somebody-else", []),
        ("x", ["spiffe://a/b", "spiffe://a/c"]),
        ("x", ["spiffe://" + "a" * 300]),
    ],
    ids=["none", "cn-poses-as-spiffe", "two-spiffe", "too-long"],
)
def test_a_leaf_without_one_clear_name_is_refused(pki: Pki, trust: Trust, cn: str, uris: list[str]) -> None:
    error = refusal(trust, pki.signed(dns=["agent.db.ztna"], cn=cn, uris=uris))
    assert error.reason is Reason.NO_GRANT and "name" in error.detail


@pytest.mark.parametrize("usage", ["client", "server"])
def test_every_bad_chain_is_refused_with_its_reason(pki: Pki, trust: Trust, usage: str) -> None:
    for name, bad in pki.bad(CONNECTOR_DNS, usage).items():
        with pytest.raises(IdentityError) as caught:
            trust.verify(bad.presented.der if bad.presented else [], usage, now())  # type: ignore[arg-type]
        assert caught.value.reason is bad.reason, name


@pytest.mark.parametrize(
    "dns",
    [
        ["agent.Not_a_label.ztna"],
        ["agent.connector.ztna"],
        ["agent.a.b.ztna"],
        ["agent.ztna"],
        ["ztna"],
        ["*.ztna"],
        ["agent.db.ztna."],
        ["relay.a--b.ztna"],
        ["relay.-a.ztna"],
        ["id.c1--x.ztna", "connector.db.ztna"],
        ["relay.*.ztna"],
        ["*.relay.ztna"],
    ],
)
def test_any_other_san_under_ztna_is_refused(pki: Pki, trust: Trust, dns: list[str]) -> None:
    assert refusal(trust, pki.signed(dns=["agent.db.ztna", *dns])).reason is Reason.NO_GRANT


def test_two_ids_two_relay_names_or_an_id_alone_are_refused(pki: Pki, trust: Trust) -> None:
    for dns in (
        ["connector.db.ztna", "id.c1.ztna", "id.c2.ztna"],
        ["relay.a.ztna", "relay.b.ztna"],
        ["agent.db.ztna", "id.c1.ztna"],
        ["id.c1.ztna"],
    ):
        assert refusal(trust, pki.signed(dns=dns)).reason is Reason.NO_GRANT


def test_a_leaf_that_may_not_sign_is_refused(pki: Pki, trust: Trust) -> None:
    error = refusal(trust, pki.signed(dns=["agent.db.ztna"], digital_signature=False))
    assert error.reason is Reason.NO_GRANT and "key usage" in error.detail
    judge(trust, pki.signed(dns=["agent.db.ztna"], key_usage=False))


def test_garbage_instead_of_a_certificate_is_untrusted(pki: Pki, trust: Trust) -> None:
    leaf = pki.signed(dns=["agent.db.ztna"]).der[0]
    for chain in ([b""], [b"\x30\x03abc"], [leaf[:-1]], [leaf, b"nonsense"]):
        with pytest.raises(IdentityError) as caught:
            trust.verify(chain, "client", now())
        assert caught.value.reason is Reason.UNTRUSTED


@pytest.mark.parametrize("oid", ["2.5.29.17", "2.5.29.37"], ids=["names", "extended-key-usage"])
def test_malformed_extensions_are_untrusted(pki: Pki, trust: Trust, oid: str) -> None:
    broken = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), b"\x30\x04\x82\x02\xff\xff")
    leaf, key = forge((pki.authority.intermediate, pki.authority.key), eku=(), extra=broken)
    assert refusal(trust, Presented((leaf, pki.authority.intermediate), key)).reason is Reason.UNTRUSTED


def test_more_certificates_than_allowed_are_not_even_read(pki: Pki, trust: Trust) -> None:
    presented = pki.signed(dns=["agent.db.ztna"])
    chain = [presented.der[0], *[presented.der[1]] * PRESENTED_CERTIFICATES_MAX]
    with pytest.raises(IdentityError) as caught:
        trust.verify(chain, "client", now())
    assert caught.value.reason is Reason.UNTRUSTED and "presented" in caught.value.detail


def test_a_leaf_cannot_issue(pki: Pki, trust: Trust) -> None:
    false_ca, false_key = forge((pki.authority.intermediate, pki.authority.key), dns=["agent.db.ztna"])
    leaf, key = forge((false_ca, false_key), dns=["agent.web-app.ztna"])
    chain = Presented((leaf, false_ca, pki.authority.intermediate), key)
    assert refusal(trust, chain).reason is Reason.UNTRUSTED


def test_path_length_name_constraints_and_depth_hold(trust: Trust, tmp_path: Path) -> None:
    root, root_key = forge(None, ca=True, cn="root", eku=())
    own = Trust([root])
    good = x509.NameConstraints([x509.DNSName("ztna")], None)
    shut, shut_key = forge((root, root_key), ca=True, cn="shut", eku=(), path_length=0)
    deeper, deeper_key = forge((shut, shut_key), ca=True, cn="deeper", eku=())
    leaf, key = forge((deeper, deeper_key), dns=["agent.db.ztna"])
    assert refusal(own, Presented((leaf, deeper, shut), key)).reason is Reason.UNTRUSTED

    bound, bound_key = forge((root, root_key), ca=True, cn="bound", eku=(), constraints=good)
    inside, key = forge((bound, bound_key), dns=["*.agent.ztna"])
    outside, outside_key = forge((bound, bound_key), dns=["agent.db.ztna", "www.example.org"])
    judge(own, Presented((inside, bound), key))
    assert refusal(own, Presented((outside, bound), outside_key)).reason is Reason.UNTRUSTED

    chain, signer = [], (root, root_key)
    for number in range(INTERMEDIATES_MAX + 1):
        signer = forge(signer, ca=True, cn=f"ca {number}", eku=())
        chain.insert(0, signer[0])
    leaf, key = forge(signer, dns=["agent.db.ztna"])
    assert refusal(own, Presented((leaf, *chain), key)).reason is Reason.UNTRUSTED


def test_an_intermediate_that_may_not_sign_certificates_is_refused(pki: Pki) -> None:
    root, root_key = forge(None, ca=True, cn="root", eku=())
    mute, mute_key = forge((root, root_key), ca=True, cn="mute", eku=(), cert_sign=False)
    leaf, key = forge((mute, mute_key), dns=["agent.db.ztna"])
    assert refusal(Trust([root]), Presented((leaf, mute), key)).reason is Reason.UNTRUSTED


def test_an_expired_intermediate_or_root_is_expired_not_untrusted() -> None:
    moment = now() - timedelta(hours=1)
    root, root_key = forge(None, ca=True, cn="root", eku=())
    old, old_key = forge(
        (root, root_key), ca=True, cn="old", eku=(), not_before=moment - DAY, not_after=moment
    )
    leaf, key = forge((old, old_key), dns=["agent.db.ztna"])
    error = refusal(Trust([root]), Presented((leaf, old), key))
    assert error.reason is Reason.EXPIRED and "CN=old" in error.detail

    gone, gone_key = forge(None, ca=True, cn="gone", eku=(), not_after=moment)
    leaf, key = forge((gone, gone_key), dns=["agent.db.ztna"])
    assert refusal(Trust([gone]), Presented((leaf,), key)).reason is Reason.EXPIRED


def test_an_expired_stranger_stays_untrusted(pki: Pki, trust: Trust) -> None:
    past = now() - DAY
    lone, lone_key = forge(None, dns=["agent.db.ztna"], not_before=past - DAY, not_after=past)
    assert refusal(trust, Presented((lone,), lone_key)).reason is Reason.UNTRUSTED
    rogue = pki.signed(pki.rogue, dns=["agent.db.ztna"], not_before=past - DAY, not_after=past)
    assert refusal(trust, rogue).reason is Reason.UNTRUSTED


def test_validity_is_judged_at_the_moment_given(pki: Pki, trust: Trust) -> None:
    presented = pki.signed(dns=["agent.db.ztna"], not_after=now() + timedelta(hours=1))
    identity = trust.verify(presented.der, "client", now())
    assert identity.valid_at(now()) and not identity.valid_at(now() + timedelta(hours=2))
    with pytest.raises(IdentityError) as caught:
        trust.verify(presented.der, "client", now() + timedelta(hours=2))
    assert caught.value.reason is Reason.EXPIRED


def test_a_chain_filled_up_with_others_certificates_proves_nothing_more(pki: Pki, trust: Trust) -> None:
    own = pki.signed(dns=["agent.db.ztna"], cn="own")
    others = pki.signed(dns=["agent.*.ztna", "agent.web-app.ztna"], cn="other")
    rogue = pki.signed(pki.rogue, dns=["agent.*.ztna"])
    old, _ = forge(None, ca=True, cn="old", not_before=now() - 2 * DAY, not_after=now() - DAY)
    for filler in ([others.chain[0]], [rogue.chain[0], rogue.chain[1], old], [own.chain[0], old, old, old]):
        identity = judge(trust, Presented((own.chain[0], *filler, own.chain[1]), own.key))
        assert identity.name == "own" and identity.agent.services == {DB} and not identity.agent.every
        assert [each.subject for each in identity.path] == [
            own.chain[0].subject,
            own.chain[1].subject,
            pki.authority.root.subject,
        ]


def test_during_a_rotation_leaves_of_both_roots_are_believed(pki: Pki) -> None:
    new, old = pki.rogue, pki.authority
    both = Trust([old.root, new.root])
    peers = [pki.signed(each, dns=["agent.db.ztna"]) for each in (old, new)]
    identities = [judge(both, each) for each in peers]
    assert [both.judge(each, now()) for each in identities] == [None, None]
    after = Trust([new.root])
    gone = after.judge(identities[0], now())
    assert gone is not None and gone.reason is Reason.UNTRUSTED
    assert after.judge(identities[1], now()) is None


def test_a_peer_whose_root_went_stays_when_another_vouches_for_it() -> None:
    """A root that was cross-signed by the next one."""
    old, old_key = forge(None, ca=True, cn="old", eku=())
    new, new_key = forge(None, ca=True, cn="new", eku=())
    leaf, key = forge((old, old_key), dns=["agent.db.ztna"])
    builder = x509.CertificateBuilder(new.subject, old.subject, old.public_key(), 77)
    builder = builder.not_valid_before(now() - DAY).not_valid_after(now() + DAY)
    for extension in (x509.BasicConstraints, x509.SubjectKeyIdentifier, x509.KeyUsage):
        found = old.extensions.get_extension_for_class(extension)
        builder = builder.add_extension(found.value, found.critical)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(new_key.public_key())
    crossed = builder.add_extension(issuer, False).sign(new_key, hashes.SHA256())
    identity = judge(Trust([old]), Presented((leaf, crossed), key))
    assert Trust([new, crossed]).judge(identity, now()) is None


def test_the_dates_are_those_of_the_whole_path() -> None:
    root, root_key = forge(None, ca=True, cn="root", eku=())
    soon = (now() + timedelta(hours=1)).replace(microsecond=0)
    brief, brief_key = forge((root, root_key), ca=True, cn="brief", eku=(), not_after=soon)
    leaf, key = forge((brief, brief_key), dns=["agent.db.ztna"], not_before=now() - 3 * DAY)
    trust = Trust([root])
    identity = judge(trust, Presented((leaf, brief), key))
    assert identity.not_after == soon and identity.lifetime > identity.not_after - identity.not_before
    assert replace(identity, path=()).lifetime == identity.not_after - identity.not_before
    over = trust.judge(identity, soon + timedelta(seconds=1))
    assert over is not None and over.reason is Reason.EXPIRED


def test_a_crl_keeps_the_revoked_out_and_ends_those_who_are_in(pki: Pki) -> None:
    good, bad = (pki.signed(dns=["agent.db.ztna"]) for _ in range(2))
    trust = Trust.from_pem(pki.ca_file.read_bytes())
    identities = [judge(trust, each) for each in (good, bad)]
    assert trust.unknown(identities[0].path, now()) is None
    revocations = Revocations.from_bytes(pki.authority.crl(None, [bad.chain[0]], days=1))
    strict = trust.with_revocations(revocations)
    assert judge(strict, good) == identities[0]
    assert refusal(strict, bad).reason is Reason.REVOKED
    assert strict.judge(identities[0], now()) is None
    ended = strict.judge(identities[1], now())
    assert ended is not None and ended.reason is Reason.REVOKED
    blind = trust.with_revocations(Revocations(()))
    assert refusal(blind, good).reason is Reason.POLICY_UNKNOWN
    assert blind.judge(identities[0], now()) is None, "who is in stays"
    assert blind.unknown(identities[0].path, now()) is not None


def test_a_chain_is_verified_once_and_remembered_within_bounds(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "PROVEN_MAX", 2)
    trust = Trust.from_pem(pki.ca_file.read_bytes())
    first, *others = (pki.signed(dns=["agent.db.ztna"]) for _ in range(3))
    identity = judge(trust, first)
    assert judge(trust, first) is identity
    for each in others:
        judge(trust, each)
    assert len(trust._proven) == 2 and judge(trust, first) is not identity
    monkeypatch.setattr(identity_module, "PROVEN_CHAIN_BYTES_MAX", 100)
    large = pki.signed(dns=["agent.db.ztna"])
    assert judge(trust, large) is not judge(trust, large)


def test_ends_require_the_very_peer_the_relay_named(pki: Pki, trust: Trust) -> None:
    agent = judge(trust, pki.signed(dns=["agent.web-app.ztna"]))
    require_agent(agent, WEB, agent.fingerprint)
    connector = judge(trust, pki.signed(dns=CONNECTOR_DNS), "server")
    require_connector(connector, WEB, ConnectorId("c1--a"), connector.fingerprint)
    for attempt in (
        lambda: require_agent(agent, DB, agent.fingerprint),
        lambda: require_agent(agent, WEB, connector.fingerprint),
        lambda: require_agent(connector, WEB, connector.fingerprint),
        lambda: require_connector(connector, DB, ConnectorId("c1"), connector.fingerprint),
        lambda: require_connector(connector, WEB, ConnectorId("c2"), connector.fingerprint),
        lambda: require_connector(connector, WEB, ConnectorId("c1"), agent.fingerprint),
        lambda: require_connector(agent, WEB, ConnectorId("c1"), agent.fingerprint),
    ):
        with pytest.raises(IdentityError) as caught:
            attempt()
        assert caught.value.reason is Reason.NO_GRANT


def test_a_trust_file_holds_cas_only(pki: Pki) -> None:
    leaf = pki.signed(dns=["agent.db.ztna"])
    for pem, words in (
        (leaf.chain_pem, "is no CA certificate"),
        (b"nothing", "cannot be read"),
        (b"", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            Trust.from_pem(pem)
    with pytest.raises(ConfigError, match="holds no certificate"):
        Trust([])


def test_a_subjectless_certificate_can_be_named_in_an_error(trust: Trust) -> None:
    lone, key = forge(None, cn="", dns=["agent.db.ztna"])
    assert "without subject" in refusal(trust, Presented((lone,), key)).detail
