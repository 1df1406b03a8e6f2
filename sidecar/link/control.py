"""One `ztna-v2` connection to a relay, kept alive: messages both ways, again after a loss, another one when better.

What a message means is the owner's, how a connection comes to be sidecar.link.dialling's. Source: protocol.md, Control
stream.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import msgspec

from sidecar.link.control_stream import WHERE, Control
from sidecar.link.dialling import Dialled, Dialler
from sidecar.link.paths import is_usable
from sidecar.link.pulse import BUSY_PING_SECONDS, GONE_SECONDS, Life, Pulse
from sidecar.link.transports import Transport, Transports
from ztna.config import RelayTarget
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused
from ztna.identity import Identity, require_relay
from ztna.names import ServiceName, SessionId
from ztna.quic import CLOSE_OK, RENEWED, Connection
from ztna.quic_engine import close_code
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.tls_control import TlsConnection
from ztna.udp import SockAddr
from ztna.verdicts import wall_clock
from ztna.wire.control import Address, AnyMessage, Offered, Opened

HELLO_SECONDS = 5.0
LOOK_SECONDS = BUSY_PING_SECONDS
"""How often at least it is looked whether the relay is needed (`is_busy`) and still there."""
BACKOFF_SECONDS_MIN = 0.2
BACKOFF_SECONDS_MAX = 3.0

_log = logger(__name__)

RelayConnection = tuple[str, int]
"""A relay's name and which connection of this process it is: the same pair never comes again."""

RENEW_PART = 0.2
RENEW_LEFT_MAX = timedelta(hours=1)
"""A relay whose certificate has less left is connected to again: it may show a newer one."""
RENEW_RETRY_SECONDS_MIN = 1.0
RENEW_RETRY_SECONDS_MAX = 60.0
RENEW_TRIES = 20
"""Over what is left, so that thousands of agents do not come back each second for an hour."""

AnyConnection = Connection | TlsConnection


@dataclass(frozen=True, slots=True)
class _Other:
    """A connection that is being dialled while one stands: for a renewed certificate, or over `only` this transport."""

    dialling: asyncio.Task[Dialled]
    only: Transport | None = None


class RelayClient:
    """Keeps one connection to one relay while `run` runs.

    `on_connected(client)` is called after the hellos, `on_message(client, message)` for every message after
    them, `on_packet(client, session, packet)` for every packet of a v1 session (connectors),
    `on_lost(client, reason)` once for each on_connected, `on_pulse(client)` between them whenever there may be news
    of `life` and `rtt_s`. When the own certificate was renewed, or the relay's is about to expire, another connection
    is made before the one that stands is given up (on_lost, then on_connected).
    `is_busy` says whether flows depend on the relay, so that its silence must be noticed soon.
    """

    def __init__(
        self,
        target: RelayTarget,
        credentials: Credentials,
        *,
        on_message: Callable[[RelayClient, AnyMessage], None],
        on_connected: Callable[[RelayClient], None],
        on_lost: Callable[[RelayClient, str], None],
        on_packet: Callable[[RelayClient, SessionId, bytes], None] | None = None,
        on_pulse: Callable[[RelayClient], None] = lambda client: None,
        is_busy: Callable[[RelayClient], bool] = lambda client: False,
    ) -> None:
        self.target = target
        self.proven = credentials
        """What we proved ourselves with on the connection that stands: sessions opened on it know no other."""
        self.observed: SockAddr | None = None
        self.problem: str | None = "not yet connected"
        self._credentials = credentials
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_packet = on_packet
        self._on_pulse = on_pulse
        self._is_busy = is_busy
        self.life = Life.UP
        self.rtt_s: float | None = None
        self.is_renewed = False
        """Whether `on_lost` is about a connection that another one takes the place of."""
        self.lost_by = Reason.PEER_GONE
        """Why the last connection ended: what the relay said of our certificate, else that it is gone."""
        self._number = 0
        self._hosts: frozenset[str] = frozenset()
        self._control: Control | None = None
        self._dialler = Dialler(target, self, self._check)
        self._transports = Transports()
        self._renew_at = 0.0

    @property
    def connected(self) -> bool:
        """Whether messages can be sent: connected, and the hellos exchanged."""
        return self._control is not None

    @property
    def connection(self) -> RelayConnection:
        """The connection that stands or, while there is none, the last one."""
        return (self.target.name, self._number)

    @property
    def peer(self) -> Identity | None:
        """The relay, while connected."""
        return None if self._control is None else self._control.peer

    @property
    def transport(self) -> Transport | None:
        """What the connection goes over, None while there is none."""
        return self._control.transport if self._control is not None else None

    @property
    def software(self) -> str:
        """The relay's release, empty while not connected or when it does not say."""
        return "" if self._control is None else self._control.software

    def dial_at(self, forwarder: Address) -> SockAddr:
        """Return where to dial in for TCP flows: at the one port that is known to be open, while UDP is blocked."""
        if self._control is not None and self.transport is Transport.TLS:
            return self._control.peer_address
        return forwarder.ip, forwarder.port

    def send(self, message: AnyMessage) -> bool:
        """Send a message; False when not connected or the relay's features lack its type.

        A relay that does not take what it is sent is dropped and connected to again. Raises ProtocolError for a
        message that is too large for a frame.
        """
        return self._control is not None and self._control.send(message)

    def send_packet(self, session: SessionId, service: ServiceName, packet: bytes) -> bool:
        """Send an IP packet of a v1 session; False when it was lost here: not connected, too large, queue full."""
        return self._control is not None and self._control.send_packet(session, service, packet)

    def use_credentials(self, credentials: Credentials) -> None:
        """Prove ourselves with these from now on, on another connection if the certificate is another."""
        self._credentials = credentials
        if self._control is None or _same_leaf(credentials, self.proven):
            self.proven = credentials

    def network_changed(self) -> None:
        """Let the relay know where we are now: it answers where the last packet came from."""
        if self._control is not None:
            self._control.ping()

    async def run(self) -> None:
        """Connect, stay, and connect again, until cancelled; then close."""
        failures = 0
        while True:
            try:
                standing: Dialled | None = await self._dial()
                while standing is not None:
                    standing = await self._stay(standing)
                failures = 0
            except (LinkError, Refused) as error:
                failures += 1
                self._failed(str(error))
            await asyncio.sleep(_backoff(failures))

    async def _dial(
        self,
        before: Identity | None = None,
        only: Transport | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Dialled:
        """Connect and exchange hellos, upon which it takes the place of the connection before, of that relay's leaf.

        Raises LinkError or Refused, LinkError too when it came about and is not `is_wanted` any more.
        """
        dialled = await self._dialler.dial(
            self._credentials, only=only, head_start_s=self._transports.head_start_s
        )
        try:
            relay, credentials = dialled.connection.identity, dialled.control.credentials
            is_same = before is not None and before.fingerprint == relay.fingerprint
            if is_same and _same_leaf(credentials, self.proven):
                raise LinkError(f"relay {self.target.name} was not renewed yet")
            if not is_wanted():
                raise LinkError(f"relay {self.target.name} answers as before")
            await self._greet(dialled.connection, dialled.control)
        except BaseException:
            dialled.close("")
            if self._control is dialled.control:
                self._lose("closed by us")  # given up in the very turn in which it came into use
            raise
        self._transports.connected(dialled.control.transport, time.monotonic())
        return dialled

    async def _greet(self, connection: AnyConnection, control: Control) -> None:
        control.greet()
        with suppress(TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                await asyncio.wait((control.greeted, connection.closed), return_when=asyncio.FIRST_COMPLETED)
        if not control.greeted.done():
            raise LinkError(_ending(connection) or f"relay {self.target.name} said no hello")

    async def _stay(self, standing: Dialled) -> Dialled | None:
        """Keep a connection until it ends (None) or another one has taken its place."""
        connection = standing.connection
        other: _Other | None = None
        pulse = Pulse(time.monotonic())
        # Not two at once: a flow that is being opened finds its session gone at each.
        self._renew_at = time.monotonic() + random.uniform(1.0, 2.0) * RENEW_RETRY_SECONDS_MIN
        try:
            while not connection.closed.done():
                left = self._beat(connection, pulse, time.monotonic())
                if other is None:
                    other = self._look_for_another(standing, pulse)
                waited: set[asyncio.Future[Any]] = {connection.closed}
                if other is not None:
                    waited.add(other.dialling)
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if other is not None and other.dialling.done():
                    newer = self._has_come(other, connection.identity)
                    if newer is not None:
                        return newer
                    other = None
            if other is not None and other.dialling.done():
                return self._has_come(other, connection.identity)
            return None if other is None or other.only is not None else await other.dialling
        finally:
            if self._control is standing.control:
                self.lost_by = _judgement(connection)
                self._lose(_ending(connection) or "closed by us")
                standing.close("")
            else:
                standing.close(RENEWED)
            if other is not None and not other.dialling.done():
                other.dialling.cancel()
                await asyncio.wait((other.dialling,))
                if not other.dialling.cancelled():
                    other.dialling.exception()  # it failed as it was given up

    def _look_for_another(self, standing: Dialled, pulse: Pulse) -> _Other | None:
        """Begin to dial again if another connection would be better than the one that stands."""
        now = time.monotonic()
        if now >= self._renew_at and self._must_renew(standing):
            return _Other(asyncio.ensure_future(self._dial(standing.connection.identity)))
        only = self._transports.wanted(pulse.life, now)
        if only is None:
            return None

        def is_wanted() -> bool:
            return only is Transport.QUIC or pulse.life is not Life.UP

        return _Other(asyncio.ensure_future(self._dial(only=only, is_wanted=is_wanted)), only)

    def _has_come(self, other: _Other, relay: Identity) -> Dialled | None:
        """Return the connection that took the place of the one that stands, None when nothing came of it."""
        try:
            return other.dialling.result()
        except (LinkError, Refused) as error:
            if other.only is None:
                _log.warning("relay_not_renewed", relay=self.target.name, error=error)
                self._renew_at = time.monotonic() + _renew_pause(relay)
            else:
                _log.debug("relay_not_reached", relay=self.target.name, over=other.only, error=error)
                self._transports.failed(time.monotonic())
        return None

    def _beat(self, connection: AnyConnection, pulse: Pulse, now: float) -> float:
        """Look whether the relay lives, and return when to look again, in seconds. Raises LinkError when it is gone."""
        busy = self._is_busy(self)
        if pulse.step(connection.heard_at, now, busy=busy):
            connection.ping()
        if pulse.life is Life.GONE:
            connection.close(CLOSE_OK, "peer_gone")
            raise LinkError(f"silent for {GONE_SECONDS:g} s")
        self.life, self.rtt_s = pulse.life, connection.rtt_s
        self._on_pulse(self)
        return min(LOOK_SECONDS, max(0.0, pulse.next_timer(busy=busy) - time.monotonic()))

    def _must_renew(self, standing: Dialled) -> bool:
        """Say whether the connection proves one end with a certificate that is not, or not much longer, the one."""
        if not _same_leaf(self._credentials, standing.control.credentials):
            return True
        relay = standing.connection.identity
        return relay.not_after - wall_clock() < min(relay.lifetime * RENEW_PART, RENEW_LEFT_MAX)

    def greeted(self, control: Control) -> None:
        """Take the control stream into use, in place of the one before (called by the connection's handler)."""
        if self._control is not None:
            self.lost_by = Reason.PEER_GONE
            self.is_renewed = True
            self._lose(RENEWED)
            self.is_renewed = False
        self._control = control
        self._number, self._hosts, self.proven = control.number, control.hosts, control.credentials
        self.problem = None
        self.life, self.rtt_s = Life.UP, None
        self._on_connected(self)

    def received(self, control: Control, message: AnyMessage) -> None:
        """Pass a message on (called by the connection's handler)."""
        if control is not self._control:
            return  # of sessions that were given up with its connection
        self._on_message(self, self._confined(message) if isinstance(message, Offered | Opened) else message)

    def _confined(self, message: Offered | Opened) -> Offered | Opened:
        """Take out a forwarder that is neither on the relay's own host nor among those configured.

        And a connector's address on this very host or its links, which is nothing that a relay elsewhere knows of. A
        relay that was stolen must not be able to have us connect or send to any address it likes.
        """
        forwarder = message.forwarder
        if forwarder is not None and not self._is_forwarder(forwarder.address):
            self._refuse("forwarder_refused", forwarder.address)
            message = msgspec.structs.replace(message, forwarder=None)
        if isinstance(message, Opened) and message.link_address is not None:
            address = message.link_address
            if not is_usable((address.ip, address.port), allow_private=True) and not self._is_neighbour(
                address
            ):
                self._refuse("link_address_refused", address)
                message = msgspec.structs.replace(message, link_address=None)
        return message

    def _is_forwarder(self, address: Address) -> bool:
        return address.ip in self._hosts or address in self.target.forwarders

    def _is_neighbour(self, address: Address) -> bool:
        """Say whether it is on loopback, where the relay is too: a whole mesh on one machine."""
        return all(ip_address(each).is_loopback for each in (address.ip, *self._hosts))

    def _refuse(self, event: str, address: Address) -> None:
        refused(WHERE, Reason.UNTRUSTED)
        _log.warning(event, relay=self.target.name, address=address)

    def packet_received(self, control: Control, session: SessionId, packet: bytes) -> None:
        """Pass an IP packet of a v1 session on (called by the connection's handler)."""
        if self._on_packet is None or control is not self._control:
            dropped(WHERE, "unexpected_datagram")
        else:
            self._on_packet(self, session, packet)

    def _lose(self, reason: str) -> None:
        self._control = None
        self.problem = reason
        self._on_lost(self, reason)

    def _check(self, identity: Identity) -> None:
        require_relay(identity, self.target.name)

    def _failed(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning(
                "relay_unreachable", relay=self.target.name, address=self.target.address, error=problem
            )
        self.problem = problem


def _renew_pause(relay: Identity) -> float:
    left_s = (relay.not_after - wall_clock()).total_seconds()
    return random.uniform(0.5, 1.0) * min(
        RENEW_RETRY_SECONDS_MAX, max(RENEW_RETRY_SECONDS_MIN, left_s / RENEW_TRIES)
    )


def _same_leaf(one: Credentials, other: Credentials) -> bool:
    return one.identity.fingerprint == other.identity.fingerprint


def _judgement(connection: AnyConnection) -> Reason:
    """Return what the relay found wrong with our certificate, when that is why it closed the connection."""
    if connection.closed.done() and connection.refusal is None:
        code, phrase = connection.closed.result()
        for reason in (Reason.REVOKED, Reason.EXPIRED, Reason.UNTRUSTED):
            if (code, phrase) == (close_code(reason), str(reason)):
                return reason
    return Reason.PEER_GONE


def _ending(connection: AnyConnection) -> str | None:
    if not connection.closed.done():
        return None
    code, reason = connection.closed.result()
    return reason or f"the connection ended with code 0x{code:x}"


def _backoff(failures: int) -> float:
    longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2.0 ** min(failures, 8))
    return random.uniform(BACKOFF_SECONDS_MIN / 2, longest)
