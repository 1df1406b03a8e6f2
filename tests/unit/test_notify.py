"""ztna.notify: what a primary says, what is read of it, and what is no NOTIFY."""

from __future__ import annotations

import pytest
from dnslib import OPCODE, QTYPE, DNSRecord

from tests.support.dns import query
from ztna import notify
from ztna.dns import Code
from ztna.errors import ProtocolError

SAID = notify.encode(0x1234, "ztna.local")


def test_a_notify_is_what_dnslib_reads() -> None:
    record = DNSRecord.parse(SAID)
    assert (record.header.id, OPCODE[record.header.opcode], record.header.aa) == (0x1234, "NOTIFY", 1)
    assert (str(record.q.qname), QTYPE[record.q.qtype]) == ("ztna.local.", "SOA")


def test_it_is_heard_and_answered() -> None:
    assert notify.zone_of(SAID.replace(b"ztna", b"ZTNA")) == "ztna.local"
    answer = notify.answer(SAID + b"what follows the question", Code.REFUSED)
    assert notify.code(answer, 0x1234) == Code.REFUSED
    assert DNSRecord.parse(answer).q.qname == "ztna.local"
    assert notify.zone_of(notify.encode(1, "a.b.c")) == "a.b.c"


@pytest.mark.parametrize(
    "data", [b"", SAID, notify.answer(SAID, Code.NOERROR).replace(b"\x12\x34", b"\x12\x35"), query("a")]
)
def test_nothing_else_counts_as_the_answer(data: bytes) -> None:
    assert notify.code(data, 0x1234) is None


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "too short"),
        (SAID + b"\0" * 600, "too long"),
        (query("ztna.local", "SOA"), "of one zone"),
        (notify.answer(SAID, Code.NOERROR), "of one zone"),
        (SAID[:4] + b"\0\2" + SAID[6:], "of one zone"),
        (SAID[:12] + b"\xc0\x0c" + SAID[-4:], "compressed"),
        (SAID[:-4] + b"\0\1\0\1", "ask for an SOA"),
        (SAID[:-6], "ask for an SOA"),
    ],
)
def test_what_is_no_notify_is_a_protocol_error(data: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        notify.zone_of(data)
