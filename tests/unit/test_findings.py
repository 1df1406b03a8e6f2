"""ztna.findings: what measurements of a host mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.support.identities import identity
from ztna import findings
from ztna.findings import Verdict


@pytest.mark.parametrize(
    ("skew", "verdict", "words"),
    [
        (0.0, Verdict.FINE, "0.0 s behind Consul"),
        (-5.0, Verdict.FINE, "5.0 s behind Consul"),
        (5.1, Verdict.WRONG, "5.1 s ahead of Consul"),
        (-3600, Verdict.WRONG, "3600.0 s behind"),
    ],
)
def test_a_clock_may_be_a_little_off(skew: float, verdict: Verdict, words: str) -> None:
    found = findings.clock(skew, "Consul")
    assert found.verdict is verdict and words in found.told
    assert bool(found.todo) == (verdict is not Verdict.FINE)


@pytest.mark.parametrize(
    ("days_left", "verdict"), [(10, Verdict.FINE), (1, Verdict.FINE), (0.9, Verdict.WARNING)]
)
def test_a_certificate_is_renewed_with_a_third_of_its_life_left(days_left: float, verdict: Verdict) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    until = now + timedelta(days=days_left)
    whose = identity("laptop", not_before=until - timedelta(days=3), not_after=until)
    found = findings.certificate(whose, now, "agent")
    assert (found.check, found.verdict) == ("agent certificate", verdict)
    assert f"{days_left:.1f} days left" in found.told and bool(found.todo) == (verdict is Verdict.WARNING)


LOCALLY = ("0.0.0.0", 5000)
HOSTS = {"192.0.2.7"}


@pytest.mark.parametrize(
    ("seen", "verdict", "words"),
    [
        ({}, Verdict.UNKNOWN, "no relay said"),
        ({"a": ("192.0.2.7", 5000)}, Verdict.FINE, "none: a saw 192.0.2.7:5000"),
        ({"a": ("192.0.2.7", 5001)}, Verdict.FINE, "one relay cannot tell"),
        ({"a": ("198.51.100.1", 5000)}, Verdict.FINE, "one relay cannot tell"),
        ({"a": ("198.51.100.1", 7), "b": ("198.51.100.1", 7)}, Verdict.FINE, "one mapping"),
        ({"a": ("198.51.100.1", 7), "b": ("198.51.100.1", 8)}, Verdict.WARNING, "symmetric"),
        ({"a": ("2001:db8::1", 7)}, Verdict.FINE, "[2001:db8::1]:7"),
    ],
)
def test_a_nat_shows_in_what_relays_see(
    seen: dict[str, tuple[str, int]], verdict: Verdict, words: str
) -> None:
    found = findings.mapping(LOCALLY, HOSTS, seen)
    assert found.verdict is verdict and words in found.told


def test_small_packets_work_and_are_said() -> None:
    assert findings.payload(1350, "edge").verdict is Verdict.FINE
    found = findings.payload(1200, "edge")
    assert found.verdict is Verdict.WARNING and "1200" in found.told and "1350" in found.todo


def test_rights_that_a_token_lacks_are_named_with_the_policy_that_gives_them() -> None:
    assert findings.rights([], "agent", 4).verdict is Verdict.FINE
    found = findings.rights(["key ztna/vip/x: read", "a"], "agent", 4)
    assert found.verdict is Verdict.WRONG and found.told == "lacks a; key ztna/vip/x: read"
    assert "docs/policies/agent.hcl" in found.todo


def test_names_that_others_bring_too_are_found() -> None:
    ours = {"ztna": "/env", "sidecar": "/env"}
    assert findings.distributions(ours, "/env", {"sidecar": ()}).verdict is Verdict.FINE
    found = findings.distributions(ours, "/env", {"sidecar": {"sidecar"}, "ztna": ()})
    assert found.verdict is Verdict.WARNING and "sidecar of sidecar" in found.told
    for place in ("/elsewhere", None):
        found = findings.distributions(ours | {"sidecar": place}, "/env", {})
        assert found.verdict is Verdict.WRONG and f"sidecar comes from {place or 'nowhere'}" in found.told
        assert "an environment of its own" in found.todo
