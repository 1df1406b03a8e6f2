"""Each reason: what it means, what to do, and its code where the wire has a number for it."""

from __future__ import annotations

from relay.v1 import _NACKS
from sidecar.link.flow import reset_code
from tests.reference import markdown
from ztna.reasons import MEANINGS, Reason
from ztna.remedies import REMEDIES

INTRODUCTION = """One closed list: the same word is on the wire, in logs (`reason`), in metrics
(`ztna_refusals_total{where,reason}`) and in what commands print. RESET is its byte in a frame of the
[stream carrier](../protocol.md#stream-carrier) (00: none to tell), NACK its status towards agents that speak only
`ztna-v1`; a reason without one leaves their registration standing."""


def page() -> str:
    """Return the page."""
    rows = [
        (
            f"[{markdown.code(reason)}](#{markdown.anchor(reason)})",
            f"{reset_code(reason):02X}",
            f"{_NACKS[reason]:02X}" if reason in _NACKS else "",
            MEANINGS[reason],
        )
        for reason in Reason
    ]
    table = markdown.table(("Reason", "RESET", "NACK", "What has happened"), rows)
    remedies = [f"### {markdown.code(reason)}\n\n{_what_to_do(reason)}" for reason in Reason]
    made_from = "`ztna/reasons.py` and `ztna/remedies.py`"
    return markdown.page("Reasons", made_from, INTRODUCTION, table, "## What to do", *remedies)


def _what_to_do(reason: Reason) -> str:
    remedy = markdown.text(REMEDIES[reason])
    return f"{remedy[0].upper()}{remedy[1:]}."
