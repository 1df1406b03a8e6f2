"""A million mutations of signed queries, NOTIFY and transfers: a value, a refusal or ProtocolError, nothing else."""

from __future__ import annotations

import struct

import pytest

from dnsd import transfer
from dnsd.transfer import Publication
from tests.support.dns import catalog, instance, lease, query, zone
from tests.support.mutations import survive
from ztna import notify, tsig
from ztna.dns import Code, decode
from ztna.errors import ProtocolError
from ztna.tsig import Key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NOW = 1_700_000_000
KEY = Key("edge.ztna", "hmac-sha256", b"k" * 32)
KEYS = {KEY.name: KEY}
SOA = b"\xc0\x0c" + struct.pack("!HHIHHIIIII", 6, 1, 0, 22, 0, 7, 0, 0, 0, 0)
IXFR = query("ztna.local", "IXFR")
ASKED = [
    query("ztna.local", "AXFR"),
    query("100.10.in-addr.arpa", "AXFR"),
    IXFR[:8] + b"\0\1" + IXFR[10:] + SOA,
]
PLAIN = [*ASKED, notify.encode(7, "ztna.local"), query("web.ztna.local", "SRV")]
SIGNED = [tsig.begin(data, KEY, NOW)[0] for data in PLAIN]
PUBLICATION = Publication()
PUBLICATION.publish(zone(catalog(instance("web")), {"web": lease("10.100.1.2")}))


def test_signed_messages(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not what was signed, but for the case of names in the record, never counts as signed."""

    def act(data: bytes) -> None:
        received = tsig.receive(data, KEYS, NOW)
        if received.exchange is not None:
            assert any(received.body[2:] == plain[2:] for plain in PLAIN)
        elif received.error:
            assert received.refusal[:2] == data[:2] and received.refusal[2] & 0x80
            assert received.refusal[3] & 0xF == 9

    survive(capsys, "signed DNS messages", SIGNED, act, (ProtocolError,))


def test_transfers_and_notifies(capsys: pytest.CaptureFixture[str]) -> None:
    """What is read of a message can be answered."""

    def act(data: bytes) -> None:
        if len(data) % 2 and data:
            zone_name = notify.zone_of(data)
            answer = notify.answer(data, Code.NOERROR)
            assert notify.code(answer, int.from_bytes(data[:2])) == 0 and zone_name is not None
            return
        request = transfer.read(data)
        if request is None:
            return
        messages = PUBLICATION.answer(request, over_tcp=True)
        if isinstance(messages, Code):
            decode(transfer.refuse(request, messages))
            return
        for message in messages:
            assert decode(message).id == int.from_bytes(data[:2])

    survive(capsys, "transfers and NOTIFY", [*ASKED, *PLAIN, *PLAIN], act, (ProtocolError,))
