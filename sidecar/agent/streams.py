"""TCP flows of local programs: a session, then a carrier (idle, direct, forwarded), then the flow on it.

Moving the bytes is sidecar.link's, choosing the session sidecar.agent.sessions'.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator

from sidecar.agent.broker import Broker
from sidecar.agent.carriers import Carriers
from sidecar.agent.commands import Cause, Session, SessionKey
from sidecar.agent.listeners import VirtualPort
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.stream import Carrier, FlowRefused, OpenLost
from ztna.errors import IdentityError, LinkError, Refused
from ztna.reasons import Reason
from ztna.telemetry import FLOW_OPEN_SECONDS, FLOWS_FAILED, TCP_FLOWS, dropped, logger
from ztna.udp import SockAddr
from ztna.wire.control import Address
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, OpenStatus

IDLE_VERDICT_SECONDS = 1.0
"""An idle carrier whose path died unseen does not acknowledge OPEN by then: a fresh one is asked what became of it."""
FLOW_KEY_BYTES = 16
RESUME_SECONDS = 30.0
"""How long a detached flow lives at both ends (protocol.md, Resuming)."""
RESUME_RETRY_FIRST_SECONDS = 0.05
RESUME_RETRY_MAX_SECONDS = 1.0
DENIED_SECONDS = 0.2
"""So long a flow that was denied waits for word of its session: a connector that leaves refuses what crosses that
on its way, and the relay's word of it takes longer than the refusal."""

_CAUSES = {OpenStatus.STALE_EPOCH: Cause.STALE, OpenStatus.DENIED: Cause.DENIED}
_log = logger(__name__)


class Streams:
    """All TCP flows of an agent."""

    def __init__(
        self,
        broker: Broker,
        carriers: Carriers,
        *,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._broker = broker
        self._carriers = carriers
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._running: dict[SessionKey, set[Ride]] = {}
        self._dialling: dict[SessionKey, set[asyncio.Timeout]] = {}
        """The patience of the dials for flows that have yet to be opened."""
        self.quiet = asyncio.Event()
        """Set while no flow runs."""
        self.quiet.set()

    def accepted(self, at: VirtualPort, local: socket.socket, source: SockAddr) -> None:
        """Take over a connection that a local program made to a virtual address."""
        self._tasks.create_task(self._serve(at, local, source), name=f"tcp flow to {at}")

    def leave(self, is_left: Callable[[VirtualPort], bool]) -> None:
        """Reset the flows at addresses that are no longer this agent's."""
        for ride in self._rides():
            if is_left(ride.at):
                ride.flow.reset(Reason.CLOSED_BY_PEER)

    def session_left(self, session: Session) -> None:
        """Move the flows of a session whose relay drains or is silent."""
        self.session_retired(session)
        for ride in tuple(self._running.get(session.key, ())):
            ride.move()

    def session_retired(self, session: Session) -> None:
        """End the dials for new flows, which another session serves: whom they go to may be gone by now."""
        for patience in tuple(self._dialling.get(session.key, ())):
            if not patience.expired():
                patience.reschedule(self._loop.time())

    def session_ended(self, session: Session, reason: Reason) -> None:
        """End what rides a session: waiting dials, its own idle carriers, and its flows unless they may go on.

        When a connection just went they need another session within the time that they live detached.
        """
        self.session_retired(session)
        self._carriers.session_ended(session, reason)
        for ride in tuple(self._running.get(session.key, ())):
            if reason is Reason.PEER_GONE:
                self._session_lost(ride)
            elif reason is not Reason.STALE_EPOCH:  # then established ones may finish
                ride.flow.reset(reason)

    def _session_lost(self, ride: Ride) -> None:
        if ride.carrier is not None and ride.carrier.forwarded:
            ride.carrier.close(Reason.PEER_GONE)
        else:
            ride.move()

    def _rides(self) -> list[Ride]:
        return [ride for riding in self._running.values() for ride in riding]

    @property
    def flows(self) -> int:
        """How many flows run."""
        return sum(map(len, self._running.values()))

    def status(self) -> dict[str, object]:
        """Return what `/status` shows of flows and carriers."""
        return {"flows": self.flows, "running": self._traffic()} | self._carriers.status()

    def _traffic(self) -> dict[str, dict[str, int]]:
        """Return by service how many flows run, and the bytes that each way has taken of them so far."""
        found: dict[str, dict[str, int]] = {}
        for ride in self._rides():
            own = found.setdefault(ride.at.service, {"flows": 0, "sent_bytes": 0, "received_bytes": 0})
            own["flows"] += 1
            own["sent_bytes"] += ride.flow.state.sent_position
            own["received_bytes"] += ride.flow.state.received_position
        return found

    # --- a flow

    async def _serve(self, at: VirtualPort, local: socket.socket, source: SockAddr) -> None:
        number, began = self._broker.number(), self._loop.time()
        try:
            ride = await self._open(number, at, local, source)
        except (Refused, LinkError, FlowRefused) as error:
            FLOWS_FAILED.inc()
            _log.debug("flow_refused", service=at.service, source=f"{source[0]}:{source[1]}", detail=error)
            abort(local)
        except BaseException:
            abort(local)
            raise
        else:
            FLOW_OPEN_SECONDS.observe(self._loop.time() - began, {"session": ride.session.opened.session})
            await self._until_finished(ride)
        finally:
            self._broker.release(number)

    async def _open(self, number: int, at: VirtualPort, local: socket.socket, source: SockAddr) -> Ride:
        """Open the flow, on another session where that can help. Raises Refused, LinkError or FlowRefused.

        What became of an OPEN that got no answer its RESUME tells; only when it was never heard of is there another.
        """
        session = await self._broker.acquire(number, at.service)
        while True:
            frame = OpenFrame(
                session=session.opened.session,
                flow=secrets.token_hex(FLOW_KEY_BYTES),
                service=at.service,
                lease=session.lease,
                source=Address(*source),
                destination=Address(*at.leased),
                window=WINDOW_BYTES_MIN,
            )
            try:
                carrier, flow = await self._open_on(session, frame, local)
            except OpenLost as lost:
                _log.info("open_lost", service=at.service, flow=frame.flow, detail=lost)
                ride = Ride(number, at, lost.flow, session, None)
                if await self._find_out(ride):
                    return ride
                session = ride.session
            except FlowRefused as error:
                session = await self._after_refusal(number, error)
            except (LinkError, IdentityError) as error:
                session = await self._after_failure(number, session, error)
            else:
                return Ride(number, at, flow, session, carrier)

    async def _open_on(
        self, session: Session, frame: OpenFrame, local: socket.socket
    ) -> tuple[Carrier, TcpFlow]:
        """Open a flow on an idle carrier, or a fresh one when there is none."""
        carrier = self._carriers.take_idle(session)
        if carrier is None:
            carrier = await self._dial(session)
            return carrier, await self._open_flow(carrier, frame, local)
        verdict = self._loop.call_later(IDLE_VERDICT_SECONDS, carrier.close_if_unheard)
        try:
            return carrier, await self._open_flow(carrier, frame, local)
        finally:
            verdict.cancel()

    async def _dial(self, session: Session) -> Carrier:
        """Dial for a new flow. Raises LinkError or IdentityError, at once when the session is retired or ends."""
        dialling = self._dialling.setdefault(session.key, set())
        patience = asyncio.timeout(None)
        try:
            async with patience:
                dialling.add(patience)
                return await self._carriers.dial(session)
        except TimeoutError:
            raise LinkError("the session is to be used no more") from None
        finally:
            dialling.discard(patience)
            if not dialling:
                self._dialling.pop(session.key, None)

    async def _open_flow(self, carrier: Carrier, frame: OpenFrame, local: socket.socket) -> TcpFlow:
        try:
            return await carrier.open(frame, local)
        except asyncio.CancelledError:
            # The flow may have begun in this very turn; then the socket is its own until the carrier goes.
            carrier.close(Reason.DRAINING)
            raise

    async def _find_out(self, ride: Ride) -> bool:
        """Resume a flow whose OPEN was not answered; False when another OPEN may follow, on the ride's session.

        Only a connector that knows nothing of the flow permits that, or one of which a relay says that it has gone
        without a word: the backend is dialled once as long as whoever dials it lives. Raises Refused or LinkError.
        """
        try:
            await self._resume(ride, RESUME_SECONDS, doubted=ride.session.key)
        except FlowRefused as error:
            ride.flow.abandon()
            if error.status is not OpenStatus.UNKNOWN_FLOW:
                ride.session = await self._after_refusal(ride.number, error)
            return False
        except Refused as error:
            ride.flow.abandon()
            if error.reason is not Reason.NO_HEALTHY_CONNECTOR:
                raise
            connector = ride.session.opened.connector_id
            _log.info("connector_failed", service=ride.at.service, connector=connector, detail=error)
            ride.session = await self._broker.acquire(ride.number, ride.at.service)
            return False
        except BaseException:
            ride.flow.abandon()
            raise
        return True

    async def _after_refusal(self, number: int, error: FlowRefused) -> Session:
        cause = _CAUSES.get(error.status)
        if cause is None:
            dropped("agent_tcp", error.status.name.lower())
            raise error
        if cause is Cause.DENIED:
            await asyncio.sleep(DENIED_SECONDS)
        return await self._broker.reacquire(number, cause)

    async def _after_failure(
        self, number: int, session: Session, error: LinkError | IdentityError
    ) -> Session:
        connector = session.opened.connector_id
        _log.info("connector_failed", service=session.service, connector=connector, detail=error)
        return await self._broker.reacquire(number, Cause.FAILED)

    # --- a flow that runs

    async def _until_finished(self, ride: Ride) -> None:
        """See that the flow is carried, by one carrier after the other, until it ends."""
        self._seat(ride)
        self.quiet.clear()
        ride.flow.finished.add_done_callback(ride.wake)
        try:
            while not await self._is_over(ride):
                if ride.flow.owes_reset:
                    await self._tell_reset(ride)
                elif ride.carrier is None or ride.carrier.closed.done():
                    await self._go_on(ride)
                elif ride.must_move:
                    await self._move(ride)
                else:
                    await ride.something()
        finally:
            self._unseat(ride)
            if not self._running:
                self.quiet.set()
            carrier = ride.alight()
            ride.flow.reset(Reason.DRAINING)  # unless it has ended by itself
        if carrier is not None and ride.flow.finished.result():
            if carrier.forwarded and self._broker.sessions.session(ride.session.key) is None:
                carrier.close()
            else:
                self._carriers.keep(carrier, ride.session)

    async def _is_over(self, ride: Ride) -> bool:
        """Say whether the flow has ended and the connector knows: a RESET may die with its carrier."""
        flow = ride.flow
        if flow.finished.done() and flow.sent_reset and ride.carrier is not None:
            flow.sent_reset = False
            flow.owes_reset = not await ride.carrier.farewell
        return flow.finished.done() and not flow.owes_reset

    async def _go_on(self, ride: Ride) -> None:
        """Resume the flow within RESUME_SECONDS, or reset it."""
        _log.info("flow_detached", service=ride.at.service, flow=ride.flow.opened.flow)
        TCP_FLOWS.labels("detached").inc()
        ride.alight()
        try:
            await self._resume(ride, RESUME_SECONDS)
        except (Refused, FlowRefused, LinkError, IdentityError) as error:
            if not ride.flow.finished.done():
                TCP_FLOWS.labels("forsaken").inc()
                _log.warning("flow_lost", service=ride.at.service, flow=ride.flow.opened.flow, detail=error)
                ride.flow.reset(error.reason if isinstance(error, Refused) else Reason.PEER_GONE)
        else:
            TCP_FLOWS.labels("resumed").inc()

    async def _tell_reset(self, ride: Ride) -> None:
        """Resume a flow that its program has reset, only to say so; until the connector is known to have heard it."""
        ride.alight()
        pause = RESUME_RETRY_FIRST_SECONDS
        try:
            async with asyncio.timeout(RESUME_SECONDS):
                while not await self._try_to_tell_reset(ride):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, RESUME_RETRY_MAX_SECONDS)
        except (TimeoutError, Refused, FlowRefused) as error:
            _log.debug("reset_not_told", flow=ride.flow.opened.flow, detail=error)
        ride.flow.owes_reset = False

    async def _try_to_tell_reset(self, ride: Ride) -> bool:
        ride.flow.owes_reset = True
        if not await self._try_to_resume(ride, RESUME_SECONDS):
            return False
        carrier = ride.alight()
        return carrier is not None and await carrier.farewell

    async def _resume(self, ride: Ride, seconds: float, doubted: SessionKey | None = None) -> None:
        """Find the flow's connector again, by whatever relay, and go on there.

        Raises Refused when there is no session to be had, FlowRefused for the connector's own answer, and LinkError
        when the time is over or the flow ended meanwhile. `doubted` as in Move.
        """
        pause = RESUME_RETRY_FIRST_SECONDS
        try:
            async with asyncio.timeout(seconds) as patience:
                with ride.ending(patience):
                    while not await self._try_to_resume(ride, seconds, doubted):
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, RESUME_RETRY_MAX_SECONDS)
        except TimeoutError:
            raise LinkError(f"not resumed within {seconds:g} s") from None

    async def _try_to_resume(self, ride: Ride, seconds: float, doubted: SessionKey | None = None) -> bool:
        await self._relocate(ride, seconds, doubted)
        try:
            await self._resume_on(await self._carriers.dial(ride.session), ride)
        except FlowRefused as error:
            # The session may have ended as it was used; whatever else was refused stays so.
            if error.status is not OpenStatus.DENIED or not ride.flow.has_begun:
                raise
        except (LinkError, IdentityError) as error:
            _log.debug("resume_failed", flow=ride.flow.opened.flow, detail=error)
        else:
            self._broker.settle(ride.number)
            return True
        return False

    async def _resume_on(self, carrier: Carrier, ride: Ride) -> None:
        ride.attempt += 1
        try:
            await carrier.resume(ride.flow, ride.session.opened.session, ride.attempt)
        except asyncio.CancelledError:
            carrier.close(Reason.PEER_GONE)
            raise
        ride.board(carrier)

    async def _move(self, ride: Ride) -> None:
        """Have a session before the carrier is let go."""
        ride.must_move = False
        before = ride.session.key
        try:
            async with asyncio.timeout(RESUME_SECONDS) as patience:
                with ride.ending(patience):
                    await self._relocate(ride, RESUME_SECONDS)
        except TimeoutError:
            return
        except Refused as error:
            # The connector ends the flow when its time is over, if the carrier lasts so long.
            _log.info("flow_not_moved", service=ride.at.service, detail=error)
            return
        if ride.session.key != before and ride.carrier is not None:
            ride.carrier.close(Reason.PEER_GONE)

    async def _relocate(self, ride: Ride, seconds: float, doubted: SessionKey | None = None) -> None:
        connector = ride.session.opened.connector_id
        session = await self._broker.relocate(ride.number, connector, seconds, doubted)
        if ride in self._running.get(ride.session.key, ()):
            self._unseat(ride)
            ride.session = session
            self._seat(ride)
        ride.session = session

    def _seat(self, ride: Ride) -> None:
        self._running.setdefault(ride.session.key, set()).add(ride)

    def _unseat(self, ride: Ride) -> None:
        riding = self._running[ride.session.key]
        riding.discard(ride)
        if not riding:
            del self._running[ride.session.key]


class Ride:
    """A flow that runs, what carries it, and under which session; `attempt` counts its RESUMEs."""

    def __init__(
        self, number: int, at: VirtualPort, flow: TcpFlow, session: Session, carrier: Carrier | None
    ) -> None:
        self.number = number
        self.at = at
        self.flow = flow
        self.session = session
        self.carrier: Carrier | None = None
        self.attempt = 0
        self.must_move = False
        self._woken: asyncio.Future[None] | None = None
        if carrier is not None:
            self.board(carrier)

    def board(self, carrier: Carrier) -> None:
        """Be carried, and hear of the carrier's end."""
        self.carrier = carrier
        carrier.closed.add_done_callback(self.wake)

    def alight(self) -> Carrier | None:
        """Be carried no more; return what carried it."""
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            carrier.closed.remove_done_callback(self.wake)
        return carrier

    async def something(self) -> None:
        """Wait until the flow ended, its carrier closed, or it must move."""
        self._woken = asyncio.get_running_loop().create_future()
        await self._woken

    def wake(self, _: object = None) -> None:
        """Look again."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def move(self) -> None:
        """Have it look for a session, and go there."""
        self.must_move = True
        self.wake()

    @contextlib.contextmanager
    def ending(self, patience: asyncio.Timeout) -> Iterator[None]:
        """Let the time be over as soon as the flow ends."""

        is_over = False

        def stop(_: object) -> None:
            # It may have been called when the time was over already, or what was waited for had come.
            if not is_over and not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())

        self.flow.finished.add_done_callback(stop)
        try:
            yield
        finally:
            is_over = True
            self.flow.finished.remove_done_callback(stop)
