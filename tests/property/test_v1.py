"""Whatever a v1 agent sends and the sessions answer: nothing but commands, one session a service, bounded tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.v1 import SERVICES_PER_AGENT_MAX, Agent, Answer, Ask, Drop, PassOn
from tests.support.identities import identity
from ztna.names import ConnectorId, SessionId
from ztna.reasons import Reason
from ztna.wire import control

SERVICES = (b"web", b"db", b"Not-A-Name", b"\xff", b"")
KINDS = st.sampled_from([0x01, 0x10, 0x11, 0x12, 0x13, 0x2E, 0x2F, 0x45, 0x60, 0x99])
COUNTED = st.sampled_from(SERVICES).map(lambda service: bytes((len(service),)) + service)
DATAGRAMS = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda kind, rest: bytes((kind,)) + rest, KINDS, st.binary(max_size=40)),
    st.builds(
        lambda kind, service, rest: bytes((kind,)) + service + rest, KINDS, COUNTED, st.binary(max_size=9)
    ),
)
ANSWERS = st.sampled_from(["opened", "closed", "healthy", *Reason])


@given(st.lists(st.tuples(st.one_of(DATAGRAMS, ANSWERS), st.floats(0, 3)), max_size=60))
def test_any_sequence(steps: list[tuple[bytes | str, float]]) -> None:
    agent = Agent(1, identity("alice", agent=("web", "db")))
    now, asked, open_, sessions = 0.0, list[control.Open](), dict[SessionId, str](), 0
    for step, later in steps:
        now += later
        commands = []
        if isinstance(step, bytes):
            commands = agent.datagram(step, now)
        elif step == "healthy":
            for service in ("web", "db"):
                commands += agent.told(control.Health(service, "passing"), now)  # type: ignore[arg-type]
        elif step == "closed" and open_:
            commands = agent.told(control.Closed(open_.popitem()[0], Reason.PEER_GONE), now)
        elif asked and step != "closed":
            request = asked.pop()
            if step == "opened":
                sessions += 1
                session = SessionId(f"{sessions:016x}")
                open_[session] = request.service
                opened = control.Opened(request.request, session, request.service, ConnectorId("x"), "f" * 64)
                commands = agent.told(opened, now)
            else:
                commands = agent.told(control.Denied(request.request, request.service, Reason(step)), now)
        for command in commands:
            if isinstance(command, Ask):
                asked.append(command.message)
            elif isinstance(command, PassOn):
                assert command.session in open_
            elif isinstance(command, Answer):
                assert command.data[0] in (0x12, 0x13)
                assert isinstance(step, str) or len(command.data) <= len(step) + 3
            elif isinstance(command, Drop):
                assert command.why
    wanted = [*open_.values(), *(each.service for each in asked)]
    assert len(wanted) == len(set(wanted)), "a service was asked for twice"
    assert len(agent._registrations) <= SERVICES_PER_AGENT_MAX
