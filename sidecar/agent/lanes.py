"""Which way the packets of an agent's sessions go: on packet links, or on stream carriers where UDP is blocked.

Packet links are tried always, and stream carriers beside them when nothing comes of that; whichever carries first is
used, and packet links are gone back to whenever they carry. Decides nothing about sessions and moves no packet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from sidecar.agent.commands import Session
from sidecar.agent.links import Link, Links
from sidecar.agent.stream_links import StreamLink, StreamLinks
from ztna.reasons import Reason
from ztna.telemetry import logger

TICK_SECONDS = 1.0
PROBE_SECONDS = 5.0
"""How often UDP is tried again while stream carriers carry."""
SETTLE_SECONDS = 0.5
"""How long a stream carrier is kept after UDP was gone back to: what is under way on it arrives until then."""
UNUSED_SECONDS = 10.0
"""A stream carrier that no flow needs is closed when it is so old."""

_log = logger(__name__)

AnyLink = Link | StreamLink


class Flows(Protocol):
    """What rides links: sidecar.agent.datagrams."""

    def link_ready(self, link: AnyLink) -> None:
        """Send what waited for it."""

    def link_failed(self, link: AnyLink) -> None:
        """Ask for another connector."""

    def riders(self, link: AnyLink) -> Iterable[Session]:
        """Return the sessions of the flows on a link."""

    def switch(self, session: Session, link: AnyLink) -> None:
        """Have the flows of a session ride this link, and send what waits when it is ready."""


class Lanes:
    """Gives each session its link. The owner sets `flows` before the first session comes."""

    flows: Flows

    def __init__(self, links: Links, streams: StreamLinks, *, is_udp_blocked: Callable[[str], bool]) -> None:
        """`is_udp_blocked` says of a relay that UDP does not reach it."""
        self._links = links
        self._streams = streams
        self._is_udp_blocked = is_udp_blocked
        self._loop = asyncio.get_running_loop()
        self._probe_at = 0.0
        links.ready = self._link_ready
        links.failed = self._link_failed
        links.doubted = self._link_doubted
        streams.ready = self._stream_ready
        streams.failed = self._stream_failed

    def of(self, session: Session, former: Session | None, rode: AnyLink | None) -> AnyLink | None:
        """Return the link to send a session's packets on, now or when it is ready; None when none can be had.

        `former` is the session, if any, that the flow had so far, and `rode` its link: from a stream carrier it goes to
        another one first, which takes its sockets at the backend along.
        """
        link = self._links.of(session)
        is_blocked = self._is_udp_blocked(session.relay) or self._streams.find(session) is not None
        is_moving = isinstance(rode, StreamLink) and former is not None
        if not is_moving and link is not None and (link.is_trusted or not is_blocked):
            return link
        before = former.opened.session if former is not None and former.service == session.service else None
        return self._streams.of(session, before) or link

    def session_ended(self, session: Session, reason: Reason, *, relay_lost: bool) -> None:
        """Close what nothing needs any more; what only lost its relay carries until its flows have moved."""
        stream = self._streams.find(session)
        if stream is not None and relay_lost:
            stream.is_orphan = True
        else:
            self._streams.session_ended(session, reason)
        self._links.session_ended(session, reason, relay_lost=relay_lost)

    async def run(self) -> None:
        """Try UDP again now and then, and close what nobody needs, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._tick()

    def status(self) -> list[dict[str, object]]:
        """Return what `/status` shows of links."""
        return self._links.status() + self._streams.status()

    def close(self) -> None:
        """Close everything."""
        self._streams.close_all()
        self._links.close()

    def _tick(self) -> None:
        now = self._loop.time()
        for stream in self._streams.links:
            if now - stream.since >= UNUSED_SECONDS:
                self._close_unused(stream)
        if now >= self._probe_at:
            self._probe_at = now + PROBE_SECONDS
            for stream in self._streams.links:
                self._probe(stream)

    def _probe(self, stream: StreamLink) -> None:
        """Have UDP tried for a session, and gone back to if it carries already."""
        if not stream.is_orphan:
            link = self._links.of(stream.session)
            if link is not None and link.is_trusted:
                self._go_back(stream, link)

    def _trusted(self, session: Session) -> Link | None:
        """Return the session's packet link if it can be relied on; dials none."""
        link = self._links.find(session)
        return self._links.of(session) if link is not None and link.is_trusted else None

    def _go_back(self, stream: StreamLink, link: Link) -> None:
        if any(self.flows.riders(stream)):
            _log.info("udp_carries", service=stream.session.service, connector=link.key[0])
            self.flows.switch(stream.session, link)
        self._loop.call_later(SETTLE_SECONDS, self._close_unused, stream)

    def _close_unused(self, stream: StreamLink) -> None:
        if not any(self.flows.riders(stream)):
            self._streams.close(stream)

    def _sessions_on(self, link: AnyLink) -> list[Session]:
        return list({session.key: session for session in self.flows.riders(link)}.values())

    def _link_ready(self, link: Link) -> None:
        for stream in self._streams.links:
            if not stream.is_orphan and self._trusted(stream.session) is link:
                self._go_back(stream, link)
        self.flows.link_ready(link)

    def _link_doubted(self, link: Link) -> None:
        """Nothing came of it for a while: have something else at hand."""
        for session in self._sessions_on(link):
            stream = self._streams.of(session)
            if stream is not None and stream.is_ready:
                self._stream_ready(stream)

    def _link_failed(self, link: Link) -> None:
        """Go on without it where a stream carrier stands, else ask for another connector."""
        for session in self._sessions_on(link):
            stream = self._streams.find(session)
            if stream is not None and (stream.is_ready or self._is_udp_blocked(session.relay)):
                self.flows.switch(session, stream)
        self.flows.link_failed(link)

    def _stream_ready(self, stream: StreamLink) -> None:
        link = self._trusted(stream.session)
        if link is None:
            _log.warning("udp_blocked", service=stream.session.service, relay=stream.session.relay)
            self.flows.switch(stream.session, stream)
        else:  # it was only slow, or has come back; or the stream carrier took flows along from another session
            self._go_back(stream, link)

    def _stream_failed(self, stream: StreamLink) -> None:
        if stream.is_orphan:
            return  # its flows are on their way to another session
        link = self._trusted(stream.session)
        if link is not None:
            self.flows.switch(stream.session, link)
        self.flows.link_failed(stream)
