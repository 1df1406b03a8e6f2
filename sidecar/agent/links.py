"""The packet links of an agent, one for each connector it has sessions with, and hole punching on them.

Dials a link when a session first needs it, moves it to another relay's forwarder when its own goes, notices when it
falls silent, closes it with its last session. What travels on a link is sidecar.agent.datagrams'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from sidecar.agent.commands import Session, SessionKey
from sidecar.agent.relays import Relays, RelayState
from sidecar.link.packet import PacketLink
from sidecar.link.paths import REST_SECONDS
from sidecar.link.quic_stream import QuicStream
from sidecar.link.ways import Way, choose
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused, ZtnaError
from ztna.identity import Identity, require_connector
from ztna.names import ConnectorId, ServiceName
from ztna.quiet import Quiet
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.wire.control import CandidateOffer, ForwarderBind, PunchingResult, StartPunching

DIAL_SECONDS = 2.0
"""How long nothing may come of a dial. The connector binds as soon as it accepts the session, so these are round
trips; by the end of it new flows must still reach another connector within 5 s."""
WATCH_SECONDS = 0.5
TURNS_TO_READ = 3
"""Turns of the loop until what came while it was held up is read: only then is silence silence."""
SILENCE_FORWARDED_SECONDS = 2.5
DOUBT_DIALLING_SECONDS = 0.75
DOUBT_SECONDS = 1.0
"""How long nothing may come back before another way to carry packets is made ready."""
PROOF_SECONDS = 1.0
"""How soon a connector must answer before a TCP flow is put on its link."""
SILENCE_ROUND_TRIPS = 3
"""To be added on a long way: a lost packet is missed after one, and its answer takes another."""
SILENCE_DIRECT_SECONDS = 5.0
"""The path switch needs 4 s to leave a direct path that died; only then has the link itself failed."""
PUNCHING_SECONDS = 10.0
OFFER_AGAIN_SECONDS = 40.0
OFFER_DOUBLINGS_MAX = 4
"""Candidates are offered again while no direct path is found, ever more rarely: so that both ends probe at one time,
and what they know of each other is fresh."""

LINGER_SECONDS = 30.0
"""How long a link whose sessions' relay is lost waits for another session; the connector keeps its end as long."""

LinkKey = tuple[ConnectorId, str, str]
"""A connector, its leaf and our own: under a renewed one there is another link."""
_log = logger(__name__)


class Link:
    """A packet link that is dialled or stands; `key` is the connector and its leaf.

    Each session on it brings a way (by its relay's forwarder); the link is one and the same over all of them.
    """

    def __init__(self, key: LinkKey) -> None:
        self.key = key
        self.sessions: dict[SessionKey, Session] = {}
        self.packet_link: PacketLink | None = None
        self.is_ready = False
        """Whether packets can be sent, as far as is known."""
        self.is_doubted = False
        """Whether nothing came back for so long that it may carry no more."""
        self.relays: dict[bytes, str] = {}
        """Which relay each way, by its bind id, goes by."""
        self.added_at: dict[bytes, float] = {}
        """When each way that was not heard yet was added."""
        self.heard: set[bytes] = set()
        """The ways on which the connector was heard when last looked."""
        self.lingers_until: float | None = None
        self.offers = 0
        self.offer_at = 0.0
        """How often candidates were offered since there was a direct path, and when they are to be again."""
        self.punching: tuple[SessionKey, float] | None = None
        self.path = ""
        self.task: asyncio.Task[None] | None = None
        self.is_over = False
        self.settled = asyncio.Event()
        """Set once it was dialled, with or without success."""

    @property
    def relay(self) -> str:
        """The relay of the way that carries."""
        return self.relays[self.packet_link.carrying.bind_id] if self.packet_link is not None else ""

    @property
    def is_trusted(self) -> bool:
        """Whether packets can be sent, and nothing speaks against that they arrive."""
        return self.is_ready and not self.is_doubted

    def carries(self, session: Session) -> bool:
        """Whether the connector knows that this session is of this link, so that it needs no other for the service."""
        return self.packet_link is not None and self.packet_link.is_heard(_bind_id(session))

    def send(self, service: ServiceName, packet: bytes) -> None:
        """Send one IP packet; what the link does not take is dropped and counted there."""
        if self.packet_link is not None:
            self.packet_link.send(service, packet)


class Links:
    """All packet links. The owner sets the callbacks before the first session comes.

    `doubted` is called when nothing came of a link for a moment, long before it fails.
    """

    ready: Callable[[Link], None]
    failed: Callable[[Link], None]
    doubted: Callable[[Link], None]
    unfit: Callable[[Session], None]
    received: Callable[[Link, ServiceName, bytes], None]

    def __init__(
        self,
        credentials: Callable[[str], Credentials],
        *,
        tasks: asyncio.TaskGroup,
        relays: Relays,
        send: Callable[[str, CandidateOffer | PunchingResult], object],
        addresses: Callable[[], Sequence[str]],
        direct: bool,
        private_candidates: bool,
    ) -> None:
        """`relays` are only read; `send` puts a message on a control connection; `direct` allows direct paths.

        `addresses` gives those of this host's interfaces.

        `credentials` are those that a relay's sessions were opened with: the connector expects that very leaf.
        """
        self._credentials = credentials
        self._tasks = tasks
        self._relays = relays
        self._send = send
        self._addresses = addresses
        self._direct = direct
        self._private = private_candidates
        self._loop = asyncio.get_running_loop()
        self._links: dict[LinkKey, Link] = {}
        self._is_closed = False
        self._quiet = Quiet()

    def of(self, session: Session) -> Link | None:
        """Return the session's link, dialling it if it does not stand.

        None when the relay has no forwarder, or the connector at the other end may not serve this session; and when
        the agent is stopping.
        """
        opened = session.opened
        if opened.forwarder is None or self._is_closed:
            return None
        key = self._key(session)
        link = self._links.get(key)
        if link is None or (link.packet_link is not None and link.packet_link.closed.done()):
            # One that has just ended tells its flows so in a turn of its own.
            link = self._links[key] = Link(key)
            link.task = self._tasks.create_task(
                self._live(link, session, opened.forwarder), name=f"link to {opened.connector_id}"
            )
        elif link.packet_link is not None and not _is_fit(session, link.packet_link.peer):
            return None
        self._join(link, session)
        return link

    async def stream(self, session: Session) -> QuicStream:
        """Open a stream of the session's link, dialling it if need be. Raises LinkError when nothing comes back."""
        link = self.of(session)
        if link is not None:
            await link.settled.wait()
        if link is None or link.packet_link is None:
            raise LinkError(f"no packet link to {session.opened.connector_id}")
        if not _is_fit(session, link.packet_link.peer):  # who it is was not known yet when the session joined
            raise LinkError(f"{session.opened.connector_id} may not serve {session.service}")
        await link.packet_link.prove(PROOF_SECONDS)
        return link.packet_link.open_stream()

    def is_direct(self, session: Session) -> bool:
        """Say whether the session's link goes straight to the connector now."""
        link = self.find(session)
        return link is not None and link.packet_link is not None and link.packet_link.path == "direct"

    def find(self, session: Session) -> Link | None:
        """Return the session's link if there is one; dials none."""
        return self._links.get(self._key(session))

    def _key(self, session: Session) -> LinkKey:
        opened = session.opened
        own = self._credentials(session.relay).identity
        return opened.connector_id, opened.fingerprint, own.fingerprint

    def session_ended(self, session: Session, reason: Reason, *, relay_lost: bool) -> None:
        """Close the links that no session needs any more; one that only lost its relays waits for another."""
        for link in tuple(self._links.values()):
            if link.sessions.pop(session.key, None) is None:
                continue
            if link.punching is not None and link.punching[0] == session.key:
                link.punching = None  # whom it would be told to knows nothing of that session
            if link.sessions:
                self._choose(link)
            elif relay_lost and link.packet_link is not None:
                link.lingers_until = self._loop.time() + LINGER_SECONDS
                self._choose(link)
            else:
                self._close(link, reason)

    def start_punching(self, relay: str, message: StartPunching) -> None:
        """Probe the connector's candidates after the delay that both sides were told."""
        key = (relay, message.session)
        link = self._of_key(key)
        if link is None or not self._direct:
            dropped("agent_punching", "unexpected")
            return
        self._loop.call_later(message.delay_ms / 1000, self._probe, link, key, message)

    def network_changed(self) -> None:
        """Find out anew on every link what works."""
        for link in tuple(self._links.values()):
            if link.packet_link is not None:
                link.packet_link.network_changed()

    def relays_changed(self) -> None:
        """Leave the ways whose relay is gone, silent or no longer the nearest."""
        for link in tuple(self._links.values()):
            self._choose(link)

    async def run(self) -> None:
        """Watch all links for silence and for changes of path, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for _ in range(TURNS_TO_READ):
                await asyncio.sleep(0)
            for link in tuple(self._links.values()):
                self._watch(link)

    def status(self) -> list[dict[str, object]]:
        """Return what `/status` shows of links."""
        return [
            {
                "relay": link.relay,
                "connector": link.key[0],
                "carrier": "quic",
                "path": link.packet_link.path if link.packet_link else "dialling",
                "ways": sorted(link.relays.values()),
                "sessions": len(link.sessions),
                "rtt_ms": round(link.packet_link.rtt_s * 1000, 1) if link.packet_link else None,
                "candidates": _candidates(link.packet_link) if link.packet_link else [],
                "sent_bytes": link.packet_link.sent_bytes if link.packet_link else 0,
                "received_bytes": link.packet_link.received_bytes if link.packet_link else 0,
            }
            for link in self._links.values()
        ]

    def close(self) -> None:
        """Close every link, and dial no other."""
        self._is_closed = True
        for link in tuple(self._links.values()):
            self._close(link, Reason.DRAINING)

    async def _live(self, link: Link, session: Session, forwarder: ForwarderBind) -> None:
        """Dial, and stay until the link is over; whatever ended it, its flows hear of it."""
        doubt = self._loop.call_later(DOUBT_DIALLING_SECONDS, self._doubt, link)
        try:
            made = await PacketLink.dial(
                forwarder,
                session.opened.probe_key,
                self._credentials(session.relay),
                check=partial(_check, session),
                receive=lambda _, service, packet: self.received(link, service, packet),
                timeout_s=DIAL_SECONDS,
                addresses=self._addresses,
                allow_private=self._private,
            )
        except (LinkError, Refused) as error:
            if self._quiet.allows(("link_failed", link.key[0], session.relay), self._loop.time()):
                _log.warning("link_failed", connector=link.key[0], relay=session.relay, detail=error)
            self._drop(link)
            return
        finally:
            doubt.cancel()
        link.packet_link, link.is_doubted = made, False
        link.settled.set()
        if link.is_over:
            made.close()
            return
        _log.info("link_opened", connector=link.key[0], relay=session.relay, path=made.path)
        link.relays[bytes(forwarder.bind_id)] = session.relay
        made.path_changed = lambda _: self._choose(link)
        made.candidates_changed = lambda _, bind_id: self._offer_anew(link, bind_id)
        for other in tuple(link.sessions.values()):
            # Those that joined while it was dialled: the certificate was checked for the first one only.
            if _is_fit(other, made.peer):
                self._join(link, other)
            else:
                del link.sessions[other.key]
                self.unfit(other)
        link.path = made.path
        self._choose(link)
        self._offer(link, made.carrying.bind_id)
        reason = await made.closed
        _log.info("link_ended", connector=link.key[0], relay=link.relay, reason=reason)
        self._drop(link)

    def _drop(self, link: Link) -> None:
        link.settled.set()
        link.packet_link, link.is_ready = None, False
        if self._links.get(link.key) is link:
            del self._links[link.key]
        if not link.is_over:
            link.is_over = True
            self.failed(link)

    def _close(self, link: Link, reason: Reason) -> None:
        link.settled.set()
        link.is_over = True
        if self._links.get(link.key) is link:
            del self._links[link.key]
        if link.packet_link is not None:
            link.packet_link.close(reason)
        elif link.task is not None:
            link.task.cancel()

    # --- ways

    def _join(self, link: Link, session: Session) -> None:
        """Put a session on a link, and bind at its relay's forwarder if the link is not bound there."""
        link.sessions[session.key] = session
        link.lingers_until = None
        forwarder, made = session.opened.forwarder, link.packet_link
        if made is None or forwarder is None or bytes(forwarder.bind_id) in made.ways:
            return
        try:
            made.add_way(forwarder, session.opened.probe_key)
        except (ZtnaError, OSError) as error:
            _log.warning("way_failed", connector=link.key[0], relay=session.relay, detail=error)
            return
        link.relays[bytes(forwarder.bind_id)] = session.relay
        link.added_at[bytes(forwarder.bind_id)] = self._loop.time()

    def _choose(self, link: Link) -> None:
        """Use the best way, give up those that nothing needs, and tell the flows when packets can be sent again."""
        made = link.packet_link
        if made is None or link.is_over:
            return
        before = made.carrying.bind_id
        after = choose([self._way(link, made, bind_id) for bind_id in made.ways], before)
        if after != before:
            made.use(after)
            _log.info("link_moved", connector=link.key[0], relay=link.relay, path=made.path)
            if made.path != "direct":
                self._offer(link, after)
        needed = {_bind_id(session) for session in link.sessions.values()}
        for bind_id in [each for each in made.ways if each not in needed and each != after]:
            made.remove_way(bind_id)
            del link.relays[bind_id]
            link.added_at.pop(bind_id, None)
        was_ready, carrying = link.is_ready, self._way(link, made, after)
        is_up = self._relays.state(link.relay) is not RelayState.DOWN
        link.is_ready = carrying.is_direct or (is_up and after in needed)
        heard = {each for each in made.ways if made.is_heard(each)}
        news, link.heard = not was_ready or after != before or heard != link.heard, heard
        if link.is_ready and news:
            self.ready(link)

    def _way(self, link: Link, made: PacketLink, bind_id: bytes) -> Way:
        relay = link.relays[bind_id]
        return Way(
            bind_id=bind_id,
            is_direct=made.ways[bind_id].paths.is_direct,
            # One whose session is over is bound no longer.
            is_usable=made.is_heard(bind_id) and bind_id in map(_bind_id, link.sessions.values()),
            is_relay_up=self._relays.state(relay) is RelayState.UP,
            is_preferred=self._relays.preferred == relay,
        )

    # --- watching and hole punching

    def _watch(self, link: Link) -> None:
        made = link.packet_link
        if made is None:
            return
        if link.lingers_until is not None and self._loop.time() >= link.lingers_until:
            self._close(link, Reason.PEER_GONE)
            return
        limit = SILENCE_DIRECT_SECONDS if made.path == "direct" else SILENCE_FORWARDED_SECONDS
        limit += SILENCE_ROUND_TRIPS * made.rtt_s
        # While its relay is silent too, or was restarted and knows nothing of this way, nothing is known of the
        # connector.
        is_relay_up = self._relays.state(link.relay) in (RelayState.UP, RelayState.DRAINING)
        is_bound = made.carrying.bind_id in map(_bind_id, link.sessions.values())
        is_reachable = (is_relay_up and is_bound) or made.path == "direct"
        if made.unanswered_s > limit if is_reachable else self._is_disowned(link, made):
            _log.warning("link_silent", connector=link.key[0], relay=link.relay, path=made.path)
            made.close(Reason.PEER_GONE)
            return
        self._look_for_doubt(link, made, limit - SILENCE_FORWARDED_SECONDS + DOUBT_SECONDS)
        if made.path != link.path:
            _log.info("link_path", connector=link.key[0], relay=link.relay, path=made.path)
            link.path = made.path
        self._report(link, made)
        if made.path == "direct":
            link.offers, link.offer_at = 0, self._loop.time() + REST_SECONDS
        elif self._loop.time() >= link.offer_at:
            self._offer(link, made.carrying.bind_id)

    def _look_for_doubt(self, link: Link, made: PacketLink, limit: float) -> None:
        if made.unanswered_s > limit:
            self._doubt(link)
        elif link.is_doubted:
            link.is_doubted = False
            if link.is_ready:
                self.ready(link)

    def _doubt(self, link: Link) -> None:
        link.is_doubted = True
        if not link.is_over:
            self.doubted(link)

    def _is_disowned(self, link: Link, made: PacketLink) -> bool:
        """Say whether the connector, reached over another relay, does not know this link: it was restarted."""
        earliest = self._loop.time() - SILENCE_FORWARDED_SECONDS
        return any(
            added_at <= earliest
            and not made.is_heard(bind_id)
            and self._relays.state(link.relays[bind_id]) is RelayState.UP
            for bind_id, added_at in link.added_at.items()
        )

    def _offer(self, link: Link, bind_id: bytes) -> None:
        """Begin to look for a direct path on a way, or begin anew."""
        made = link.packet_link
        if made is None or not self._direct:
            return
        session = next((each for each in link.sessions.values() if _bind_id(each) == bind_id), None)
        if session is not None:
            offer = CandidateOffer(session.opened.session, made.local_candidates(bind_id))
            self._send(session.relay, offer)
        link.offer_at = self._loop.time() + OFFER_AGAIN_SECONDS * 2**link.offers
        link.offers = min(link.offers + 1, OFFER_DOUBLINGS_MAX)

    def _offer_anew(self, link: Link, bind_id: bytes) -> None:
        """Offer what the other end has not heard of yet."""
        link.offers = 0
        self._offer(link, bind_id)

    def _probe(self, link: Link, key: SessionKey, message: StartPunching) -> None:
        made, session = link.packet_link, link.sessions.get(key)
        if made is None or session is None or _bind_id(session) not in made.ways:
            return
        made.probe(_bind_id(session), message.candidates)
        link.punching = (key, self._loop.time() + PUNCHING_SECONDS)

    def _report(self, link: Link, made: PacketLink) -> None:
        """Say once how punching went: when a direct path carries, or when the time for it is over."""
        if link.punching is None:
            return
        (relay, session), until = link.punching
        success = made.path == "direct"
        if success or self._loop.time() >= until:
            link.punching = None
            self._send(relay, PunchingResult(session, success))

    def _of_key(self, key: SessionKey) -> Link | None:
        return next((link for link in self._links.values() if key in link.sessions), None)


def _bind_id(session: Session) -> bytes:
    forwarder = session.opened.forwarder
    return bytes(forwarder.bind_id) if forwarder is not None else b""


def _candidates(made: PacketLink) -> list[dict[str, object]]:
    """Return what `/status` shows of the direct paths that were tried, those of the way that carries first."""
    ways = sorted(made.ways.values(), key=lambda way: way is not made.carrying)
    return [
        {
            "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "state": "carries" if way is made.carrying and way.paths.current == (host, port) else state,
            "rtt_ms": round(rtt_s * 1000, 1) if rtt_s is not None else None,
        }
        for way in ways
        for (host, port), state, rtt_s in way.paths.seen
    ]


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
