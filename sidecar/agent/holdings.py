"""All that an agent holds: services and their places, flows, live sessions; and what the end of one undoes.

Pure; the one place where a flow fails and a session ends, so that each leaves all tables at once. How a place gets its
session is decided in sidecar.agent.asking, which flow uses which in sidecar.agent.sessions.
"""

from __future__ import annotations

from sidecar.agent.commands import Command, Ended, Fail, Send, Session, SessionKey
from sidecar.agent.relays import Relays
from sidecar.agent.state import IDLE, Flow, Live, Opening, Place, Ready, Resolving, Service
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.wire.control import Closed


class Holdings:
    """To be changed by sidecar.agent.sessions and asking alone."""

    def __init__(self, relays: Relays) -> None:
        self.relays = relays
        self.services: dict[ServiceName, Service] = {}
        self.flows: dict[int, Flow] = {}
        self.live: dict[SessionKey, Live] = {}
        self.unused: dict[SessionKey, float] = {}  # since when, longest first
        self.busy: dict[tuple[ServiceName, ConnectorId | None], Place] = {}  # opening, resolving, waited for
        self.commands: list[Command] = []
        self.unexpected = 0
        """Messages about requests and sessions that are not (or no longer) ours."""

    def unqueue(self, service: Service, number: int) -> None:
        """Have a flow wait nowhere."""
        for place in service.places():
            if place.waiting.pop(number, None) is not None:
                self.note_busy(place)

    def settle(self, number: int, now: float) -> None:
        """Take a flow off the sessions that it used before the one it has."""
        flow = self.flows.get(number)
        if flow is not None:
            former, flow.former = flow.former, ()
            for key in former:
                self.no_longer_used(key, now)

    def let_go(self, number: int, now: float) -> None:
        """Take the flow off its sessions."""
        self.settle(number, now)
        flow = self.flows[number]
        key, flow.session = flow.session, None
        if key is not None:
            self.no_longer_used(key, now)

    def no_longer_used(self, key: SessionKey, now: float) -> None:
        """Count a use of a session less, and end it if it was retired and this was its last."""
        live = self.live.get(key)
        if live is None:
            return
        live.uses -= 1
        if live.uses == 0:
            self.unused[key] = now
            if live.retired is not None:
                self.end(live, live.retired, tell=True)

    def fail(self, number: int, reason: Reason, now: float) -> None:
        """Tell a flow that it gets no session, and forget it."""
        if number in self.flows:
            self.let_go(number, now)
            del self.flows[number]
        self.commands.append(Fail(number, reason))

    def fail_waiting(self, place: Place, reason: Reason, now: float) -> None:
        """Fail all flows that wait at a place."""
        waiting, place.waiting = place.waiting, {}
        for number in waiting:
            self.fail(number, reason, now)

    def usable(self, service: ServiceName, connector: ConnectorId | None = None) -> list[Live]:
        """Return the sessions that new flows of a service may have, with that connector when one is named."""
        return [
            live
            for live in self.live.values()
            if (live.retired is None or (live.runs_out and connector is not None and not live.left))
            and live.session.service == service
            and connector in (None, live.session.opened.connector_id)
        ]

    def retire(self, live: Live, reason: Reason) -> None:
        """Give the session to no new flow, and end it once none uses it."""
        live.retired = reason
        self._no_longer_current(live.session)
        if live.uses == 0:
            self.end(live, reason, tell=True)

    def _no_longer_current(self, session: Session) -> None:
        service = self.services.get(session.service)
        for place in service.places() if service is not None else ():
            if isinstance(place.state, Ready) and place.state.session is session:
                place.state = IDLE

    def end(self, live: Live, reason: Reason, *, tell: bool, relay_lost: bool = False) -> None:
        """Take a session out of all tables; `tell` its relay when that does not know."""
        session = live.session
        del self.live[session.key]
        self.unused.pop(session.key, None)
        self._no_longer_current(session)
        if tell:
            self.commands.append(Send(session.relay, Closed(session.opened.session, reason)))
        self.commands.append(Ended(session, reason, relay_lost))

    def note_busy(self, place: Place) -> None:
        """Keep a place among the busy ones exactly while something is awaited at it."""
        key = (place.service, place.connector)
        if place.waiting or isinstance(place.state, Opening | Resolving):
            self.busy[key] = place
            return
        self.busy.pop(key, None)
        if place.connector is not None:
            self.services[place.service].pinned.pop(place.connector, None)
