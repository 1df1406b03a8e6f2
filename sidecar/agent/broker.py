"""Carry out what sidecar.agent.sessions decides: messages to relays, answers to flows, one timer.

Decides nothing itself and knows neither sockets nor links.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.agent.commands import (
    Cause,
    Command,
    Ended,
    Event,
    Fail,
    Leave,
    Move,
    Proceed,
    ReadLease,
    Release,
    Retry,
    RunOut,
    Send,
    Session,
    SessionKey,
    Settle,
    Tick,
    Want,
)
from sidecar.agent.sessions import Sessions
from ztna.errors import Refused
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.telemetry import logger, refused
from ztna.wire.control import Closed, Open

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Outside:
    """Whom the broker acts on: a relay's control connection, Consul, and what rides a session."""

    send: Callable[[str, Open | Closed], object]
    read_lease: Callable[[ServiceName], None]
    ended: Callable[[Ended], None]
    leave: Callable[[Session], None]
    run_out: Callable[[Session], None]


@dataclass(frozen=True, slots=True)
class _Waiter:
    ready: Callable[[Session], None]
    failed: Callable[[Reason], None]


class Broker:
    """Gives flows their sessions. Callbacks come in the order of the decisions, never nested."""

    def __init__(self, sessions: Sessions, outside: Outside) -> None:
        self.sessions = sessions
        self._outside = outside
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._waiters: dict[int, _Waiter] = {}
        self._commands: deque[Command] = deque()
        self._is_acting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def number(self) -> int:
        """Return a fresh flow number."""
        return next(self._numbers)

    def want(
        self,
        flow: int,
        service: ServiceName,
        ready: Callable[[Session], None],
        failed: Callable[[Reason], None],
    ) -> None:
        """Ask for a session; `ready` or `failed` is called, maybe before this returns, and again after retries.

        After `failed` the flow is forgotten; after `ready` it must be released.
        """
        self._waiters[flow] = _Waiter(ready, failed)
        self.handle(Want(flow, service))

    def retry(self, flow: int, cause: Cause) -> None:
        """Give the flow's session back for `cause` and ask for another."""
        self.handle(Retry(flow, cause))

    def move(self, flow: int, connector: ConnectorId, wait_s: float) -> None:
        """Ask for a session with the connector that has the flow already: by another relay, if need be (Move).

        The flow's `ready` or `failed` is called as by `want`; what it has stays its own until it settles.
        """
        self.handle(Move(flow, connector, wait_s))

    def settle(self, flow: int) -> None:
        """Give back what the flow moved away from."""
        self.handle(Settle(flow))

    def release(self, flow: int) -> None:
        """End a flow; again, or after it failed, is harmless."""
        if self._waiters.pop(flow, None) is not None:
            self.handle(Release(flow))

    async def acquire(self, flow: int, service: ServiceName) -> Session:
        """Wait for a flow's session. Raises Refused, after which the flow is forgotten."""
        return await self._answer(flow, Want(flow, service))

    async def reacquire(self, flow: int, cause: Cause) -> Session:
        """Wait for another session in place of the flow's. Raises Refused as `acquire`."""
        return await self._answer(flow, Retry(flow, cause))

    async def relocate(
        self, flow: int, connector: ConnectorId, wait_s: float, doubted: SessionKey | None = None
    ) -> Session:
        """Wait for a live session with the connector that has the flow already, as `move`. Raises Refused as `acquire`.

        Its relay and its forwarder are where to dial then. It may be the session that the flow has. Call `settle`
        once the flow is there: what it had before is kept until then. `doubted` as in Move.
        """
        return await self._answer(flow, Move(flow, connector, wait_s, doubted))

    def handle(self, event: Event) -> None:
        """Tell the state machine what happened, and do what it decides."""
        self._commands.extend(self.sessions.handle(event, self._loop.time()))
        if self._is_acting:
            return  # the caller of the one who acts: it sees the new commands when it comes to them
        self._is_acting = True
        try:
            while self._commands:
                self._act(self._commands.popleft())
        finally:
            self._is_acting = False
        self._set_timer()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    async def _answer(self, flow: int, event: Event) -> Session:
        answer: asyncio.Future[Session] = self._loop.create_future()

        def ready(session: Session) -> None:
            if not answer.done():
                answer.set_result(session)

        def failed(reason: Reason) -> None:
            if not answer.done():
                answer.set_exception(Refused(reason))

        self._waiters[flow] = _Waiter(ready, failed)
        self.handle(event)
        return await answer

    def _act(self, command: Command) -> None:
        match command:
            case Proceed():
                waiter = self._waiters.get(command.flow)
                if waiter is not None:
                    waiter.ready(command.session)
            case Fail():
                refused("agent", command.reason)
                waiter = self._waiters.pop(command.flow, None)
                if waiter is not None:
                    waiter.failed(command.reason)
            case Send():
                self._outside.send(command.relay, command.message)
            case ReadLease():
                self._outside.read_lease(command.service)
            case Ended():
                _log_ended(command)
                self._outside.ended(command)
            case Leave():
                self._outside.leave(command.session)
            case RunOut():
                self._outside.run_out(command.session)

    def _set_timer(self) -> None:
        """Wake at the machine's next time. A timer that is set too early only looks again."""
        wanted = self.sessions.next_timer()
        if wanted is None or (self._timer is not None and self._timer_at <= wanted):
            return
        self.close()
        self._timer_at = wanted
        self._timer = self._loop.call_at(wanted, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.handle(Tick())


def _log_ended(ended: Ended) -> None:
    session = ended.session
    _log.info(
        "session_ended",
        session=session.opened.session,
        service=session.service,
        connector=session.opened.connector_id,
        relay=session.relay,
        reason=ended.reason,
    )
