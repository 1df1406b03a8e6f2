"""ztna.reasons: the closed list is protocol.md's."""

from __future__ import annotations

from ztna.reasons import MEANINGS, Reason

LISTED = """
    no_certificate untrusted expired revoked no_grant no_such_service no_healthy_connector stale_epoch
    not_your_session limit_reached policy_unknown draining peer_gone closed_by_peer malformed
"""


def test_the_list_is_closed_and_spelled_as_on_the_wire() -> None:
    assert {str(reason) for reason in Reason} == set(LISTED.split())


def test_each_reason_has_its_own_meaning() -> None:
    assert list(MEANINGS) == list(Reason)
    assert len(set(MEANINGS.values())) == len(MEANINGS)
