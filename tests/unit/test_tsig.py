"""ztna.tsig: signatures that hold, those that do not, and every kind of broken record."""

from __future__ import annotations

import struct

import pytest

from tests.support.dns import query
from ztna import tsig
from ztna.errors import ProtocolError
from ztna.tsig import Error, Exchange, Key

NOW = 1_700_000_000.0
KEY = Key("Edge.ztna", "hmac-sha256", bytes(range(32)))
KEYS = {"edge.ztna": KEY}
QUERY = query("web.ztna.local", "SRV")
TSIG_HEAD = b"\0\xfa\0\xff\0\0\0\0"


def answer_to(data: bytes) -> bytes:
    return data[:2] + b"\x84\0" + data[4:]


def test_a_signed_query_is_received_as_it_was() -> None:
    data, _ = tsig.begin(QUERY, KEY, NOW)
    received = tsig.receive(data, KEYS, NOW + 299)
    assert received.body == QUERY and received.error is Error.NONE and received.exchange is not None
    assert received.exchange.key == KEY
    assert len(data) == len(QUERY) + tsig.signature_bytes(KEY)
    assert tsig.may_be_signed(data) and not tsig.may_be_signed(QUERY)


@pytest.mark.parametrize("algorithm", tsig.ALGORITHMS)
def test_each_answer_is_signed_over_the_one_before(algorithm: str) -> None:
    key = Key("edge.ztna", algorithm, b"s" * 32)
    data, asker = tsig.begin(QUERY, key, NOW)
    server = tsig.receive(data, {"edge.ztna": key}, NOW).exchange
    assert server is not None
    answers = [server.sign(answer_to(QUERY), NOW + n) for n in range(3)]
    assert [asker.verify(each, NOW) for each in answers] == [answer_to(QUERY)] * 3
    with pytest.raises(ProtocolError, match="BADSIG"):
        asker.verify(answers[1], NOW)


def test_an_unsigned_query_is_passed_on() -> None:
    assert tsig.receive(QUERY, KEYS, NOW) == tsig.Received(QUERY)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (Key("other.ztna", KEY.algorithm, KEY.secret), Error.BADKEY),
        (Key(KEY.name, "hmac-sha512", KEY.secret), Error.BADKEY),
        (Key(KEY.name, KEY.algorithm, b"x" * 32), Error.BADSIG),
    ],
)
def test_a_wrong_key_is_refused_without_a_signature(key: Key, error: Error) -> None:
    data, asker = tsig.begin(QUERY, key, NOW)
    received = tsig.receive(data, KEYS, NOW)
    assert received.error is error and received.exchange is None
    assert received.refusal[:2] == QUERY[:2] and received.refusal[3] & 0xF == 9
    with pytest.raises(ProtocolError, match=f"does not hold: BADSIG; it says {error.name}"):
        asker.verify(received.refusal, NOW)


def test_a_wrong_clock_is_refused_with_our_time_signed() -> None:
    data, asker = tsig.begin(QUERY, KEY, NOW - 1000)
    received = tsig.receive(data, KEYS, NOW)
    assert received.error is Error.BADTIME and int(NOW).to_bytes(6) in received.refusal
    with pytest.raises(ProtocolError, match="the server refused our signature: BADTIME"):
        asker.verify(received.refusal, NOW - 1000)


def test_an_error_without_a_name_is_told_by_its_number() -> None:
    _, asker = tsig.begin(QUERY, KEY, NOW)
    assert isinstance(asker, Exchange)
    data, _ = tsig._signed(QUERY, KEY, int(NOW), asker._mac, timers_only=False, error=99)
    with pytest.raises(ProtocolError, match="code 99"):
        asker.verify(data, NOW)


def test_answers_that_are_not_signed_or_late_or_another_keys_are_refused() -> None:
    data, asker = tsig.begin(QUERY, KEY, NOW)
    server = tsig.receive(data, KEYS, NOW).exchange
    assert server is not None
    answer = server.sign(answer_to(QUERY), NOW)
    with pytest.raises(ProtocolError, match="not signed"):
        asker.verify(answer_to(QUERY), NOW)
    with pytest.raises(ProtocolError, match="BADTIME"):
        asker.verify(answer, NOW + 301)
    with pytest.raises(ProtocolError, match="BADKEY"):
        Exchange(Key("another", KEY.algorithm, KEY.secret), b"").verify(answer, NOW)


def test_every_changed_byte_is_noticed() -> None:
    data, _ = tsig.begin(QUERY, KEY, NOW)
    for place in range(2, len(data)):
        changed = data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :]
        try:
            received = tsig.receive(changed, KEYS, NOW)
        except ProtocolError:
            continue
        # The case of the names in the record means nothing (RFC 8945 4.2), so it is not part of the MAC.
        same = changed[place : place + 1].lower() == data[place : place + 1].lower()
        assert received.exchange is None or same, place


def test_a_mac_cut_short_is_named() -> None:
    data, _ = tsig.begin(QUERY, KEY, NOW)
    start = data.index(TSIG_HEAD) + 10
    algorithm_end = data.index(b"\0", start) + 1
    mac = algorithm_end + 10
    cut = data[: mac - 2] + struct.pack("!H", 16) + data[mac : mac + 16] + data[mac + 32 :]
    length = struct.unpack_from("!H", cut, start - 2)[0] - 16
    cut = cut[: start - 2] + struct.pack("!H", length) + cut[start:]
    assert tsig.receive(cut, KEYS, NOW).error is Error.BADTRUNC


def test_the_name_of_the_key_may_be_compressed() -> None:
    key = Key("ztna.local", KEY.algorithm, KEY.secret)
    data, _ = tsig.begin(QUERY, key, NOW)
    plain = b"\x04ztna\x05local\0"
    at = data.rindex(plain)
    pointer = (0xC000 | data.index(plain)).to_bytes(2)
    received = tsig.receive(data[:at] + pointer + data[at + len(plain) :], {"ztna.local": key}, NOW)
    assert received.exchange is not None


def _with_record(record: bytes, *, additional: int = 1) -> bytes:
    return QUERY[:10] + struct.pack("!H", additional) + QUERY[12:] + record


def _record(data: bytes, owner: bytes = b"\0", kind: bytes = TSIG_HEAD) -> bytes:
    return owner + kind + struct.pack("!H", len(data)) + data


def _pointed() -> bytes:
    return (0xC000 | len(QUERY)).to_bytes(2)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\0" * 11, "too short"),
        (QUERY[:4] + b"\xff\xff" * 4 + QUERY[12:], "more than"),
        (QUERY[:-6], "past the end|disagrees"),
        (QUERY + b"\0", "disagrees"),
        (_with_record(b""), "past the end"),
        (_with_record(b"\0" + TSIG_HEAD), "record runs past the end"),
        (_with_record(_record(b"") + _record(b""), additional=2), "not the last"),
        (QUERY[:6] + b"\0\1\0\0\0\0" + QUERY[12:] + _record(b""), "out of place"),
        (_with_record(_record(b"", kind=b"\0\xfa\0\1\0\0\0\0")), "another class"),
        (_with_record(_record(b"")), "overlong or cut label"),
        (_with_record(_record(b"\x01a\0")), "cut short"),
        (_with_record(_record(b"\x01a\0" + b"\0" * 16 + b"x")), "disagrees with its data"),
        (_with_record(_record(b"\x40" + b"a" * 64)), "overlong or cut label"),
        (_with_record(_record(b"", owner=_pointed())), "leads nowhere"),
        (_with_record(_record((b"\x3f" + b"a" * 63) * 5 + b"\0")), "overlong"),
    ],
)
def test_broken_records_are_protocol_errors(data: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        tsig.receive(data, KEYS, NOW)


def test_other_records_are_passed_over() -> None:
    opt = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
    named = _record(b"data", owner=b"\xc0\x0c", kind=b"\0\x01\0\x01\0\0\0\0")
    data = _with_record(opt + named, additional=2)
    assert tsig.receive(data, KEYS, NOW).body == data


def test_a_secret_is_not_told() -> None:
    assert "***" in repr(KEY) and str(KEY.secret) not in repr(KEY)
