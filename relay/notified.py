"""Hears NOTIFY (RFC 1996): the zone changed, so its SRV records are pulled at once. Believes nothing it is told.

With a key only signed messages count, else only those from a resolver of ours; a NOTIFY can at most make the
relay ask its own resolvers once more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from ztna import notify, tsig
from ztna.config import Endpoint
from ztna.dns import Code
from ztna.errors import ProtocolError
from ztna.names import Zone
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.tsig import Key
from ztna.udp import SockAddr, UdpSocket

NOTIFY_SECONDS_MIN = 0.2
"""What comes within this time of a pull makes one more pull, when it is over."""

WARN_SECONDS = 1.0
"""Refusals are counted all, and logged at most once in this time."""

_WHERE = "relay.notify"
_log = logger(__name__)


class Notified:
    """A UDP socket for NOTIFY; `pull` is called for a zone that changed. Needs a running loop."""

    def __init__(
        self,
        listen: Endpoint,
        zone: Zone,
        sources: Collection[str],
        key: Key | None,
        pull: Callable[[], None],
    ) -> None:
        """Bind; `sources` are the addresses believed when there is no key. Raises ZtnaError for a taken port."""
        self._zone, self._sources, self._pull = zone, frozenset(sources), pull
        self._keys = {key.name: key} if key else {}
        self._timer: asyncio.TimerHandle | None = None
        self._again = False
        self._warned_at = -WARN_SECONDS
        self._socket = UdpSocket.open((listen.host, listen.port), self._received)
        self.heard = 0
        """NOTIFY messages acted on."""

    @property
    def address(self) -> SockAddr:
        """Where it listens."""
        return self._socket.address

    def close(self) -> None:
        """Stop hearing."""
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()

    def _received(self, packets: list[tuple[bytes, SockAddr]]) -> None:
        answers = [(answer, source) for data, source in packets if (answer := self._answer(data, source))]
        self._socket.send(answers)

    def _answer(self, data: bytes, source: SockAddr) -> bytes | None:
        now = time.time()
        try:
            received = tsig.receive(data, self._keys, now)
            zone = notify.zone_of(received.body)
        except ProtocolError:
            dropped(_WHERE, "malformed")
            return None
        if received.refusal:
            self._refuse(source, received.error.name)
            return received.refusal
        if received.exchange is None and (self._keys or source[0] not in self._sources):
            self._refuse(source, "not signed" if self._keys else "no resolver of ours")
            return notify.answer(received.body, Code.REFUSED)
        if zone == self._zone:
            self.heard += 1
            self._pull_soon()
        answer = notify.answer(received.body, Code.NOERROR)
        return received.exchange.sign(answer, now) if received.exchange else answer

    def _refuse(self, source: SockAddr, why: str) -> None:
        refused(_WHERE, Reason.UNTRUSTED)
        now = time.monotonic()
        if now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            _log.warning("notify_refused", peer="{}:{}".format(*source), error=why)

    def _pull_soon(self) -> None:
        if self._timer is not None:
            self._again = True
            return
        self._pull()
        self._timer = asyncio.get_running_loop().call_later(NOTIFY_SECONDS_MIN, self._rested)

    def _rested(self) -> None:
        self._timer = None
        if self._again:
            self._again = False
            self._pull_soon()
