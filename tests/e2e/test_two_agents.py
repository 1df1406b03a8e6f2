"""Two agents with one inner source address and port at one service: no reply crosses, no death disturbs."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, lab, udp_route, until
from tests.support.namespaces import Host
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

DATAGRAMS = 1000
IN_FLIGHT = 16
ATTEMPTS = 5
SOURCE = ("127.0.0.1", 5555)
BACKEND_PORT = 18007


@dataclass
class Asker:
    """Asks from SOURCE on its host, and keeps every answer."""

    name: str
    host: Host
    address: str
    answers: list[bytes] = field(default_factory=list)
    unanswered: set[bytes] = field(default_factory=set)

    def ask(self, count: int, first: int = 0) -> None:
        """Ask `count` questions, IN_FLIGHT at a time, each up to ATTEMPTS times; end when told it is in vain."""
        with self.host.socket(socket.SOCK_DGRAM) as asker:
            asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asker.bind(SOURCE)
            asker.connect((self.address, 7))
            asker.settimeout(1.0)
            questions = [b"%s %d" % (self.name.encode(), number) for number in range(first, first + count)]
            for start in range(0, count, IN_FLIGHT):
                some = set(questions[start : start + IN_FLIGHT])
                try:
                    self._ask_some(asker, some)
                except ConnectionRefusedError:  # nobody listens there any more
                    self.unanswered |= some
                    return

    def _ask_some(self, asker: socket.socket, open_questions: set[bytes]) -> None:
        for _ in range(ATTEMPTS):
            for question in sorted(open_questions):
                asker.send(question)
            while open_questions:
                try:
                    answer = asker.recv(2048)
                except TimeoutError:
                    break
                self.answers.append(answer)
                open_questions.discard(answer)
            if not open_questions:
                return
        self.unanswered |= open_questions


@dataclass
class Pair:
    lab: Lab
    agents: dict[str, Daemon]
    askers: dict[str, Asker]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    note_version(request, request.param)
    with lab("core", "left", "right") as made:
        made.start_consul(request.param)
        core = made.host("core")
        made.python("backend", core, "-m", "tests.support.backends", "--udp", str(BACKEND_PORT))
        made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),)).wait_ready()
        made.relay().wait_ready()
        made.connector("alpha", [udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT))]).wait_ready()
        agents = {name: made.agent(name, ["echo-service"], host=name) for name in ("left", "right")}
        for agent in agents.values():
            agent.wait_ready()
        address = made.address("echo-service", "left", server=core.address)
        askers = {name: Asker(name, made.host(name), address) for name in agents}
        for asker in askers.values():
            until(f"{asker.name} reaches the service", lambda asker=asker: _answered(asker))
        yield Pair(made, agents, askers)


def _answered(asker: Asker) -> bool:
    asker.ask(1)
    reached, asker.answers, asker.unanswered = bool(asker.answers), [], set()
    return reached


def _ask_at_once(askers: list[Asker], count: int, first: int) -> None:
    threads = [threading.Thread(target=asker.ask, args=(count, first)) for asker in askers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "asking did not end"


def test_every_reply_reaches_its_own_asker_and_none_the_other(pair: Pair) -> None:
    _ask_at_once(list(pair.askers.values()), DATAGRAMS, first=1)
    for name, asker in pair.askers.items():
        own = {b"%s %d" % (name.encode(), number) for number in range(1, DATAGRAMS + 1)}
        assert set(asker.answers) - own == set(), f"{name} was given what another asked for"
        assert asker.unanswered == set()
        assert set(asker.answers) == own


def test_killing_one_agent_does_not_disturb_the_other(pair: Pair) -> None:
    victim, survivor = pair.askers["left"], pair.askers["right"]
    threads = [threading.Thread(target=asker.ask, args=(3 * DATAGRAMS, 1)) for asker in (victim, survivor)]
    for thread in threads:
        thread.start()
    until(
        "both are being answered",
        lambda: min(len(victim.answers), len(survivor.answers)) >= DATAGRAMS,
        every=0.001,
    )
    pair.agents["left"].signal(signal.SIGKILL)
    assert len(survivor.answers) < 3 * DATAGRAMS, "the death was to come in the middle"
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert victim.unanswered, "the victim was still asking when its agent died"
    assert survivor.unanswered == set()
    assert set(survivor.answers) == {b"right %d" % number for number in range(1, 3 * DATAGRAMS + 1)}
    survivor.ask(100, first=3 * DATAGRAMS + 1)
    assert survivor.unanswered == set()
