"""How a place gets a session: it asks the relays one after the other, resolves anew, and backs off.

Pure; the states and their transitions are drawn in sidecar.agent.sessions, which says when (protocol.md, Opening).
"""

from __future__ import annotations

from collections.abc import Iterator

from sidecar.agent.commands import Proceed, ReadLease, Send, Session
from sidecar.agent.holdings import Holdings
from sidecar.agent.state import IDLE, BackingOff, Idle, Live, Opening, Place, Ready, Resolving
from ztna.names import ConnectorId
from ztna.reasons import Reason
from ztna.wire.control import Closed, Denied, Open, Opened

OPEN_SECONDS = 5.0
"""How long one relay may take to answer an `open`; it gives each connector 1 s."""
RESOLVE_SECONDS = 2.0
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 3.0
GONE_KEPT_MAX = 1_000

_FINAL = frozenset({Reason.NO_GRANT})
"""A grant is in our certificate and the same everywhere: no other relay, and no other time, says otherwise."""


class Asking:
    """What all places ask for, and have heard."""

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._gone: dict[ConnectorId, None] = {}
        """Connectors that went without a word, as a relay said, and had no session since."""
        self._request = 0

    def advance_all(self, now: float) -> None:
        """Advance every place at which something is awaited."""
        for place in tuple(self._held.busy.values()):
            self.advance(place, now)

    def advance(self, place: Place, now: float) -> None:
        """Do what can be done for the flows that wait: proceed, fail or ask a relay."""
        state = place.state
        if isinstance(state, BackingOff):
            if now >= state.until:
                state = place.state = IDLE
            elif place.connector is None:
                self._held.fail_waiting(place, state.reason, now)
        if isinstance(state, Idle) and place.waiting:
            usable = self._held.usable(place.service, place.connector)
            if usable:
                state = place.state = Ready(usable[-1].session)
            elif (relay := self._held.relays.choose()) is not None:
                self._ask(place, relay, frozenset(), now)
        if isinstance(state, Ready):
            self._proceed(place, state.session)
        self._held.note_busy(place)

    def _proceed(self, place: Place, session: Session) -> None:
        live = self._held.live[session.key]
        waiting, place.waiting = place.waiting, {}
        for number in waiting:
            flow = self._held.flows[number]
            if flow.session != session.key:
                if flow.session is not None:
                    flow.former = (*flow.former, flow.session)
                flow.session = session.key
                live.uses += 1
            self._held.commands.append(Proceed(number, session))
        if waiting:
            self._held.unused.pop(session.key, None)

    def _ask(self, place: Place, relay: str, tried: frozenset[str], now: float) -> None:
        self._request += 1
        lease = self._held.services[place.service].lease
        place.state = Opening(self._request, relay, lease, now + OPEN_SECONDS, tried | {relay})
        self._held.note_busy(place)
        self._held.commands.append(Send(relay, Open(self._request, place.service, lease, place.connector)))

    def ask_next(self, place: Place, tried: frozenset[str], reason: Reason, now: float) -> None:
        """Ask a relay that was not asked yet; when all have said no, that is it for a while."""
        relay = None if reason in _FINAL else self._held.relays.choose(tried)
        if relay is None:
            self.deny(place, reason, now)
        else:
            self._ask(place, relay, tried, now)

    def deny(self, place: Place, reason: Reason, now: float) -> None:
        """Fail those who wait, unless they wait for one connector: it may not yet be at the relays that are left."""
        place.failures += 1
        place.state = BackingOff(reason, now + backoff(place.failures))
        if place.connector is None or reason in _FINAL:
            self._held.fail_waiting(place, reason, now)
        elif place.connector in self._gone:
            for number in [each for each in place.waiting if self._held.flows[each].may_begin_anew]:
                del place.waiting[number]
                self._held.fail(number, Reason.NO_HEALTHY_CONNECTOR, now)
        self._held.note_busy(place)

    def _stale(self, place: Place, now: float) -> None:
        """Resolve again for the flows that did not yet; the others have had their try."""
        for number in tuple(place.waiting):
            flow = self._held.flows[number]
            if flow.resolved and place.connector is None:
                del place.waiting[number]
                self._held.fail(number, Reason.STALE_EPOCH, now)
            flow.resolved = True
        if place.waiting:
            self.resolve(place, now)
        else:
            self.deny(place, Reason.STALE_EPOCH, now)

    def resolve(self, place: Place, now: float) -> None:
        """Have the lease of a place's service read again."""
        place.state = Resolving(now + RESOLVE_SECONDS)
        self._held.note_busy(place)
        self._held.commands.append(ReadLease(place.service))

    def opened(self, relay: str, message: Opened, now: float) -> None:
        """Take a session that a relay has opened, or give it back."""
        key = (relay, message.session)
        if key in self._held.live:
            self._held.unexpected += 1
            return
        place = self._asking(relay, message.request)
        if place is None or not _is_asked_for(place, message):
            # Nobody waits for it any more (it came too late, or the lease has gone): give it back.
            self._held.unexpected += 1
            self._held.commands.append(Send(relay, Closed(message.session, Reason.CLOSED_BY_PEER)))
            return
        state = place.state
        assert isinstance(state, Opening)
        if state.lease != self._held.services[place.service].lease:
            self._held.commands.append(Send(relay, Closed(message.session, Reason.STALE_EPOCH)))
            place.state = IDLE
        else:
            self._gone.pop(message.connector_id, None)
            session = Session(relay, state.lease, message, now)
            self._held.live[key] = Live(session)
            self._held.unused[key] = now
            place.state = Ready(session)
        self.advance(place, now)

    def _asking(self, relay: str, request: int) -> Place | None:
        """Return the place that waits for this relay's answer to this request."""
        for place in self._held.busy.values():
            state = place.state
            if isinstance(state, Opening) and (state.relay, state.request) == (relay, request):
                return place
        return None

    def denied(self, relay: str, message: Denied, now: float) -> None:
        """Go on after a relay's no."""
        place = self._asking(relay, message.request)
        if place is None:
            self._held.unexpected += 1
        elif message.reason is Reason.STALE_EPOCH:
            self._stale(place, now)
        else:
            assert isinstance(place.state, Opening)
            if message.reason is Reason.PEER_GONE and place.connector is not None:
                self.note_gone(place.connector)
            self.ask_next(place, place.state.tried, message.reason, now)

    def note_gone(self, connector: ConnectorId) -> None:
        """Remember that a connector went without a word, until it has a session again."""
        if len(self._gone) >= GONE_KEPT_MAX:
            del self._gone[next(iter(self._gone))]
        self._gone[connector] = None

    def _expire_flows(self, place: Place, now: float) -> None:
        for number in [number for number, deadline in place.waiting.items() if now >= deadline]:
            flow = self._held.flows[number]
            if flow.session in self._held.live:
                place.waiting[number] = now + flow.wait_s  # it is not cut off yet
                continue
            del place.waiting[number]
            self._held.fail(number, Reason.PEER_GONE, now)

    def tick(self, now: float) -> None:
        """Take back what was not answered in time."""
        for place in tuple(self._held.busy.values()):
            self._expire_flows(place, now)
            if isinstance(place.state, Resolving) and now >= place.state.until:
                self.deny(place, Reason.STALE_EPOCH, now)
            elif isinstance(place.state, Opening) and now >= place.state.until:
                self.ask_next(place, place.state.tried, Reason.POLICY_UNKNOWN, now)
            elif isinstance(place.state, BackingOff):
                self.advance(place, now)
            self._held.note_busy(place)

    def timers(self) -> Iterator[float]:
        """Yield when `tick` has something to do."""
        for place in self._held.busy.values():
            if isinstance(place.state, Opening | Resolving | BackingOff):
                yield place.state.until
            if place.waiting:
                yield min(place.waiting.values())


def _is_asked_for(place: Place, message: Opened) -> bool:
    return place.service == message.service and place.connector in (None, message.connector_id)


def backoff(failures: int) -> float:
    """Return how long after the n-th failure in a row no relay is asked again, in seconds."""
    return min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_SECONDS)
