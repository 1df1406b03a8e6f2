"""Properties of what dnsd says to anybody: short where it must be, never an answer to an answer, never a crash."""

from __future__ import annotations

import contextlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from dnsd import cookies, snapshot
from dnsd.answer import FORWARD, Answers, Options
from dnsd.onward import handed_on, is_answer, passed_back
from dnsd.query import Malformed, read
from tests.support.dns import catalog, instance, lease, query, with_opt, zone
from ztna.dns import decode
from ztna.errors import ProtocolError
from ztna.names import Zone

EXAMPLES = settings(max_examples=1500, deadline=None)
SECRET = b"s" * 32
NAMES = zone(
    catalog(instance("web", "c1", wildcard="true"), *(instance("big", f"c{n}") for n in range(60))),
    {"web": lease("10.100.1.2")},
)
ANSWERS = Answers(
    NAMES, options=Options(version=b"v", nsid=b"n", secret=SECRET, forwards=True, bounds=NAMES), now=1e9
)
OPTIONS = st.lists(
    st.tuples(st.sampled_from([3, 8, 10, 11, 12, 15, 65001]), st.binary(max_size=44)), max_size=4
).map(lambda pairs: b"".join(struct.pack("!HH", code, len(data)) + data for code, data in pairs))
NAMES_ASKED = ("web.ztna.local", "x.web.ztna.local", "big.ztna.local", "example.com", "no.ztna.local")
QUERIES = [query(name, kind) for name in NAMES_ASKED for kind in ("A", "AAAA", "SRV", "TXT", "ANY")]
OUTSIDE = query("example.com")
ASKED = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda data, size, version, options: with_opt(data, size=size, version=version, options=options),
        st.sampled_from(QUERIES),
        st.integers(0, 65535),
        st.integers(0, 2),
        OPTIONS,
    ),
)


@EXAMPLES
@given(ASKED, st.booleans(), st.binary(min_size=4, max_size=4))
def test_every_answer_is_whole_and_within_what_the_asker_takes(
    data: bytes, over_tcp: bool, source: bytes
) -> None:
    answer = ANSWERS.answer(data, over_tcp=over_tcp, source=source)
    if answer is None:
        assert len(data) < 12 or data[2] & 0x80
    elif answer != FORWARD:
        message = decode(answer)
        assert (answer[:2], message.is_response) == (data[:2], True)
        assert over_tcp or len(answer) <= 1232
    else:
        asked = handed_on(read(data), 7)
        assert decode(asked).questions == decode(data).questions


@EXAMPLES
@given(ASKED, st.booleans(), st.binary(min_size=4, max_size=4))
def test_who_is_over_the_limit_is_never_told_more_than_it_said(
    data: bytes, slips: bool, source: bytes
) -> None:
    """But for the 16 bytes of a cookie and the OPT record around it, RFC 7873's price for proving who one is."""
    answer = ANSWERS.limited(data, source, slips=slips)
    assert answer is None or len(answer) <= len(data) + 27


@EXAMPLES
@given(st.binary(min_size=8, max_size=40), st.binary(min_size=4, max_size=4), st.integers(0, 2**33))
def test_only_cookies_of_ours_are_ours(option: bytes, address: bytes, now: int) -> None:
    assert not cookies.is_valid(SECRET, option, address, now)
    assert cookies.is_valid(SECRET, cookies.cookie(SECRET, option, address, now), address, now)


@EXAMPLES
@given(st.binary(max_size=200))
def test_any_bytes_are_a_query_or_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        read(data + bytes(max(0, 12 - len(data))))


@EXAMPLES
@given(st.binary(max_size=600), st.integers(512, 1232))
def test_any_words_of_an_upstream_come_back_within_the_limit(data: bytes, limit: int) -> None:
    asked = read(OUTSIDE)
    ours = handed_on(asked, 1)
    head = ours[:2] + b"\x81\x80\0\1" + bytes(6) + ours[12:]
    assert is_answer(head + data, ours)
    back = passed_back(head + data, asked, limit)
    assert len(back) <= limit
    assert back[:2] == b"\x12\x34"
    assert not is_answer(data, ours) or data[:2] == ours[:2]


@EXAMPLES
@given(st.binary(max_size=300))
def test_any_file_is_names_or_none(data: bytes) -> None:
    whole = snapshot.encode(Zone("ztna.local"), 1, 1.0, [data])
    for file in (data, whole):
        with contextlib.suppress(ProtocolError):
            assert snapshot.decode(file).domain == "ztna.local"
