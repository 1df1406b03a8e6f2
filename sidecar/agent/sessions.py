"""Decide which session carries each flow of each service, and by which relay.

    idle --flow waits--> opening --opened--> open --closed, retired--> idle
      ^                   |  |                 |
      |               denied stale_epoch   stale_epoch
      |                   |  +---> resolving <-+
      +--backoff over-- denied <---+ no newer lease

A place of a service is in one of these states: the one for new flows, who may go to any connector, and one for each
connector to whom running flows must get back (Move). A session is retired when new flows shall not have it, left when
its relay drains or is silent. Pure: the caller carries out the commands, tells what happened, and wakes it at
`next_timer()`. How a place gets its session is in sidecar.agent.asking, what it is about in sidecar.agent.holdings.
Knows neither links nor sockets, nor whether a flow is TCP or UDP. Source: protocol.md, Control stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sidecar.agent.asking import Asking, backoff
from sidecar.agent.commands import (
    Cause,
    Command,
    Event,
    LeaseIs,
    Leave,
    Move,
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
    ServiceView,
    Session,
    SessionKey,
    Settle,
    Tick,
    Want,
)
from sidecar.agent.holdings import Holdings
from sidecar.agent.relays import Relays, RelayState
from sidecar.agent.state import (
    IDLE,
    BackingOff,
    Flow,
    Live,
    Opening,
    Place,
    Ready,
    Resolving,
    Service,
)
from ztna.reasons import Reason
from ztna.wire.control import Closed, Denied, Drain, Health, Opened, Retired

FLOW_WAIT_SECONDS = 5.0
WAITING_PER_SERVICE_MAX = 256
FLOW_ATTEMPTS_MAX = 2
FLOW_ATTEMPTS_ENDED_MAX = 4
SESSION_IDLE_SECONDS = 300.0
STEADY_SECONDS = 5.0
"""A session that lived this long was a good one: what ends it does not count as yet another failure, and a
connector that denies it by then has forgotten it (it was restarted) rather than never known it."""

HEALTHY_STATES = frozenset({"passing", "warning"})


class Sessions:
    """All sessions of one agent and the flows that wait for or use them."""

    def __init__(self, relays: Iterable[str], flows_max: int) -> None:
        """Take the relays' names, preferred first, and how many flows there may be at once."""
        self.relays = Relays(relays)
        self._flows_max = flows_max
        self._held = Holdings(self.relays)
        self._asking = Asking(self._held)

    @property
    def unexpected(self) -> int:
        """How many messages were about requests and sessions that are not (or no longer) ours."""
        return self._held.unexpected

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
                self._held.settle(event.flow, now)
            case Received():
                self._received(event, now)
            case LeaseIs():
                self._lease_is(event, now)
            case Tick():
                self._tick(now)
            case _:
                self._relay_event(event, now)
        commands, self._held.commands = self._held.commands, []
        return commands

    def next_timer(self) -> float | None:
        """Return when to `handle(Tick())` next, if ever."""
        times = list(self._timers())
        return min(times) if times else None

    def session(self, key: SessionKey) -> Session | None:
        """Return a live session."""
        live = self._held.live.get(key)
        return live.session if live else None

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All live sessions, retired ones that still carry flows too."""
        return tuple(live.session for live in self._held.live.values())

    def is_used(self, relay: str) -> bool:
        """Say whether any flow depends on a relay now."""
        return any(key[0] == relay and live.uses for key, live in self._held.live.items())

    def views(self) -> tuple[ServiceView, ...]:
        """Return what there is to see, by service name."""
        return tuple(self._view(self._held.services[name]) for name in sorted(self._held.services))

    # --- flows

    def _want(self, event: Want, now: float) -> None:
        service = self._held.services.get(event.service)
        if service is None:
            self._held.fail(event.flow, Reason.NO_SUCH_SERVICE, now)
        elif len(self._held.flows) >= self._flows_max or len(service.any.waiting) >= WAITING_PER_SERVICE_MAX:
            self._held.fail(event.flow, Reason.LIMIT_REACHED, now)
        else:
            self._held.flows[event.flow] = Flow(event.service)
            self._queue(service.any, event.flow, FLOW_WAIT_SECONDS, now)

    def _queue(self, place: Place, number: int, wait_s: float, now: float) -> None:
        self._held.flows[number].wait_s = wait_s
        place.waiting[number] = now + wait_s
        self._asking.advance(place, now)

    def _retry(self, event: Retry, now: float) -> None:
        flow = self._held.flows.get(event.flow)
        if flow is None:
            # It failed meanwhile, and whoever asks has not heard of it: his patience was over in the same turn.
            self._held.fail(event.flow, event.cause.reason, now)
            return
        if flow.session is None:
            return  # it waits already
        live = self._held.live.get(flow.session)
        final = self._final(flow, live, event.cause, now)
        self._held.let_go(event.flow, now)
        if live is not None and live.retired is None and not (final and event.cause is Cause.DENIED):
            self._give_up(live, event.cause, now, resolve=not final)
        service = self._held.services.get(flow.service)
        if final or service is None:
            self._held.fail(event.flow, event.cause.reason, now)
            return
        flow.attempts += 1
        flow.resolved |= event.cause is Cause.STALE
        self._held.unqueue(service, event.flow)
        self._queue(service.any, event.flow, FLOW_WAIT_SECONDS, now)

    @staticmethod
    def _final(flow: Flow, live: Live | None, cause: Cause, now: float) -> bool:
        """Say whether the flow has had its tries.

        A denial by a connector that accepted the session just now is about the flow (a budget is used up), so
        another session would not help it, and the others keep this one. A session that ended under it (a certificate
        was renewed at either end, and perhaps at both) says nothing about the flow, nor does one that is retired by
        now (its connector leaves).
        """
        if cause is Cause.STALE:
            return flow.resolved
        current = live if live is not None and live.retired is None else None
        if cause is Cause.DENIED and current is not None and not _is_steady(current.session, now):
            return True
        return flow.attempts >= (FLOW_ATTEMPTS_MAX if live is not None else FLOW_ATTEMPTS_ENDED_MAX)

    def _give_up(self, live: Live, cause: Cause, now: float, *, resolve: bool) -> None:
        """Use the session for no new flow; those that run on it may go on as long as they can."""
        place = self._held.services[live.session.service].any
        self._held.retire(live, cause.reason)
        if cause is Cause.STALE and resolve:
            self._asking.resolve(place, now)
            return
        place.failures = 1 if _is_steady(live.session, now) else place.failures + 1
        if place.failures > 1:
            place.state = BackingOff(cause.reason, now + backoff(place.failures - 1))

    def _move(self, event: Move, now: float) -> None:
        flow = self._held.flows.get(event.flow)
        service = self._held.services.get(flow.service) if flow is not None else None
        if flow is None or service is None:
            self._held.fail(event.flow, Reason.NO_SUCH_SERVICE, now)
            return
        if event.doubted is not None:
            flow.may_begin_anew = True
            doubted = self._held.live.get(event.doubted)
            if doubted is not None and doubted.retired is None:
                self._held.retire(doubted, Reason.PEER_GONE)
        self._held.unqueue(service, event.flow)
        place = service.pinned.setdefault(event.connector, Place(flow.service, event.connector))
        self._queue(place, event.flow, event.wait_s, now)

    def _release(self, number: int, now: float) -> None:
        flow = self._held.flows.get(number)
        if flow is None:
            return
        self._held.let_go(number, now)
        del self._held.flows[number]
        service = self._held.services.get(flow.service)
        if service is not None:
            self._held.unqueue(service, number)

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
        self._asking.advance_all(now)

    def _relay_down(self, relay: str, reason: Reason) -> None:
        self.relays.set(relay, RelayState.DOWN)
        is_lost = reason is Reason.PEER_GONE
        for live in [live for key, live in self._held.live.items() if key[0] == relay]:
            self._held.end(live, reason, tell=False, relay_lost=is_lost)
        for place in self._held.busy.values():
            if isinstance(place.state, Opening) and place.state.relay == relay:
                place.state = IDLE

    def _leave(self, now: float) -> None:
        """Have everything leave the relays that go or may have gone, once another one is up."""
        if RelayState.UP not in self.relays.states.values():
            return
        for key, live in tuple(self._held.live.items()):
            state = self.relays.state(key[0])
            if state is RelayState.UP or live.left:
                continue
            live.left = True
            self._held.commands.append(Leave(live.session))
            if live.retired is None:
                self._held.retire(live, Reason.DRAINING if state is RelayState.DRAINING else Reason.PEER_GONE)
        for place in tuple(self._held.busy.values()):
            opening = place.state
            if isinstance(opening, Opening) and self.relays.state(opening.relay) is not RelayState.UP:
                # What it answers nevertheless is given back.
                self._asking.ask_next(place, opening.tried, Reason.POLICY_UNKNOWN, now)

    def _go_over_to_preferred(self) -> None:
        """Give new flows sessions by the relay that is nearer by now; those that run stay where they are."""
        for live in tuple(self._held.live.values()):
            if live.retired is None and live.session.relay != self.relays.preferred:
                self._held.retire(live, Reason.CLOSED_BY_PEER)

    def _received(self, event: Received, now: float) -> None:
        match event.message:
            case Opened():
                self._asking.opened(event.relay, event.message, now)
            case Denied():
                self._asking.denied(event.relay, event.message, now)
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

    def _closed(self, relay: str, message: Closed, now: float) -> None:
        live = self._held.live.get((relay, message.session))
        if live is None:
            self._held.unexpected += 1
            return
        service = self._held.services.get(live.session.service)
        if message.reason is Reason.PEER_GONE:
            self._asking.note_gone(live.session.opened.connector_id)
        current = live.retired is None
        self._held.end(live, message.reason, tell=False)
        if service is None or not current:
            return
        if _is_steady(live.session, now):
            service.any.failures = 0
        if message.reason is Reason.STALE_EPOCH:
            self._asking.resolve(service.any, now)

    def _run_out(self, relay: str, message: Retired) -> None:
        live = self._held.live.get((relay, message.session))
        if live is None:
            self._held.unexpected += 1
            return
        live.runs_out = True
        if live.retired is None:
            self._held.retire(live, Reason.DRAINING)
        if live.session.key in self._held.live:
            self._held.commands.append(RunOut(live.session))

    def _health(self, message: Health, now: float) -> None:
        service = self._held.services.get(message.service)
        if service is None or message.state not in HEALTHY_STATES:
            return
        for place in service.places():
            if isinstance(place.state, BackingOff):
                place.state, place.failures = IDLE, 0
                self._asking.advance(place, now)

    # --- leases

    def _lease_is(self, event: LeaseIs, now: float) -> None:
        service = self._held.services.get(event.service)
        if event.lease is None:
            if service is not None:
                self._vanish(service, now)
        elif service is None:
            self._held.services[event.service] = Service(event.service, event.lease, Place(event.service))
        else:
            service.lease = event.lease
            for live in self._held.usable(event.service):
                if live.session.lease != event.lease:
                    self._held.retire(live, Reason.STALE_EPOCH)
            for place in service.places():
                if isinstance(place.state, Resolving):
                    place.state = IDLE
                self._asking.advance(place, now)

    def _vanish(self, service: Service, now: float) -> None:
        for live in self._held.usable(service.name):
            self._held.retire(live, Reason.CLOSED_BY_PEER)
        for place in service.places():
            self._held.fail_waiting(place, Reason.NO_SUCH_SERVICE, now)
            self._held.busy.pop((service.name, place.connector), None)
        del self._held.services[service.name]

    # --- time

    def _tick(self, now: float) -> None:
        self._asking.tick(now)
        for key, since in tuple(self._held.unused.items()):
            if now - since < SESSION_IDLE_SECONDS:
                break
            self._held.end(self._held.live[key], Reason.CLOSED_BY_PEER, tell=True)

    def _timers(self) -> Iterator[float]:
        yield from self._asking.timers()
        if self._held.unused:
            yield next(iter(self._held.unused.values())) + SESSION_IDLE_SECONDS

    def _view(self, service: Service) -> ServiceView:
        state = service.any.state
        return ServiceView(
            service=service.name,
            state=state.name,
            session=state.session if isinstance(state, Ready) else None,
            reason=state.reason if isinstance(state, BackingOff) else None,
            waiting=sum(len(place.waiting) for place in service.places()),
        )


def _is_steady(session: Session, now: float) -> bool:
    return now - session.since >= STEADY_SECONDS
