"""Packets of an agent on stream carriers, one for each session, where UDP does not get through.

To its flows it is a link like any other (sidecar.agent.links). When it is used is sidecar.agent.lanes' to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sidecar.agent.carriers import Carriers
from sidecar.agent.commands import Session, SessionKey
from sidecar.link.packet_stream import PacketStream
from sidecar.link.stream import Carrier, FlowRefused
from ztna.errors import IdentityError, LinkError
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.telemetry import logger
from ztna.wire.stream import FORMER_SESSIONS_MAX, PacketsFrame

RETRY_SECONDS = 2.0
"""A session whose carrier could not be had is not tried again before."""
FAILED_MAX = 4096

_log = logger(__name__)


class StreamLink:
    """The packets of one session on a stream carrier that is dialled or stands."""

    def __init__(self, session: Session, receive: Callable[[StreamLink, bytes], None], now: float) -> None:
        self.session = session
        self.sessions = {session.key: session}
        self.since = now
        self.former: set[SessionId] = set()
        self.carrier: Carrier | None = None
        self.is_over = False
        self.is_orphan = False
        """Whether its session ended with its relay, and its flows are to have another."""
        self.task: asyncio.Task[None] | None = None
        self._receive = receive
        self.packets = PacketStream(lambda packet: self._receive(self, packet), self._ended)

    @property
    def is_ready(self) -> bool:
        """Whether packets can be sent."""
        return self.packets.is_open

    def carries(self, session: Session) -> bool:
        """Whether it carries that session."""
        return self.is_ready and session.key in self.sessions

    def send(self, service: ServiceName, packet: bytes) -> None:
        """Send one IP packet; what it does not take is dropped and counted there."""
        self.packets.send(packet)

    def _ended(self) -> None:
        if self.carrier is not None:
            self.carrier.close()


class StreamLinks:
    """All of them. The owner sets `ready`, `failed` and `received` before the first session comes."""

    ready: Callable[[StreamLink], None]
    failed: Callable[[StreamLink], None]
    received: Callable[[StreamLink, ServiceName, bytes], None]

    def __init__(self, carriers: Carriers, *, tasks: asyncio.TaskGroup) -> None:
        self._carriers = carriers
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._links: dict[SessionKey, StreamLink] = {}
        self._is_closed = False
        self._failed_at: dict[SessionKey, float] = {}

    @property
    def links(self) -> tuple[StreamLink, ...]:
        """Those that are dialled or stand."""
        return tuple(self._links.values())

    def find(self, session: Session) -> StreamLink | None:
        """Return the session's, if there is one."""
        return self._links.get(session.key)

    def of(self, session: Session, former: SessionId | None = None) -> StreamLink | None:
        """Return the session's, dialling it if need be; None when that failed a moment ago, or the agent is stopping.

        `former` is the session whose flows go on in this one.
        """
        link = self._links.get(session.key)
        now = self._loop.time()
        if link is None:
            if self._is_closed or now - self._failed_at.get(session.key, -RETRY_SECONDS) < RETRY_SECONDS:
                return None
            link = self._links[session.key] = StreamLink(session, self._received, now)
            link.task = self._tasks.create_task(self._live(link), name=f"packets of {session.service}")
        if former is not None and link.carrier is None and len(link.former) < FORMER_SESSIONS_MAX:
            link.former.add(former)
        return link

    def session_ended(self, session: Session, reason: Reason) -> None:
        """Close what a session has."""
        self._failed_at.pop(session.key, None)
        link = self._links.get(session.key)
        if link is not None:
            self.close(link, reason)

    def close(self, link: StreamLink, reason: Reason = Reason.CLOSED_BY_PEER) -> None:
        """Close one of them; nobody is told."""
        link.is_over = True
        if self._links.get(link.session.key) is link:
            del self._links[link.session.key]
        is_answered = link.packets.is_open
        link.packets.reset(reason)
        if not is_answered and link.task is not None:
            link.task.cancel()

    def close_all(self) -> None:
        """Close every one, and dial no other."""
        self._is_closed = True
        for link in self.links:
            self.close(link, Reason.DRAINING)

    def status(self) -> list[dict[str, object]]:
        """Return what `/status` shows of them."""
        return [
            {
                "relay": link.session.relay,
                "connector": link.session.opened.connector_id,
                "carrier": "tls",
                "path": "dialling"
                if link.carrier is None
                else ("forwarded" if link.carrier.forwarded else "direct"),
                "ways": [link.session.relay],
                "sessions": 1,
            }
            for link in self.links
        ]

    async def _live(self, link: StreamLink) -> None:
        """Dial, and stay until it is over."""
        session = link.session
        try:
            carrier = await self._carriers.dial(session)
            frame = PacketsFrame(session.opened.session, session.service, tuple(sorted(link.former)))
            link.carrier = carrier
            await carrier.open_packets(frame, link.packets)
        except (LinkError, IdentityError, FlowRefused) as error:
            _log.debug("packets_not_carried", service=session.service, relay=session.relay, detail=error)
            if len(self._failed_at) >= FAILED_MAX:
                self._failed_at.clear()
            self._failed_at[session.key] = self._loop.time()
            self._drop(link)
            return
        except BaseException:
            if link.carrier is not None:
                link.carrier.close()
            raise
        _log.info("packets_carried", service=session.service, relay=session.relay, carrier="tls")
        if link.is_ready and not link.is_over:
            self.ready(link)
        await carrier.closed
        self._drop(link)

    def _drop(self, link: StreamLink) -> None:
        if self._links.get(link.session.key) is link:
            del self._links[link.session.key]
        if not link.is_over:
            link.is_over = True
            self.failed(link)

    def _received(self, link: StreamLink, packet: bytes) -> None:
        self.received(link, link.session.service, packet)
