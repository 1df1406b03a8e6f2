"""Decide which session carries each flow of each service: none -> opening -> open -> gone, and again.

    idle --flow waits--> opening --opened--> open --closed, retired--> idle
      ^                   |  |                 |
      |               denied stale_epoch   stale_epoch
      |                   |  +---> resolving <-+
      +--backoff over-- denied <---+ no newer lease

Pure: the caller carries out the commands, tells what happened, and wakes it at `next_timer()`. Knows neither
links nor sockets, and not whether a flow is TCP or UDP. Source: protocol.md, Control stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sidecar.agent.commands import (
    Cause,
    Command,
    Ended,
    Event,
    Fail,
    LeaseIs,
    Proceed,
    ReadLease,
    Received,
    RelayDown,
    RelayUp,
    Release,
    Retry,
    Send,
    ServiceView,
    Session,
    SessionKey,
    Tick,
    Want,
)
from sidecar.agent.state import (
    IDLE,
    BackingOff,
    Flow,
    Idle,
    Live,
    Opening,
    Ready,
    Resolving,
    Service,
    State,
)
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.wire.control import Closed, Denied, Drain, Health, Open, Opened

OPEN_SECONDS = 5.0
"""How long one relay may take to answer an `open`; it gives each connector 1 s."""
RESOLVE_SECONDS = 2.0
FLOW_WAIT_SECONDS = 5.0
WAITING_PER_SERVICE_MAX = 256
FLOW_ATTEMPTS_MAX = 2
SESSION_IDLE_SECONDS = 300.0
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 3.0
STEADY_SECONDS = 5.0
"""A session that lived this long was a good one: what ends it does not count as yet another failure, and a
connector that denies it by then has forgotten it (it was restarted) rather than never known it."""

HEALTHY_STATES = frozenset({"passing", "warning"})


class Sessions:
    """All sessions of one agent and the flows that wait for or use them."""

    def __init__(self, relays: Sequence[str], flows_max: int) -> None:
        """Take the relays' names, preferred first, and how many flows there may be at once."""
        self._relays: dict[str, str] = dict.fromkeys(relays, "down")
        self._flows_max = flows_max
        self._services: dict[ServiceName, Service] = {}
        self._flows: dict[int, Flow] = {}
        self._live: dict[SessionKey, Live] = {}
        self._unused: dict[SessionKey, float] = {}  # since when, longest first
        self._busy: dict[ServiceName, None] = {}  # those with a timer: opening, resolving or waited for
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
            case Received():
                self._received(event, now)
            case LeaseIs():
                self._lease_is(event, now)
            case RelayUp():
                self._relays[event.relay] = "up"
                self._advance_all(now)
            case RelayDown():
                self._relay_down(event.relay, now)
            case _:
                tick: Tick = event  # the type checker's proof that no event is left out
                del tick
                self._tick(now)
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

    @property
    def relays(self) -> Mapping[str, str]:
        """Each relay's state: up, draining or down."""
        return dict(self._relays)

    def views(self) -> tuple[ServiceView, ...]:
        """Return what there is to see, by service name."""
        return tuple(self._view(self._services[name]) for name in sorted(self._services))

    # --- flows

    def _want(self, event: Want, now: float) -> None:
        service = self._services.get(event.service)
        if service is None:
            self._fail(event.flow, Reason.NO_SUCH_SERVICE)
        elif len(self._flows) >= self._flows_max or len(service.waiting) >= WAITING_PER_SERVICE_MAX:
            self._fail(event.flow, Reason.LIMIT_REACHED)
        else:
            self._flows[event.flow] = Flow(event.service)
            self._queue(service, event.flow, now)

    def _queue(self, service: Service, number: int, now: float) -> None:
        service.waiting[number] = now + FLOW_WAIT_SECONDS
        self._advance(service, now)

    def _retry(self, event: Retry, now: float) -> None:
        flow = self._flows.get(event.flow)
        if flow is None or flow.session is None:
            return  # it failed meanwhile, and has been told
        live = self._live.get(flow.session)
        final = self._final(flow, live, event.cause, now)
        self._let_go(event.flow, now)
        if live is not None and live.retired is None and not (final and event.cause is Cause.DENIED):
            self._give_up(live, event.cause, now, resolve=not final)
        service = self._services.get(flow.service)
        if final or service is None:
            self._fail(event.flow, event.cause.reason)
            return
        flow.attempts += 1
        flow.resolved |= event.cause is Cause.STALE
        self._queue(service, event.flow, now)

    @staticmethod
    def _final(flow: Flow, live: Live | None, cause: Cause, now: float) -> bool:
        """Say whether the flow has had its tries.

        A denial by a connector that accepted the session just now is about the flow (a budget is used up), so
        another session would not help it, and the others keep this one.
        """
        if cause is Cause.STALE:
            return flow.resolved
        if cause is Cause.DENIED and live is not None and not _is_steady(live.session, now):
            return True
        return flow.attempts >= FLOW_ATTEMPTS_MAX

    def _give_up(self, live: Live, cause: Cause, now: float, *, resolve: bool) -> None:
        """Use the session for no new flow; those that run on it may go on as long as they can."""
        service = self._services[live.session.service]
        self._retire(service, live.session, cause.reason)
        if cause is Cause.STALE and resolve:
            self._resolve(service, now)
            return
        service.failures = 1 if _is_steady(live.session, now) else service.failures + 1
        if service.failures > 1:
            service.state = BackingOff(cause.reason, now + _backoff(service.failures - 1))

    def _release(self, number: int, now: float) -> None:
        flow = self._flows.get(number)
        if flow is None:
            return
        self._let_go(number, now)
        del self._flows[number]
        service = self._services.get(flow.service)
        if service is not None:
            service.waiting.pop(number, None)
            self._note_busy(service)

    def _let_go(self, number: int, now: float) -> None:
        """Take the flow off its session, and end the session if it was retired and this was its last."""
        flow = self._flows[number]
        key, flow.session = flow.session, None
        live = self._live.get(key) if key else None
        if live is None:
            return
        live.uses -= 1
        if live.uses == 0:
            self._unused[live.session.key] = now
            if live.retired is not None:
                self._end(live, live.retired, tell=True)

    def _fail(self, number: int, reason: Reason) -> None:
        self._flows.pop(number, None)
        self._commands.append(Fail(number, reason))

    def _fail_waiting(self, service: Service, reason: Reason) -> None:
        for number in service.waiting:
            self._fail(number, reason)
        service.waiting.clear()

    # --- relays

    def _received(self, event: Received, now: float) -> None:
        match event.message:
            case Opened():
                self._opened(event.relay, event.message, now)
            case Denied():
                self._denied(event.relay, event.message, now)
            case Closed():
                self._closed(event.relay, event.message, now)
            case Health():
                self._health(event.message, now)
            case Drain():
                self._relays[event.relay] = "draining"
            case _:
                return

    def _opened(self, relay: str, message: Opened, now: float) -> None:
        key = (relay, message.session)
        service = self._services.get(message.service)
        if key in self._live:
            self.unexpected += 1
            return
        if service is None or not _answers(service.state, relay, message.request):
            # Nobody waits for it any more (it came too late, or the lease has gone): give it back.
            self.unexpected += 1
            self._commands.append(Send(relay, Closed(message.session, Reason.CLOSED_BY_PEER)))
            return
        state = service.state
        assert isinstance(state, Opening)
        if state.lease != service.lease:
            self._commands.append(Send(relay, Closed(message.session, Reason.STALE_EPOCH)))
            service.state = IDLE
        else:
            session = Session(relay, state.lease, message, now)
            self._live[key] = Live(session)
            self._unused[key] = now
            service.state = Ready(session)
        self._advance(service, now)

    def _denied(self, relay: str, message: Denied, now: float) -> None:
        for service in map(self._services.__getitem__, self._busy):
            if _answers(service.state, relay, message.request):
                break
        else:
            self.unexpected += 1
            return
        if message.reason is Reason.STALE_EPOCH:
            self._stale(service, now)
        else:
            self._next_relay(service, message.reason, now)

    def _stale(self, service: Service, now: float) -> None:
        """Resolve again for the flows that did not yet; the others have had their try."""
        for number in tuple(service.waiting):
            flow = self._flows[number]
            if flow.resolved:
                del service.waiting[number]
                self._fail(number, Reason.STALE_EPOCH)
            flow.resolved = True
        if service.waiting:
            self._resolve(service, now)
        else:
            self._deny(service, Reason.STALE_EPOCH, now)

    def _resolve(self, service: Service, now: float) -> None:
        service.state = Resolving(now + RESOLVE_SECONDS)
        self._note_busy(service)
        self._commands.append(ReadLease(service.name))

    def _next_relay(self, service: Service, reason: Reason, now: float) -> None:
        """Ask a relay that was not asked yet; when all have said no, that is it for a while.

        A grant is in our certificate and the same everywhere, so `no_grant` is final.
        """
        state = service.state
        assert isinstance(state, Opening)
        relay = None if reason is Reason.NO_GRANT else self._relay(state.tried)
        if relay is None:
            self._deny(service, reason, now)
        else:
            self._ask(service, relay, state.tried, now)

    def _deny(self, service: Service, reason: Reason, now: float) -> None:
        service.failures += 1
        service.state = BackingOff(reason, now + _backoff(service.failures))
        self._fail_waiting(service, reason)
        self._note_busy(service)

    def _closed(self, relay: str, message: Closed, now: float) -> None:
        live = self._live.get((relay, message.session))
        if live is None:
            self.unexpected += 1
            return
        service = self._services.get(live.session.service)
        current = live.retired is None
        self._end(live, message.reason, tell=False)
        if service is None or not current:
            return
        if _is_steady(live.session, now):
            service.failures = 0
        if message.reason is Reason.STALE_EPOCH:
            self._resolve(service, now)

    def _health(self, message: Health, now: float) -> None:
        service = self._services.get(message.service)
        if service and isinstance(service.state, BackingOff) and message.state in HEALTHY_STATES:
            service.state, service.failures = IDLE, 0
            self._advance(service, now)

    def _relay_down(self, relay: str, now: float) -> None:
        self._relays[relay] = "down"
        for live in [live for key, live in self._live.items() if key[0] == relay]:
            self._end(live, Reason.PEER_GONE, tell=False)
        for service in self._services.values():
            if isinstance(service.state, Opening) and service.state.relay == relay:
                service.state = IDLE
        self._advance_all(now)

    def _relay(self, tried: frozenset[str]) -> str | None:
        """Choose a relay: the first that is up, else one that drains (it still serves until it goes)."""
        for wanted in ("up", "draining"):
            for relay, state in self._relays.items():
                if state == wanted and relay not in tried:
                    return relay
        return None

    # --- leases

    def _lease_is(self, event: LeaseIs, now: float) -> None:
        service = self._services.get(event.service)
        if event.lease is None:
            if service is not None:
                self._vanish(service)
        elif service is None:
            self._services[event.service] = Service(event.service, event.lease)
        else:
            if service.lease != event.lease and isinstance(service.state, Ready):
                self._retire(service, service.state.session, Reason.STALE_EPOCH)
            service.lease = event.lease
            if isinstance(service.state, Resolving):
                service.state = IDLE
            self._advance(service, now)

    def _vanish(self, service: Service) -> None:
        if isinstance(service.state, Ready):
            self._retire(service, service.state.session, Reason.CLOSED_BY_PEER)
        self._fail_waiting(service, Reason.NO_SUCH_SERVICE)
        del self._services[service.name]
        self._busy.pop(service.name, None)

    # --- going on

    def _advance_all(self, now: float) -> None:
        for name in tuple(self._busy):
            self._advance(self._services[name], now)

    def _advance(self, service: Service, now: float) -> None:
        """Do what can be done for the flows that wait: proceed, fail or ask a relay."""
        state = service.state
        if isinstance(state, BackingOff) and now >= state.until:
            state = service.state = IDLE
        if isinstance(state, Ready):
            self._proceed(service, state.session)
        elif isinstance(state, BackingOff):
            self._fail_waiting(service, state.reason)
        elif isinstance(state, Idle) and service.waiting:
            relay = self._relay(frozenset())
            if relay is not None:
                self._ask(service, relay, frozenset(), now)
        self._note_busy(service)

    def _proceed(self, service: Service, session: Session) -> None:
        live = self._live[session.key]
        for number in service.waiting:
            self._flows[number].session = session.key
            live.uses += 1
            self._commands.append(Proceed(number, session))
        if service.waiting:
            self._unused.pop(session.key, None)
        service.waiting.clear()

    def _ask(self, service: Service, relay: str, tried: frozenset[str], now: float) -> None:
        self._request += 1
        lease = service.lease
        service.state = Opening(self._request, relay, lease, now + OPEN_SECONDS, tried | {relay})
        self._note_busy(service)
        self._commands.append(Send(relay, Open(self._request, service.name, lease)))

    def _retire(self, service: Service, session: Session, reason: Reason) -> None:
        """Give the service's session to no new flow, and end it once none uses it."""
        live = self._live[session.key]
        live.retired = reason
        service.state = IDLE
        if live.uses == 0:
            self._end(live, reason, tell=True)

    def _end(self, live: Live, reason: Reason, *, tell: bool) -> None:
        session = live.session
        del self._live[session.key]
        self._unused.pop(session.key, None)
        if live.retired is None:  # then, and only then, it is its service's current one
            self._services[session.service].state = IDLE
        if tell:
            self._commands.append(Send(session.relay, Closed(session.opened.session, reason)))
        self._commands.append(Ended(session, reason))

    # --- time

    def _tick(self, now: float) -> None:
        for name in tuple(self._busy):
            service = self._services[name]
            self._expire_flows(service, now)
            if isinstance(service.state, Resolving) and now >= service.state.until:
                self._deny(service, Reason.STALE_EPOCH, now)
            elif isinstance(service.state, Opening) and now >= service.state.until:
                self._next_relay(service, Reason.POLICY_UNKNOWN, now)
            self._note_busy(service)
        for key, since in tuple(self._unused.items()):
            if now - since < SESSION_IDLE_SECONDS:
                break
            self._end(self._live[key], Reason.CLOSED_BY_PEER, tell=True)

    def _expire_flows(self, service: Service, now: float) -> None:
        late = [number for number, deadline in service.waiting.items() if now >= deadline]
        for number in late:
            del service.waiting[number]
            self._fail(number, Reason.PEER_GONE)

    def _timers(self) -> Iterator[float]:
        for name in self._busy:
            service = self._services[name]
            if isinstance(service.state, Opening | Resolving):
                yield service.state.until
            if service.waiting:
                yield next(iter(service.waiting.values()))
        if self._unused:
            yield next(iter(self._unused.values())) + SESSION_IDLE_SECONDS

    def _note_busy(self, service: Service) -> None:
        if service.waiting or isinstance(service.state, Opening | Resolving):
            self._busy[service.name] = None
        else:
            self._busy.pop(service.name, None)

    def _view(self, service: Service) -> ServiceView:
        state = service.state
        return ServiceView(
            service=service.name,
            state=state.name,
            session=state.session if isinstance(state, Ready) else None,
            reason=state.reason if isinstance(state, BackingOff) else None,
            waiting=len(service.waiting),
        )


def _answers(state: State, relay: str, request: int) -> bool:
    """Say whether this relay's answer to this request is what the service waits for."""
    return isinstance(state, Opening) and state.relay == relay and state.request == request


def _is_steady(session: Session, now: float) -> bool:
    return now - session.since >= STEADY_SECONDS


def _backoff(failures: int) -> float:
    """Return how long after the n-th failure in a row no relay is asked again, in seconds."""
    return min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_SECONDS)
