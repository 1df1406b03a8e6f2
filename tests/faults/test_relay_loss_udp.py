"""One of two relays is killed, or swallowed by the network: packet links move to the other within 2 s and live on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.support.consul import note_version
from tests.support.lab import udp_route, until
from tests.support.load import ANSWER_SECONDS, Asker
from tests.support.namespaces import Host
from tests.support.relayed import Mesh, killed, relayed_mesh, swallowed
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18007
MOVED_SECONDS = 2.0


class Backend:
    """Echoes datagrams, and remembers who asked: a flow that lives on keeps its address here."""

    def __init__(self, host: Host) -> None:
        self.askers: set[tuple[str, int]] = set()
        self._socket = host.socket(socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", BACKEND_PORT))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                data, asker = self._socket.recvfrom(2048)
            except OSError:
                return
            if not data:
                return
            self.askers.add(asker)
            self._socket.sendto(data, asker)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    with relayed_mesh("newest", [udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT))]) as made:
        made.wait_known()
        yield made


@pytest.fixture
def backend(mesh: Mesh) -> Iterator[Backend]:
    made = Backend(mesh.core)
    yield made
    made.close()


@pytest.fixture
def asker(mesh: Mesh, backend: Backend) -> Asker:
    return Asker(mesh.laptop, mesh.address("echo-service"))


@pytest.mark.parametrize("lose", [killed, swallowed])
def test_only_what_was_under_way_for_two_seconds_is_lost(
    mesh: Mesh, backend: Backend, asker: Asker, lose: Callable[[Mesh, str], AbstractContextManager[None]]
) -> None:
    with asker.asking():
        until("it is answered", lambda: len(asker.answered) > 50)
        doomed = mesh.carrier()
        lost_at = time.monotonic()
        with lose(mesh, doomed):
            begun = time.monotonic()
            until("it is answered again", lambda: asker.answers_after(begun + MOVED_SECONDS) > 50, 30)
            assert mesh.carrier() != doomed
    lost = [at for at in asker.lost() if at > lost_at - ANSWER_SECONDS]
    assert lost, "the relay carried it"
    print(f"lost {len(lost)} of {len(asker.asked)}, the last {max(lost) - begun:.2f} s after the relay")
    assert max(lost) - begun < MOVED_SECONDS
    assert not [at for at in asker.lost() if at <= lost_at - ANSWER_SECONDS]
    assert len(backend.askers) == 1, "the flow's socket at the backend lived on"
    assert len(mesh.agent.events("link_opened")) == 1, "and the link's connection too"
    assert mesh.agent.events("link_moved")


def test_a_drained_relay_loses_nothing(mesh: Mesh, backend: Backend, asker: Asker) -> None:
    with asker.asking():
        until("it is answered", lambda: len(asker.answered) > 50)
        doomed = mesh.carrier()
        begun = time.monotonic()
        assert mesh.relays[doomed].stop(30) == 0
        ended_s = time.monotonic() - begun
        until("it is answered", lambda: asker.answers_after(time.monotonic() - 0.2) > 5)
        assert mesh.carrier() != doomed
    assert asker.lost() == []
    assert len(backend.askers) == 1
    assert ended_s < 10, "it ends when it is empty, not at the deadline"
    print(f"the relay had drained in {ended_s:.2f} s")


def test_a_connector_that_was_restarted_meanwhile_is_found_again(
    mesh: Mesh, backend: Backend, asker: Asker
) -> None:
    with asker.asking():
        until("it is answered", lambda: len(asker.answered) > 50)
        with killed(mesh, mesh.carrier()):
            mesh.connector.kill()
            mesh.connector.start()
            begun = time.monotonic()
            until("it is answered again", lambda: asker.answers_after(begun) > 50, 30)
    # Packets may go by a stream carrier until there is one.
    until(
        "another link, as the old one was lost with the process", lambda: mesh.agent.events("link_opened")[1:]
    )
    assert len(mesh.agent.events("link_opened")) == 2
