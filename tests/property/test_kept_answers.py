"""Answers that are kept over changes of the zone are those that it would give if asked for the first time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dnsd import feed
from dnsd.answer import NO_OPTIONS, Answers
from dnsd.feed import Copy, Entries, State
from dnsd.services import Service
from dnsd.serving import Age, renewed
from dnsd.zone import rebuilt
from tests.support.dns import catalog, instance, lease, query, zone
from ztna.dns import SoaData, decode
from ztna.leases import Lease

NAMES = ("web", "db", "api")
QUERIES = [
    *(query(f"{name}.ztna.local", kind) for name in NAMES for kind in ("A", "AAAA", "SRV", "TXT", "ANY")),
    *(query(f"_{name}._tcp.ztna.local", kind) for name in NAMES for kind in ("SRV", "PTR", "A")),
    *(query(f"{name}._{name}._tcp.ztna.local", kind) for name in NAMES for kind in ("SRV", "TXT")),
    *(query(f"any.{name}.ztna.local") for name in NAMES),
    *(query(f"c{number}.connector.ztna.local") for number in (1, 2)),
    *(query(f"{last}.{third}.100.10.in-addr.arpa", "PTR") for third in (1, 2) for last in (2, 3)),
    *(query(f"{third}.100.10.in-addr.arpa", "PTR") for third in (1, 2)),
    *(query("ztna.local", kind) for kind in ("SOA", "NS")),
    query("_services._dns-sd._udp.ztna.local", "PTR"),
]

SERVICE = st.dictionaries(
    st.sampled_from(["c1", "c2"]),
    st.tuples(
        st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1"]),
        st.sampled_from(["passing", "critical"]),
        st.sampled_from(["tcp:80", "tcp:81", "nonsense"]),
    ),
    min_size=1,
)
STATE = st.tuples(
    st.dictionaries(st.sampled_from(NAMES), SERVICE),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["10.100.1.2", "10.100.1.3", "10.100.2.2"])),
)


def made(
    state: tuple[dict[str, dict[str, tuple[str, str, str]]], dict[str, str]],
) -> tuple[dict[str, Service], dict[str, Lease]]:
    found = [
        instance(name, connector, address=address, status=status, ports=ports)  # type: ignore[arg-type]
        for name, connectors in state[0].items()
        for connector, (address, status, ports) in connectors.items()
    ]
    return catalog(*found), {name: lease(address) for name, address in state[1].items()}


def told(answers: Answers, asked: bytes) -> object:
    """What is answered, but for the serial in a negative answer: that may be of an earlier state."""
    answer = decode(answers.answer(asked) or b"")
    authority = [
        (record.name, record.data.minimum if isinstance(record.data, SoaData) else record.data)
        for record in answer.authority
    ]
    return answer.code, answer.truncated, answer.answers, authority, answer.additional


@settings(max_examples=60, deadline=None)
@given(st.lists(STATE, min_size=1, max_size=4))
def test_kept_answers_are_those_of_the_state(states: list[object]) -> None:
    here = zone({}, {})
    kept = Answers(here)
    for state in states:
        services, leases = made(state)  # type: ignore[arg-type]
        here = rebuilt(here, services, leases, 2e9)
        before, kept = kept, Answers(here)
        kept.take_over(before)
        anew = Answers(here)
        for asked in QUERIES:
            assert told(kept, asked) == told(anew, asked)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STATE, st.booleans()), min_size=1, max_size=5))
def test_a_worker_that_is_told_of_some_states_answers_as_dnsd_does(states: list[tuple[object, bool]]) -> None:
    """It keeps its ready answers over what it was told, and was not told of every state."""
    copy, known, told_of = Copy(), Answers(None), None
    here = zone({}, {})
    for state, is_told in [*states, (({}, {}), True)]:
        services, leases = made(state)  # type: ignore[arg-type]
        here = rebuilt(here, services, leases, 2e9)
        if not is_told:
            continue
        for data in feed.update(told_of, here, Age(2e9, True, 60.0)):
            message = feed.decode_to_worker(data)
            if isinstance(message, Entries):
                copy.learn(message)
            elif isinstance(message, State):
                known = renewed(known, copy.follow(message), message.age, NO_OPTIONS, 2e9)
        told_of = here
        anew = Answers(here)
        for asked in QUERIES:
            assert told(known, asked) == told(anew, asked)
