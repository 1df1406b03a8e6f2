"""Properties of dnsd: any bytes are answered well, and no history of a keeper gives one address to two."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Network

from dnslib import DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dnsd.answer import Answers
from dnsd.keeper import Pool, transactions
from tests.support.dns import catalog, instance, lease, zone
from tests.support.leasing import FakeKv, Lab
from ztna.dns import Message, Type, decode, encode_query, order
from ztna.dns import SrvData as Srv
from ztna.errors import ProtocolError
from ztna.leases import address_key, audit
from ztna.names import ServiceName

EXAMPLES = settings(max_examples=2000, deadline=None)

ANSWERS = Answers(
    zone(
        catalog(instance("web", "c1"), instance("db", "c2", address="192.0.2.2")),
        {"web": lease("10.100.1.2")},
    )
)
LABELS = st.sampled_from(
    [
        "web",
        "db",
        "WEB",
        "nobody",
        "connector",
        "c1",
        "_tcp",
        "_web",
        "_fresh",
        "ztna",
        "local",
        "in-addr",
        "arpa",
        "10",
    ]
)
NAMES = st.lists(LABELS, min_size=1, max_size=6).map(".".join)


@EXAMPLES
@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_get_an_answer_or_none(data: bytes, over_tcp: bool) -> None:
    answer = ANSWERS.answer(data, over_tcp=over_tcp)
    assert answer is None or answer[:2] == data[:2]


@EXAMPLES
@given(st.binary(max_size=600))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(data), Message)


@EXAMPLES
@given(NAMES, st.sampled_from(list(Type)), st.integers(0, 65535), st.integers(0, 65535))
def test_every_answer_reads_back_as_an_answer_to_its_question(
    name: str, kind: Type, message_id: int, size: int
) -> None:
    asked = encode_query(message_id, name, kind, size)
    answer = ANSWERS.answer(asked)
    assert answer is not None
    read, question = decode(answer), decode(asked).questions
    assert (read.id, read.questions, read.is_response, read.truncated) == (message_id, question, True, False)
    assert ANSWERS.answer(asked) == answer
    DNSRecord.parse(answer)


@EXAMPLES
@given(
    st.lists(
        st.builds(Srv, st.integers(0, 3), st.integers(0, 65535), st.just(1), st.text("abc", max_size=3)),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_is_a_permutation_by_priority(records: list[Srv], dice: object) -> None:
    ordered = order(records, lambda n: dice.randrange(n))  # type: ignore[attr-defined]
    assert sorted(ordered) == sorted(records)
    assert [record.priority for record in ordered] == sorted(record.priority for record in records)


NAMES_OF_SERVICES = [f"s{n}" for n in range(9)]
SERVICE = st.sampled_from(NAMES_OF_SERVICES)


class KeepersAtWork(RuleBasedStateMachine):
    """Services come and go, keepers plan, stop halfway, go on with old plans; records get lost.

    Whatever happens, no transaction of a plan can give an address to a second service, and a later plan heals
    the rest.
    """

    @initialize(size=st.sampled_from([29, 28]))
    def start(self, size: int) -> None:
        self.lab = Lab(Pool(IPv4Network(f"10.0.0.0/{size}")), grace_s=10, quarantine_s=30)
        self.kv: FakeKv = self.lab.kv
        self.present: set[str] = set()
        self.now = 1_700_000_000.0
        self.epochs: dict[str, int] = {}
        self.released: dict[str, tuple[str, float]] = {}

    @rule(service=SERVICE, port=st.sampled_from([80, 81]))
    def comes(self, service: str, port: int) -> None:
        self.present.add(service)

    @rule(service=SERVICE)
    def goes(self, service: str) -> None:
        self.present.discard(service)

    @rule(seconds=st.floats(0.01, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_keeper_works(self) -> None:
        self.lab.keep(self.services, self.now)

    @rule(cut=st.integers(0, 3), repeat=st.booleans())
    def a_keeper_is_killed_halfway_and_its_plan_comes_again(self, cut: int, repeat: bool) -> None:
        decided = self.lab.plan(self.services, self.now, read_at=self.now)
        one_by_one = [transactions((change,), "me")[0] for change in decided.changes]
        done = [self.kv.carry_out(operations) for operations in one_by_one[:cut]]
        assert all(done)
        if repeat:
            assert not any(self.kv.carry_out(operations) for operations in one_by_one[:cut])

    @rule()
    def another_keeper_takes_over(self) -> None:
        late = self.lab.plan(self.services, self.now, read_at=self.now)
        self.lab.gone_since = {}
        self.kv.holder = "other"
        assert not any(map(self.kv.carry_out, transactions(late.changes, "me")))
        self.kv.holder = "me"

    @rule(service=SERVICE)
    def a_record_is_lost(self, service: str) -> None:
        stored = self.kv.table.leases.get(ServiceName(service))
        if stored is not None:
            self.kv.pairs.pop(address_key(stored.record.ip), None)

    @property
    def services(self) -> dict[str, object]:
        return catalog(*(instance(name) for name in sorted(self.present)))  # type: ignore[return-value]

    @invariant()
    def no_address_has_two_owners(self) -> None:
        if not hasattr(self, "kv"):
            return
        leases = self.kv.table.leases
        addresses = [stored.record.ip for stored in leases.values()]
        assert len(addresses) == len(set(addresses))

    @invariant()
    def epochs_only_rise(self) -> None:
        if not hasattr(self, "kv"):
            return
        for service, stored in self.kv.table.leases.items():
            assert stored.record.epoch >= self.epochs.get(service, 0)
            self.epochs[service] = stored.record.epoch

    @invariant()
    def nobody_takes_what_rests(self) -> None:
        if not hasattr(self, "kv"):
            return
        owners = {str(stored.record.ip): name for name, stored in self.kv.table.leases.items()}
        for address, (owner, until) in list(self.released.items()):
            if address in owners:
                assert owners[address] == owner or self.now >= until
                del self.released[address]
        for ip, held in self.kv.table.holdings.items():
            if held.record.state == "quarantined" and held.record.released_at is not None:
                self.released[str(ip)] = (held.record.service, held.record.released_at + 30)

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.lab.keep(self.services, self.now + 100)
        assert audit(self.kv.table) == ()
        without = len(self.present) - len(self.present & set(self.kv.table.leases))
        held = len(self.kv.table.leases)
        assert without == 0 or held + self._resting(self.now + 100) == self.lab.rules.pool.size

    def _resting(self, now: float) -> int:
        return sum(
            1
            for held in self.kv.table.holdings.values()
            if held.record.state == "quarantined" and now - (held.record.released_at or 0) < 30
        )


KeepersAtWork.TestCase.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
TestKeepersAtWork = KeepersAtWork.TestCase
