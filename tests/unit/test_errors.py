"""ztna.errors: refusals carry their reason and say the thing."""

from __future__ import annotations

from ztna.errors import IdentityError, Refused, ZtnaError
from ztna.reasons import Reason


def test_a_refusal_tells_reason_and_detail() -> None:
    error = Refused(Reason.NO_GRANT, "agent web may not use db")
    assert (error.reason, error.detail) == (Reason.NO_GRANT, "agent web may not use db")
    assert str(error) == "no_grant: agent web may not use db"


def test_a_refusal_without_detail_is_its_reason() -> None:
    assert str(IdentityError(Reason.EXPIRED)) == "expired"
    assert issubclass(IdentityError, ZtnaError)
