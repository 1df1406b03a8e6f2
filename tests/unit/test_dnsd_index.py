"""dnsd.index: updated step by step it is what it would be if made anew."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from dnsd.index import Index, Leases, Services
from tests.support.dns import catalog, instance, lease

NOTHING: tuple[Services, Leases] = ({}, {})
NAMES = ("web", "db", "api")

SERVICE = st.builds(
    lambda connectors, ports: (connectors, ports),
    st.dictionaries(
        st.sampled_from(["c1", "c2"]),
        st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1"]),
        min_size=1,
    ),
    st.sampled_from(["tcp:80", "nonsense"]),
)
STATE = st.tuples(
    st.dictionaries(st.sampled_from(NAMES), SERVICE),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["10.100.1.2", "10.100.1.3", "10.100.2.2"])),
)


def made(state: tuple[dict[str, tuple[dict[str, str], str]], dict[str, str]]) -> tuple[Services, Leases]:
    instances = [
        instance(name, connector, address=address, ports=ports)
        for name, (connectors, ports) in state[0].items()
        for connector, address in connectors.items()
    ]
    return catalog(*instances), {name: lease(address) for name, address in state[1].items()}


def what_it_says(index: Index) -> tuple[object, ...]:
    return index.addresses, index.names, index.octets, index.served


@settings(max_examples=300, deadline=None)
@given(st.lists(STATE, max_size=5))
def test_step_by_step_is_the_same_as_anew(states: list[object]) -> None:
    index, before = Index(), NOTHING
    for state in states:
        after = made(state)  # type: ignore[arg-type]
        was = dict(index.addresses)
        index, moved = index.updated(NAMES, before, after)
        before = after
        anew, _ = Index().updated(NAMES, NOTHING, after)
        assert what_it_says(index) == what_it_says(anew)
        everybody = was.keys() | index.addresses.keys()
        assert moved == {each for each in everybody if was.get(each) != index.addresses.get(each)}


def test_an_earlier_index_stays_as_it_was() -> None:
    first = made(({"web": ({"c1": "192.0.2.1"}, "tcp:80")}, {"web": "10.100.1.2"}))
    index, _ = Index().updated(["web"], NOTHING, first)
    later, moved = index.updated(["web"], first, NOTHING)
    assert what_it_says(later) == ({}, {}, {}, {}) and moved == {"c1"}
    assert index.addresses == {"c1": (IPv4Address("192.0.2.1"),)}
    assert index.names == {"10.100.1.2": ("web",)}
    assert index.octets == {"10": 1, "10.100": 1, "10.100.1": 1}


def test_of_two_names_on_one_address_the_other_stays_when_one_goes() -> None:
    both = made(({}, {"web": "10.100.1.2", "db": "10.100.1.2"}))
    index, _ = Index().updated(["web", "db"], NOTHING, both)
    assert index.names == {"10.100.1.2": ("db", "web")}
    one = made(({}, {"web": "10.100.1.2"}))
    assert index.updated(["db"], both, one)[0].names == {"10.100.1.2": ("web",)}
