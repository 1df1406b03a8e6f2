"""The packet links of an agent, one for each connector it has sessions with on a relay, and hole punching on them.

Dials a link when a session first needs it, notices when it falls silent, closes it with its last session. What
travels on a link is sidecar.agent.datagrams'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from sidecar.agent.commands import Session, SessionKey
from sidecar.link.packet import PacketLink
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused
from ztna.identity import Identity, require_connector
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.wire.control import CandidateOffer, ForwarderBind, PunchingResult, StartPunching

DIAL_SECONDS = 2.0
"""The connector binds as soon as it accepts the session, so this is round trips; by the end of it new flows must
still reach another connector within 5 s."""
WATCH_SECONDS = 0.5
SILENCE_FORWARDED_SECONDS = 2.5
SILENCE_DIRECT_SECONDS = 5.0
"""The path switch needs 4 s to leave a direct path that died; only then has the link itself failed."""
PUNCHING_SECONDS = 10.0

LinkKey = tuple[str, ConnectorId, str, bytes]
_log = logger(__name__)


class Link:
    """A packet link that is dialled or stands; `key` is the relay, the connector, its leaf and the binding."""

    def __init__(self, key: LinkKey) -> None:
        self.key = key
        self.sessions: dict[SessionKey, Session] = {}
        self.packet_link: PacketLink | None = None
        self.punching_until: float | None = None
        self.path = ""
        self.task: asyncio.Task[None] | None = None
        self.is_over = False

    @property
    def is_ready(self) -> bool:
        """Whether packets can be sent."""
        return self.packet_link is not None

    def send(self, service: ServiceName, packet: bytes) -> None:
        """Send one IP packet; what the link does not take is dropped and counted there."""
        if self.packet_link is not None:
            self.packet_link.send(service, packet)


class Links:
    """All packet links. The owner sets `ready`, `failed`, `unfit` and `received` before the first session comes."""

    ready: Callable[[Link], None]
    failed: Callable[[Link], None]
    unfit: Callable[[Session], None]
    received: Callable[[Link, ServiceName, bytes], None]

    def __init__(
        self,
        credentials: Credentials,
        *,
        tasks: asyncio.TaskGroup,
        send: Callable[[str, CandidateOffer | PunchingResult], object],
        direct: bool,
        private_candidates: bool,
    ) -> None:
        """`send` puts a message on the control connection to a relay; `direct` allows direct paths."""
        self.credentials = credentials  # may be replaced; links that stand keep theirs
        self._tasks = tasks
        self._send = send
        self._direct = direct
        self._private = private_candidates
        self._loop = asyncio.get_running_loop()
        self._links: dict[LinkKey, Link] = {}

    def of(self, session: Session) -> Link | None:
        """Return the session's link, dialling it if it does not stand.

        None when the relay has no forwarder, or the connector at the other end may not serve this session.
        """
        opened = session.opened
        if opened.forwarder is None:
            return None
        key = (session.relay, opened.connector_id, opened.fingerprint, bytes(opened.forwarder.bind_id))
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = Link(key)
            link.task = self._tasks.create_task(
                self._live(link, session, opened.forwarder), name=f"link to {opened.connector_id}"
            )
        elif link.packet_link is not None and not _is_fit(session, link.packet_link.peer):
            return None
        link.sessions[session.key] = session
        return link

    def session_ended(self, session: Session, reason: Reason) -> None:
        """Close the links that no session needs any more."""
        for link in tuple(self._links.values()):
            if link.sessions.pop(session.key, None) is not None and not link.sessions:
                self._close(link, reason)

    def start_punching(self, relay: str, message: StartPunching) -> None:
        """Probe the connector's candidates after the delay that both sides were told."""
        link = self._of_key((relay, message.session))
        if link is None or not self._direct:
            dropped("agent_punching", "unexpected")
            return
        self._loop.call_later(message.delay_ms / 1000, self._probe, link, message)

    async def run(self) -> None:
        """Watch all links for silence and for changes of path, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for link in tuple(self._links.values()):
                self._watch(link)

    def status(self) -> list[dict[str, object]]:
        """Return what `/status` shows of links."""
        return [
            {
                "relay": link.key[0],
                "connector": link.key[1],
                "path": link.packet_link.path if link.packet_link else "dialling",
                "sessions": len(link.sessions),
            }
            for link in self._links.values()
        ]

    def close(self) -> None:
        """Close every link."""
        for link in tuple(self._links.values()):
            self._close(link, Reason.DRAINING)

    async def _live(self, link: Link, session: Session, forwarder: ForwarderBind) -> None:
        """Dial, and stay until the link is over; whatever ended it, its flows hear of it."""
        try:
            made = await PacketLink.dial(
                forwarder,
                session.opened.probe_key,
                self.credentials,
                check=partial(_check, session),
                receive=lambda _, service, packet: self.received(link, service, packet),
                timeout_s=DIAL_SECONDS,
                allow_private=self._private,
            )
        except (LinkError, Refused) as error:
            _log.warning("link_failed", connector=link.key[1], relay=link.key[0], detail=error)
            self._drop(link)
            return
        link.packet_link = made
        if link.is_over:
            made.close()
            return
        _log.info("link_opened", connector=link.key[1], relay=link.key[0], path=made.path)
        for other in tuple(link.sessions.values()):
            # Those that joined while it was dialled: the certificate was checked for the first one only.
            if not _is_fit(other, made.peer):
                del link.sessions[other.key]
                self.unfit(other)
        self.ready(link)
        self._offer(link, session, made)
        reason = await made.closed
        _log.info("link_ended", connector=link.key[1], relay=link.key[0], reason=reason)
        self._drop(link)

    def _drop(self, link: Link) -> None:
        link.packet_link = None
        if self._links.get(link.key) is link:
            del self._links[link.key]
        if not link.is_over:
            link.is_over = True
            self.failed(link)

    def _close(self, link: Link, reason: Reason) -> None:
        link.is_over = True
        if self._links.get(link.key) is link:
            del self._links[link.key]
        if link.packet_link is not None:
            link.packet_link.close(reason)
        elif link.task is not None:
            link.task.cancel()

    # --- watching and hole punching

    def _watch(self, link: Link) -> None:
        made = link.packet_link
        if made is None:
            return
        limit = SILENCE_DIRECT_SECONDS if made.path == "direct" else SILENCE_FORWARDED_SECONDS
        if made.unanswered_s > limit:
            _log.warning("link_silent", connector=link.key[1], relay=link.key[0], path=made.path)
            made.close(Reason.PEER_GONE)
            return
        if made.path != link.path:
            _log.info("link_path", connector=link.key[1], relay=link.key[0], path=made.path)
            link.path = made.path
        self._report(link, made)

    def _offer(self, link: Link, session: Session, made: PacketLink) -> None:
        link.path = made.path
        if self._direct:
            candidates = made.local_candidates()
            self._send(session.relay, CandidateOffer(session.opened.session, candidates))

    def _probe(self, link: Link, message: StartPunching) -> None:
        if link.packet_link is not None:
            link.packet_link.probe(message.candidates)
            link.punching_until = self._loop.time() + PUNCHING_SECONDS

    def _report(self, link: Link, made: PacketLink) -> None:
        """Say once how punching went: when a direct path carries, or when the time for it is over."""
        if link.punching_until is None or not link.sessions:
            return
        success = made.path == "direct"
        if success or self._loop.time() >= link.punching_until:
            link.punching_until = None
            session = next(iter(link.sessions.values()))
            self._send(session.relay, PunchingResult(session.opened.session, success))

    def _of_key(self, key: SessionKey) -> Link | None:
        return next((link for link in self._links.values() if key in link.sessions), None)


def _is_fit(session: Session, identity: Identity) -> bool:
    try:
        _check(session, identity)
    except Refused as error:
        refused("agent_link", error.reason)
        return False
    return True


def _check(session: Session, identity: Identity) -> None:
    opened = session.opened
    require_connector(identity, opened.service, opened.connector_id, opened.fingerprint)
