"""sidecar.agent.lanes: which of a packet link and a stream carrier a session's packets take, and when they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from sidecar.agent.commands import Session
from sidecar.agent.lanes import PROBE_SECONDS, UNUSED_SECONDS, AnyLink, Lanes
from sidecar.agent.links import Links
from sidecar.agent.stream_links import StreamLink, StreamLinks
from tests.unit.test_sidecar_agent_links import session
from ztna.names import SessionId
from ztna.reasons import Reason

WEB, MAIL = session("web-app", 1), session("mail", 2)


class FakeLink:
    """A packet link."""

    key = ("c1", "")
    is_trusted = False


class FakeStream(StreamLink):
    """A stream carrier for one session, of which only what Lanes asks is there."""

    is_ready = False  # type: ignore[assignment]

    def __init__(self, session: Session) -> None:
        self.session = session
        self.is_orphan = False
        self.since = 0.0


class Ground:
    """Lanes over one packet link and the stream carriers that were asked for, on a clock that stands."""

    def __init__(self) -> None:
        self.now = 100.0
        self.link: FakeLink | None = FakeLink()
        self.streams: dict[Session, FakeStream] = {}
        self.former: list[SessionId | None] = []
        self.blocked = False
        self.riding: dict[object, list[Session]] = {}
        self.told: list[tuple[str, object]] = []
        self.later: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self.may_stream = True
        self.lanes = Lanes(
            cast(Links, _Links(self)),
            cast(StreamLinks, _Streams(self)),
            is_udp_blocked=lambda relay: self.blocked,
        )
        self.lanes.flows = _Flows(self)
        self.lanes._loop = cast(Any, self)

    def time(self) -> float:
        return self.now

    def call_later(self, _delay: float, call: Callable[..., None], *args: object) -> None:
        self.later.append((call, args))

    def pass_time(self) -> None:
        waiting, self.later = self.later, []
        for call, args in waiting:
            call(*args)

    def of(self, wanted: Session = WEB, former: Session | None = None, rode: object = None) -> object:
        return self.lanes.of(wanted, former, cast(AnyLink, rode))


class _Links:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def of(self, session: Session) -> object:
        return self._ground.link

    find = of

    def session_ended(self, session: Session, reason: Reason, *, relay_lost: bool) -> None:
        self._ground.told.append(("link left", session))

    def status(self) -> list[dict[str, object]]:
        return [{"carrier": "quic"}]

    def close(self) -> None:
        self._ground.told.append(("closed", "links"))


class _Streams:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    @property
    def links(self) -> tuple[FakeStream, ...]:
        return tuple(self._ground.streams.values())

    def find(self, session: Session) -> FakeStream | None:
        return self._ground.streams.get(session)

    def of(self, session: Session, former: SessionId | None = None) -> FakeStream | None:
        if not self._ground.may_stream:
            return None
        self._ground.former.append(former)
        return self._ground.streams.setdefault(session, FakeStream(session))

    def close(self, stream: FakeStream) -> None:
        del self._ground.streams[stream.session]

    def session_ended(self, session: Session, reason: Reason) -> None:
        self._ground.streams.pop(session, None)

    def status(self) -> list[dict[str, object]]:
        return [{"carrier": "tls"}]

    def close_all(self) -> None:
        self._ground.streams.clear()


class _Flows:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def link_ready(self, link: AnyLink) -> None:
        self._ground.told.append(("ready", link))

    def link_failed(self, link: AnyLink) -> None:
        self._ground.told.append(("failed", link))

    def riders(self, link: AnyLink) -> Iterable[Session]:
        return self._ground.riding.get(link, [])

    def switch(self, session: Session, link: AnyLink) -> None:
        for riding in self._ground.riding.values():
            if session in riding:
                riding.remove(session)
        self._ground.riding.setdefault(link, []).append(session)
        self._ground.told.append((f"{session.service} switched", link))


def lanes(ground: Ground) -> Any:
    """Return what links call."""
    return ground.lanes


async def test_a_packet_link_is_taken_where_udp_is_not_blocked_or_it_carries_all_the_same() -> None:
    ground = Ground()
    assert ground.of() is ground.link
    ground.blocked = True
    stream = ground.of()
    assert stream is ground.streams[WEB]
    assert ground.link is not None
    ground.link.is_trusted = True
    assert ground.of() is ground.link


async def test_without_a_stream_carrier_the_packet_link_is_all_there_is() -> None:
    ground = Ground()
    ground.blocked, ground.may_stream = True, False
    assert ground.of() is ground.link
    ground.link = None
    assert ground.of() is None


async def test_from_one_stream_carrier_flows_go_to_another_which_hears_of_their_session() -> None:
    ground = Ground()
    assert ground.link is not None
    ground.link.is_trusted = True
    rode = FakeStream(WEB)
    moved = session("web-app", 3)
    assert ground.of(moved, WEB, rode) is ground.streams[moved]
    assert ground.of(MAIL, WEB, rode) is ground.streams[MAIL]
    assert ground.former == [WEB.opened.session, None], "but not of another service's"


async def test_a_doubted_link_has_a_stream_made_ready_and_flows_go_over_when_it_is() -> None:
    ground = Ground()
    ground.riding[ground.link] = [WEB, WEB]
    lanes(ground)._link_doubted(ground.link)
    (stream,) = ground.streams.values()
    assert ground.told == []
    stream.is_ready = True  # type: ignore[misc]
    lanes(ground)._link_doubted(ground.link)
    assert ground.told == [("web-app switched", stream)]
    lanes(ground)._stream_ready(stream)
    assert ground.told[1:] == [("web-app switched", stream)]


async def test_udp_that_works_again_is_gone_back_to_and_the_stream_kept_for_what_is_under_way() -> None:
    ground = Ground()
    ground.blocked = True
    stream = cast(FakeStream, ground.of())
    ground.riding[stream] = [WEB]
    lanes(ground)._tick()
    assert ground.told == []
    assert ground.link is not None
    ground.link.is_trusted = True
    lanes(ground)._tick()
    assert ground.told == [], "it was probed a moment ago"
    ground.now += PROBE_SECONDS
    lanes(ground)._tick()
    assert ground.told == [("web-app switched", ground.link)]
    assert ground.streams == {WEB: stream}
    ground.pass_time()
    assert ground.streams == {}


async def test_a_link_that_becomes_ready_takes_the_flows_of_its_streams() -> None:
    ground = Ground()
    orphan, stream = (cast(FakeStream, ground.lanes._streams.of(each)) for each in (MAIL, WEB))
    orphan.is_orphan = True
    ground.riding |= {stream: [WEB], orphan: [MAIL]}
    assert ground.link is not None
    ground.link.is_trusted = True
    lanes(ground)._link_ready(ground.link)
    assert ground.told == [("web-app switched", ground.link), ("ready", ground.link)]
    assert ground.riding[orphan] == [MAIL], "which has another session to go to"


async def test_a_link_that_fails_leaves_its_flows_to_streams_that_stand() -> None:
    ground = Ground()
    ground.riding[ground.link] = [WEB, MAIL]
    stream = cast(FakeStream, ground.lanes._streams.of(WEB))
    lanes(ground)._link_failed(ground.link)
    assert ground.told == [("failed", ground.link)], "it does not stand yet, and UDP is not blocked"
    ground.blocked = True
    lanes(ground)._link_failed(ground.link)
    assert ground.told[1:] == [("web-app switched", stream), ("failed", ground.link)]


async def test_a_stream_that_fails_leaves_its_flows_to_a_trusted_link_or_asks_for_another_connector() -> None:
    ground = Ground()
    stream = cast(FakeStream, ground.lanes._streams.of(WEB))
    lanes(ground)._stream_failed(stream)
    assert ground.told == [("failed", stream)]
    assert ground.link is not None
    ground.link.is_trusted = True
    lanes(ground)._stream_failed(stream)
    assert ground.told[1:] == [("web-app switched", ground.link), ("failed", stream)]
    stream.is_orphan = True
    lanes(ground)._stream_failed(stream)
    assert len(ground.told) == 3, "its flows are on their way already"


async def test_an_unused_stream_is_closed_and_one_that_lost_its_relay_carries_on() -> None:
    ground = Ground()
    unused, used, lost = (
        cast(FakeStream, ground.lanes._streams.of(each)) for each in (WEB, MAIL, session("git", 4))
    )
    ground.riding |= {used: [MAIL], lost: [lost.session]}
    for each in (unused, used, lost):
        each.since = ground.now
    ground.now += UNUSED_SECONDS
    lanes(ground)._tick()
    assert set(ground.streams.values()) == {used, lost}
    ground.lanes.session_ended(lost.session, Reason.PEER_GONE, relay_lost=True)
    assert lost.is_orphan and lost.session in ground.streams
    ground.lanes.session_ended(MAIL, Reason.CLOSED_BY_PEER, relay_lost=False)
    assert MAIL not in ground.streams
    assert [each["carrier"] for each in ground.lanes.status()] == ["quic", "tls"]
    ground.lanes.close()
    assert ground.streams == {} and ground.told[-1] == ("closed", "links")
