"""Decide which session carries each flow of each service, and by which relay.

    idle --flow waits--> opening --opened--> open --closed, retired--> idle
      ^                   |  |                 |
      |               denied stale_epoch   stale_epoch
      |                   |  +---> resolving <-+
      +--backoff over-- denied <---+ no newer lease

A place of a service is in one of these states: the one for new flows, who may go to any connector, and one for each
connector to whom running flows must get back (Move). A session is retired when new flows shall not have it, left when
its relay drains or is silent. Pure: the caller carries out the commands, tells what happened, and wakes it at
`next_timer()`. Knows neither links nor sockets, nor whether a flow is TCP or UDP. Source: protocol.md, Control stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sidecar.agent.commands import (
    Cause,
    Command,
    Ended,
    Event,
    Fail,
    LeaseIs,
    Leave,
    Move,
    Proceed,
    ReadLease,
    Received,
    RelayDown,
    RelayEvent,
    RelayForgotten,
    RelayHeard,
    RelaySilent,
    RelayUp,
    Release,
    Retry,
    RunOut,
    Send,
    ServiceView,
    Session,
    SessionKey,
    Settle,
    Tick,
    Want,
)
from sidecar.agent.relays import Relays, RelayState
from sidecar.agent.state import (
    IDLE,
    BackingOff,
    Flow,
    Idle,
    Live,
    Opening,
    Place,
    Ready,
    Resolving,
    Service,
)
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.wire.control import Closed, Denied, Drain, Health, Open, Opened, Retired

OPEN_SECONDS = 5.0
"""How long one relay may take to answer an `open`; it gives each connector 1 s."""
RESOLVE_SECONDS = 2.0
FLOW_WAIT_SECONDS = 5.0
WAITING_PER_SERVICE_MAX = 256
FLOW_ATTEMPTS_MAX = 2
FLOW_ATTEMPTS_ENDED_MAX = 4
SESSION_IDLE_SECONDS = 300.0
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 3.0
GONE_KEPT_MAX = 1_000
STEADY_SECONDS = 5.0
"""A session that lived this long was a good one: what ends it does not count as yet another failure, and a
connector that denies it by then has forgotten it (it was restarted) rather than never known it."""

HEALTHY_STATES = frozenset({"passing", "warning"})

_FINAL = frozenset({Reason.NO_GRANT})
"""A grant is in our certificate and the same everywhere: no other relay, and no other time, says otherwise."""


class Sessions:
    """All sessions of one agent and the flows that wait for or use them."""

    def __init__(self, relays: Iterable[str], flows_max: int) -> None:
        """Take the relays' names, preferred first, and how many flows there may be at once."""
        self.relays = Relays(relays)
        self._flows_max = flows_max
        self._services: dict[ServiceName, Service] = {}
        self._flows: dict[int, Flow] = {}
        self._live: dict[SessionKey, Live] = {}
        self._unused: dict[SessionKey, float] = {}  # since when, longest first
        self._busy: dict[tuple[ServiceName, ConnectorId | None], Place] = {}  # opening, resolving, waited for
        self._gone: dict[ConnectorId, None] = {}
        """Connectors that went without a word, as a relay said, and had no session since."""
        self._request = 0
        self._commands: list[Command] = []
        self.unexpected = 0
        """Messages about requests and sessions that are not (or no longer) ours."""

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take what happened at `now` (seconds, monotonic) and return what to do, in order."""
        match event:
            case Want():
                self._want(event, now)
            case Release():
                self._release(event.flow, now)
            case Retry():
                self._retry(event, now)
            case Move():
                self._move(event, now)
            case Settle():
                self._settle(event.flow, now)
            case Received():
                self._received(event, now)
            case LeaseIs():
                self._lease_is(event, now)
            case Tick():
                self._tick(now)
            case _:
                self._relay_event(event, now)
        commands, self._commands = self._commands, []
        return commands

    def next_timer(self) -> float | None:
        """Return when to `handle(Tick())` next, if ever."""
        times = list(self._timers())
        return min(times) if times else None

    def session(self, key: SessionKey) -> Session | None:
        """Return a live session."""
        live = self._live.get(key)
        return live.session if live else None

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All live sessions, retired ones that still carry flows too."""
        return tuple(live.session for live in self._live.values())

    def is_used(self, relay: str) -> bool:
        """Say whether any flow depends on a relay now."""
        return any(key[0] == relay and live.uses for key, live in self._live.items())

    def views(self) -> tuple[ServiceView, ...]:
        """Return what there is to see, by service name."""
        return tuple(self._view(self._services[name]) for name in sorted(self._services))

    # --- flows

    def _want(self, event: Want, now: float) -> None:
        service = self._services.get(event.service)
        if service is None:
            self._fail(event.flow, Reason.NO_SUCH_SERVICE, now)
        elif len(self._flows) >= self._flows_max or len(service.any.waiting) >= WAITING_PER_SERVICE_MAX:
            self._fail(event.flow, Reason.LIMIT_REACHED, now)
        else:
            self._flows[event.flow] = Flow(event.service)
            self._queue(service.any, event.flow, FLOW_WAIT_SECONDS, now)

    def _queue(self, place: Place, number: int, wait_s: float, now: float) -> None:
        self._flows[number].wait_s = wait_s
        place.waiting[number] = now + wait_s
        self._advance(place, now)

    def _retry(self, event: Retry, now: float) -> None:
        flow = self._flows.get(event.flow)
        if flow is None:
            # It failed meanwhile, and whoever asks has not heard of it: his patience was over in the same turn.
            self._fail(event.flow, event.cause.reason, now)
            return
        if flow.session is None:
            return  # it waits already
        live = self._live.get(flow.session)
        final = self._final(flow, live, event.cause, now)
        self._let_go(event.flow, now)
        if live is not None and live.retired is None and not (final and event.cause is Cause.DENIED):
            self._give_up(live, event.cause, now, resolve=not final)
        service = self._services.get(flow.service)
        if final or service is None:
            self._fail(event.flow, event.cause.reason, now)
            return
        flow.attempts += 1
        flow.resolved |= event.cause is Cause.STALE
        self._unqueue(service, event.flow)
        self._queue(service.any, event.flow, FLOW_WAIT_SECONDS, now)

    @staticmethod
    def _final(flow: Flow, live: Live | None, cause: Cause, now: float) -> bool:
        """Say whether the flow has had its tries.

        A denial by a connector that accepted the session just now is about the flow (a budget is used up), so
        another session would not help it, and the others keep this one. A session that ended under it (a certificate
        was renewed at either end, and perhaps at both) says nothing about the flow.
        """
        if cause is Cause.STALE:
            return flow.resolved
        if cause is Cause.DENIED and live is not None and not _is_steady(live.session, now):
            return True
        return flow.attempts >= (FLOW_ATTEMPTS_MAX if live is not None else FLOW_ATTEMPTS_ENDED_MAX)

    def _give_up(self, live: Live, cause: Cause, now: float, *, resolve: bool) -> None:
        """Use the session for no new flow; those that run on it may go on as long as they can."""
        place = self._services[live.session.service].any
        self._retire(live, cause.reason)
        if cause is Cause.STALE and resolve:
            self._resolve(place, now)
            return
        place.failures = 1 if _is_steady(live.session, now) else place.failures + 1
        if place.failures > 1:
            place.state = BackingOff(cause.reason, now + _backoff(place.failures - 1))

    def _move(self, event: Move, now: float) -> None:
        flow = self._flows.get(event.flow)
        service = self._services.get(flow.service) if flow is not None else None
        if flow is None or service is None:
            self._fail(event.flow, Reason.NO_SUCH_SERVICE, now)
            return
        if event.doubted is not None:
            flow.may_begin_anew = True
            doubted = self._live.get(event.doubted)
            if doubted is not None and doubted.retired is None:
                self._retire(doubted, Reason.PEER_GONE)
        self._unqueue(service, event.flow)
        place = service.pinned.setdefault(event.connector, Place(flow.service, event.connector))
        self._queue(place, event.flow, event.wait_s, now)

    def _settle(self, number: int, now: float) -> None:
        flow = self._flows.get(number)
        if flow is not None:
            former, flow.former = flow.former, ()
            for key in former:
                self._no_longer_used(key, now)

    def _release(self, number: int, now: float) -> None:
        flow = self._flows.get(number)
        if flow is None:
            return
        self._let_go(number, now)
        del self._flows[number]
        service = self._services.get(flow.service)
        if service is not None:
            self._unqueue(service, number)

    def _unqueue(self, service: Service, number: int) -> None:
        for place in service.places():
            if place.waiting.pop(number, None) is not None:
                self._note_busy(place)

    def _let_go(self, number: int, now: float) -> None:
        """Take the flow off its sessions."""
        self._settle(number, now)
        flow = self._flows[number]
        key, flow.session = flow.session, None
        if key is not None:
            self._no_longer_used(key, now)

    def _no_longer_used(self, key: SessionKey, now: float) -> None:
        """Count a use of a session less, and end it if it was retired and this was its last."""
        live = self._live.get(key)
        if live is None:
            return
        live.uses -= 1
        if live.uses == 0:
            self._unused[key] = now
            if live.retired is not None:
                self._end(live, live.retired, tell=True)

    def _fail(self, number: int, reason: Reason, now: float) -> None:
        if number in self._flows:
            self._let_go(number, now)
            del self._flows[number]
        self._commands.append(Fail(number, reason))

    def _fail_waiting(self, place: Place, reason: Reason, now: float) -> None:
        waiting, place.waiting = place.waiting, {}
        for number in waiting:
            self._fail(number, reason, now)

    # --- relays

    def _relay_event(self, event: RelayEvent, now: float) -> None:
        relay = event.relay
        match event:
            case RelayUp():
                self.relays.set(relay, RelayState.UP)
            case RelaySilent():
                self.relays.set(relay, RelayState.SILENT)
            case RelayHeard():
                if self.relays.state(relay) is RelayState.SILENT:
                    self.relays.set(relay, RelayState.UP)
            case RelayDown():
                self._relay_down(relay, event.reason)
            case RelayForgotten():
                self.relays.forget(relay)
            case _:
                if self.relays.measured(relay, event.rtt_s, now):
                    self._go_over_to_preferred()
        self._leave(now)
        self._advance_all(now)

    def _relay_down(self, relay: str, reason: Reason) -> None:
        self.relays.set(relay, RelayState.DOWN)
        is_lost = reason is Reason.PEER_GONE
        for live in [live for key, live in self._live.items() if key[0] == relay]:
            self._end(live, reason, tell=False, relay_lost=is_lost)
        for place in self._busy.values():
            if isinstance(place.state, Opening) and place.state.relay == relay:
                place.state = IDLE

    def _leave(self, now: float) -> None:
        """Have everything leave the relays that go or may have gone, once another one is up."""
        if RelayState.UP not in self.relays.states.values():
            return
        for key, live in tuple(self._live.items()):
            state = self.relays.state(key[0])
            if state is RelayState.UP or live.left:
                continue
            live.left = True
            self._commands.append(Leave(live.session))
            if live.retired is None:
                self._retire(live, Reason.DRAINING if state is RelayState.DRAINING else Reason.PEER_GONE)
        for place in tuple(self._busy.values()):
            opening = place.state
            if isinstance(opening, Opening) and self.relays.state(opening.relay) is not RelayState.UP:
                # What it answers nevertheless is given back.
                self._ask_next(place, opening.tried, Reason.POLICY_UNKNOWN, now)

    def _go_over_to_preferred(self) -> None:
        """Give new flows sessions by the relay that is nearer by now; those that run stay where they are."""
        for live in tuple(self._live.values()):
            if live.retired is None and live.session.relay != self.relays.preferred:
                self._retire(live, Reason.CLOSED_BY_PEER)

    def _received(self, event: Received, now: float) -> None:
        match event.message:
            case Opened():
                self._opened(event.relay, event.message, now)
            case Denied():
                self._denied(event.relay, event.message, now)
            case Closed():
                self._closed(event.relay, event.message, now)
            case Retired():
                self._run_out(event.relay, event.message)
            case Health():
                self._health(event.message, now)
            case Drain():
                self.relays.set(event.relay, RelayState.DRAINING)
                self._leave(now)
            case _:
                return

    def _opened(self, relay: str, message: Opened, now: float) -> None:
        key = (relay, message.session)
        if key in self._live:
            self.unexpected += 1
            return
        place = self._asking(relay, message.request)
        if place is None or not _is_asked_for(place, message):
            # Nobody waits for it any more (it came too late, or the lease has gone): give it back.
            self.unexpected += 1
            self._commands.append(Send(relay, Closed(message.session, Reason.CLOSED_BY_PEER)))
            return
        state = place.state
        assert isinstance(state, Opening)
        if state.lease != self._services[place.service].lease:
            self._commands.append(Send(relay, Closed(message.session, Reason.STALE_EPOCH)))
            place.state = IDLE
        else:
            self._gone.pop(message.connector_id, None)
            session = Session(relay, state.lease, message, now)
            self._live[key] = Live(session)
            self._unused[key] = now
            place.state = Ready(session)
        self._advance(place, now)

    def _asking(self, relay: str, request: int) -> Place | None:
        """Return the place that waits for this relay's answer to this request."""
        for place in self._busy.values():
            state = place.state
            if isinstance(state, Opening) and (state.relay, state.request) == (relay, request):
                return place
        return None

    def _denied(self, relay: str, message: Denied, now: float) -> None:
        place = self._asking(relay, message.request)
        if place is None:
            self.unexpected += 1
        elif message.reason is Reason.STALE_EPOCH:
            self._stale(place, now)
        else:
            assert isinstance(place.state, Opening)
            if message.reason is Reason.PEER_GONE and place.connector is not None:
                self._note_gone(place.connector)
            self._ask_next(place, place.state.tried, message.reason, now)

    def _note_gone(self, connector: ConnectorId) -> None:
        if len(self._gone) >= GONE_KEPT_MAX:
            del self._gone[next(iter(self._gone))]
        self._gone[connector] = None

    def _stale(self, place: Place, now: float) -> None:
        """Resolve again for the flows that did not yet; the others have had their try."""
        for number in tuple(place.waiting):
            flow = self._flows[number]
            if flow.resolved and place.connector is None:
                del place.waiting[number]
                self._fail(number, Reason.STALE_EPOCH, now)
            flow.resolved = True
        if place.waiting:
            self._resolve(place, now)
        else:
            self._deny(place, Reason.STALE_EPOCH, now)

    def _resolve(self, place: Place, now: float) -> None:
        place.state = Resolving(now + RESOLVE_SECONDS)
        self._note_busy(place)
        self._commands.append(ReadLease(place.service))

    def _ask_next(self, place: Place, tried: frozenset[str], reason: Reason, now: float) -> None:
        """Ask a relay that was not asked yet; when all have said no, that is it for a while."""
        relay = None if reason in _FINAL else self.relays.choose(tried)
        if relay is None:
            self._deny(place, reason, now)
        else:
            self._ask(place, relay, tried, now)

    def _deny(self, place: Place, reason: Reason, now: float) -> None:
        """Fail those who wait, unless they wait for one connector: it may not yet be at the relays that are left."""
        place.failures += 1
        place.state = BackingOff(reason, now + _backoff(place.failures))
        if place.connector is None or reason in _FINAL:
            self._fail_waiting(place, reason, now)
        elif place.connector in self._gone:
            for number in [each for each in place.waiting if self._flows[each].may_begin_anew]:
                del place.waiting[number]
                self._fail(number, Reason.NO_HEALTHY_CONNECTOR, now)
        self._note_busy(place)

    def _closed(self, relay: str, message: Closed, now: float) -> None:
        live = self._live.get((relay, message.session))
        if live is None:
            self.unexpected += 1
            return
        service = self._services.get(live.session.service)
        if message.reason is Reason.PEER_GONE:
            self._note_gone(live.session.opened.connector_id)
        current = live.retired is None
        self._end(live, message.reason, tell=False)
        if service is None or not current:
            return
        if _is_steady(live.session, now):
            service.any.failures = 0
        if message.reason is Reason.STALE_EPOCH:
            self._resolve(service.any, now)

    def _run_out(self, relay: str, message: Retired) -> None:
        live = self._live.get((relay, message.session))
        if live is None:
            self.unexpected += 1
            return
        live.runs_out = True
        if live.retired is None:
            self._retire(live, Reason.DRAINING)
        if live.session.key in self._live:
            self._commands.append(RunOut(live.session))

    def _health(self, message: Health, now: float) -> None:
        service = self._services.get(message.service)
        if service is None or message.state not in HEALTHY_STATES:
            return
        for place in service.places():
            if isinstance(place.state, BackingOff):
                place.state, place.failures = IDLE, 0
                self._advance(place, now)

    # --- leases

    def _lease_is(self, event: LeaseIs, now: float) -> None:
        service = self._services.get(event.service)
        if event.lease is None:
            if service is not None:
                self._vanish(service, now)
        elif service is None:
            self._services[event.service] = Service(event.service, event.lease, Place(event.service))
        else:
            service.lease = event.lease
            for live in self._usable(event.service):
                if live.session.lease != event.lease:
                    self._retire(live, Reason.STALE_EPOCH)
            for place in service.places():
                if isinstance(place.state, Resolving):
                    place.state = IDLE
                self._advance(place, now)

    def _vanish(self, service: Service, now: float) -> None:
        for live in self._usable(service.name):
            self._retire(live, Reason.CLOSED_BY_PEER)
        for place in service.places():
            self._fail_waiting(place, Reason.NO_SUCH_SERVICE, now)
            self._busy.pop((service.name, place.connector), None)
        del self._services[service.name]

    # --- going on

    def _advance_all(self, now: float) -> None:
        for place in tuple(self._busy.values()):
            self._advance(place, now)

    def _advance(self, place: Place, now: float) -> None:
        """Do what can be done for the flows that wait: proceed, fail or ask a relay."""
        state = place.state
        if isinstance(state, BackingOff):
            if now >= state.until:
                state = place.state = IDLE
            elif place.connector is None:
                self._fail_waiting(place, state.reason, now)
        if isinstance(state, Idle) and place.waiting:
            usable = self._usable(place.service, place.connector)
            if usable:
                state = place.state = Ready(usable[-1].session)
            elif (relay := self.relays.choose()) is not None:
                self._ask(place, relay, frozenset(), now)
        if isinstance(state, Ready):
            self._proceed(place, state.session)
        self._note_busy(place)

    def _usable(self, service: ServiceName, connector: ConnectorId | None = None) -> list[Live]:
        """Return the sessions that new flows of a service may have, with that connector when one is named."""
        return [
            live
            for live in self._live.values()
            if (live.retired is None or (live.runs_out and connector is not None and not live.left))
            and live.session.service == service
            and connector in (None, live.session.opened.connector_id)
        ]

    def _proceed(self, place: Place, session: Session) -> None:
        live = self._live[session.key]
        waiting, place.waiting = place.waiting, {}
        for number in waiting:
            flow = self._flows[number]
            if flow.session != session.key:
                if flow.session is not None:
                    flow.former = (*flow.former, flow.session)
                flow.session = session.key
                live.uses += 1
            self._commands.append(Proceed(number, session))
        if waiting:
            self._unused.pop(session.key, None)

    def _ask(self, place: Place, relay: str, tried: frozenset[str], now: float) -> None:
        self._request += 1
        lease = self._services[place.service].lease
        place.state = Opening(self._request, relay, lease, now + OPEN_SECONDS, tried | {relay})
        self._note_busy(place)
        self._commands.append(Send(relay, Open(self._request, place.service, lease, place.connector)))

    def _retire(self, live: Live, reason: Reason) -> None:
        """Give the session to no new flow, and end it once none uses it."""
        live.retired = reason
        self._no_longer_current(live.session)
        if live.uses == 0:
            self._end(live, reason, tell=True)

    def _no_longer_current(self, session: Session) -> None:
        service = self._services.get(session.service)
        for place in service.places() if service is not None else ():
            if isinstance(place.state, Ready) and place.state.session is session:
                place.state = IDLE

    def _end(self, live: Live, reason: Reason, *, tell: bool, relay_lost: bool = False) -> None:
        session = live.session
        del self._live[session.key]
        self._unused.pop(session.key, None)
        self._no_longer_current(session)
        if tell:
            self._commands.append(Send(session.relay, Closed(session.opened.session, reason)))
        self._commands.append(Ended(session, reason, relay_lost))

    # --- time

    def _tick(self, now: float) -> None:
        for place in tuple(self._busy.values()):
            self._expire_flows(place, now)
            if isinstance(place.state, Resolving) and now >= place.state.until:
                self._deny(place, Reason.STALE_EPOCH, now)
            elif isinstance(place.state, Opening) and now >= place.state.until:
                self._ask_next(place, place.state.tried, Reason.POLICY_UNKNOWN, now)
            elif isinstance(place.state, BackingOff):
                self._advance(place, now)
            self._note_busy(place)
        for key, since in tuple(self._unused.items()):
            if now - since < SESSION_IDLE_SECONDS:
                break
            self._end(self._live[key], Reason.CLOSED_BY_PEER, tell=True)

    def _expire_flows(self, place: Place, now: float) -> None:
        for number in [number for number, deadline in place.waiting.items() if now >= deadline]:
            flow = self._flows[number]
            if flow.session in self._live:
                place.waiting[number] = now + flow.wait_s  # it is not cut off yet
                continue
            del place.waiting[number]
            self._fail(number, Reason.PEER_GONE, now)

    def _timers(self) -> Iterator[float]:
        for place in self._busy.values():
            if isinstance(place.state, Opening | Resolving | BackingOff):
                yield place.state.until
            if place.waiting:
                yield min(place.waiting.values())
        if self._unused:
            yield next(iter(self._unused.values())) + SESSION_IDLE_SECONDS

    def _note_busy(self, place: Place) -> None:
        key = (place.service, place.connector)
        if place.waiting or isinstance(place.state, Opening | Resolving):
            self._busy[key] = place
            return
        self._busy.pop(key, None)
        if place.connector is not None:
            self._services[place.service].pinned.pop(place.connector, None)

    def _view(self, service: Service) -> ServiceView:
        state = service.any.state
        return ServiceView(
            service=service.name,
            state=state.name,
            session=state.session if isinstance(state, Ready) else None,
            reason=state.reason if isinstance(state, BackingOff) else None,
            waiting=sum(len(place.waiting) for place in service.places()),
        )


def _is_asked_for(place: Place, message: Opened) -> bool:
    return place.service == message.service and place.connector in (None, message.connector_id)


def _is_steady(session: Session, now: float) -> bool:
    return now - session.since >= STEADY_SECONDS


def _backoff(failures: int) -> float:
    """Return how long after the n-th failure in a row no relay is asked again, in seconds."""
    return min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_SECONDS)
