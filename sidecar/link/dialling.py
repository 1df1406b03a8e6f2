"""How a connection to a relay comes to be: over QUIC, or over TLS where nothing comes back by UDP.

Each from a socket of its own, and asks the resolver each time, so that a relay that moved is found. What is said on it
is sidecar.link.control's, which of the two to try sidecar.link.transports'.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sidecar.link.control_stream import WHERE, Control, Owner
from sidecar.link.patience import patience
from sidecar.link.pulse import PING_SECONDS
from sidecar.link.transports import Transport
from ztna.config import Endpoint, RelayTarget
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused
from ztna.identity import Identity
from ztna.quic import CLOSE_OK, HANDSHAKE_SECONDS, Client, Connection, Settings
from ztna.telemetry import refused
from ztna.tls_control import ALPN, TlsConnection
from ztna.tls_tcp import connect, secure
from ztna.udp import SockAddr, UdpSocket

UDP_PAYLOAD_BYTES = 1200
UDP_PAYLOAD_PROBED_BYTES = 1350
CONNECTOR_UDP_PAYLOAD_BYTES = 1360
CONNECT_SECONDS = 5.0
"""How long a relay may be silent amid a handshake: a busy one, to whom many come back at once, is waited for longer."""
PROBE_CONNECT_SECONDS = 2.0
"""The same while another connection stands."""
QUIC_GRACE_SECONDS = 1.0
"""How long QUIC is waited for when TLS was faster, and UDP is not blocked."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection on which nothing was said yet, with all that hangs on it."""

    connection: Connection | TlsConnection
    control: Control
    close: Callable[[str], None]
    """Closes it with a phrase, once and for all."""


class Dialler:
    """Connects to one relay. `check` raises Refused for one that is not the one meant."""

    def __init__(self, target: RelayTarget, owner: Owner, check: Callable[[Identity], None]) -> None:
        self._target = target
        self._owner = owner
        self._check = check

    async def dial(
        self, credentials: Credentials, *, only: Transport | None = None, head_start_s: float
    ) -> Dialled:
        """Connect by QUIC or, where nothing comes back for `head_start_s`, by TLS. Raises LinkError or Refused."""
        address, hosts = await _resolve(self._target.address)
        attempt = _Attempt(self._target, address, hosts, self._owner, self._check, credentials)
        if only is Transport.QUIC:
            return await attempt.quic(PROBE_CONNECT_SECONDS)
        if only is Transport.TLS:
            return await attempt.tls(PROBE_CONNECT_SECONDS)
        return await attempt.race(head_start_s)


class _Attempt:
    def __init__(
        self,
        target: RelayTarget,
        address: SockAddr,
        hosts: frozenset[str],
        owner: Owner,
        check: Callable[[Identity], None],
        credentials: Credentials,
    ) -> None:
        self._target = target
        self._address = address
        self._hosts = hosts
        self._owner = owner
        self._check = check
        self._credentials = credentials
        self._is_heard = False
        """Whether anything came from the relay by UDP, be it only a Retry."""

    async def race(self, head_start_s: float) -> Dialled:
        """Prefer QUIC; take TLS when only that gets through."""
        running: list[asyncio.Task[Dialled]] = []

        def begin(dialling: Coroutine[Any, Any, Dialled]) -> asyncio.Task[Dialled]:
            running.append(asyncio.ensure_future(dialling))
            return running[-1]

        try:
            quic = begin(self.quic(CONNECT_SECONDS))
            await self._alone(quic, head_start_s)
            if not quic.done():
                tls = begin(self.tls(CONNECT_SECONDS))
                await asyncio.wait((quic, tls), return_when=asyncio.FIRST_COMPLETED)
                if self._is_heard and not quic.done():
                    await asyncio.wait((quic,), timeout=QUIC_GRACE_SECONDS)
                if _has_come(tls) and not _has_come(quic):
                    running.remove(tls)
                    return tls.result()
            winner = await asyncio.shield(quic)
            running.remove(quic)
            return winner
        finally:
            await _give_up(running)

    async def _alone(self, quic: asyncio.Task[Dialled], seconds: float) -> None:
        try:
            async with patience(seconds):
                await asyncio.wait((quic,))
        except TimeoutError:
            if self._is_heard:
                # It is there and has much to do: a second handshake would not make that less.
                await asyncio.wait((quic,))

    async def quic(self, patience_s: float) -> Dialled:
        """Connect by QUIC. Raises LinkError or Refused."""
        address, credentials = self._address, self._credentials
        controls: list[Control] = []
        client: Client | None = None

        def received(packets: list[tuple[bytes, SockAddr]]) -> None:
            self._is_heard = self._is_heard or any(source == address for data, source in packets if data)
            if client is not None:
                client.packets_received(packets)

        def make(connection: Connection) -> Control:
            controls.append(self._control(connection))
            return controls[0]

        path = UdpSocket.open(("::" if ":" in address[0] else "0.0.0.0", 0), received)

        def close(reason: str) -> None:
            if client is not None:
                client.close(CLOSE_OK, reason)
            path.close()

        try:
            client = Client(
                path,
                address,
                f"relay.{self._target.name}.ztna",
                credentials,
                settings(credentials.identity),
                check=self._check,
                factory=make,
            )
            connection = await self._connect(client, patience_s)
        except BaseException:
            close("")
            raise
        return Dialled(connection, controls[0], close)

    async def _connect(self, client: Client, patience_s: float) -> Connection:
        try:
            async with patience(patience_s, lambda: client.connection and client.connection.heard_at):
                return await client.connect(HANDSHAKE_SECONDS)
        except TimeoutError:
            raise LinkError(f"relay {self._target.name} does not answer ({patience_s:g} s)") from None

    async def tls(self, patience_s: float) -> Dialled:
        """Connect by TLS to the TCP port of the same number. Raises LinkError or Refused."""
        sock = await connect(self._address, patience_s)
        stream = await secure(sock, self._credentials, ALPN, server_side=False, timeout_s=patience_s)
        try:
            self._check(stream.identity)
        except Refused as error:
            refused(WHERE, error.reason)
            stream.close()
            raise
        connection = TlsConnection(stream, WHERE)
        control = self._control(connection)
        connection.start(control)
        return Dialled(connection, control, lambda reason: connection.close(CLOSE_OK, reason))

    def _control(self, connection: Connection | TlsConnection) -> Control:
        return Control(self._owner, connection, next(_numbers), self._credentials, self._hosts)


async def _give_up(running: list[asyncio.Task[Dialled]]) -> None:
    """End what is not needed, be it connected by now."""
    for each in running:
        each.cancel()
    if running:
        await asyncio.wait(running)
    for each in running:
        if _has_come(each):
            each.result().close("")


def _has_come(dialling: asyncio.Task[Dialled]) -> bool:
    return dialling.done() and not dialling.cancelled() and dialling.exception() is None


def settings(identity: Identity) -> Settings:
    """Return how to speak to a relay. Source: protocol.md: 1360 bytes between relay and connector, less elsewhere.

    That much only once a probe of it was acknowledged, so that a narrow path takes the handshake.
    """
    return Settings(
        alpn=(ALPN,),
        udp_payload=UDP_PAYLOAD_BYTES,
        udp_payload_probe=CONNECTOR_UDP_PAYLOAD_BYTES if identity.connector else UDP_PAYLOAD_PROBED_BYTES,
        ping_interval_s=PING_SECONDS,
        where=WHERE,
    )


async def _resolve(endpoint: Endpoint) -> tuple[SockAddr, frozenset[str]]:
    """Return the first address, IPv4 preferred, and every host's. Raises LinkError when there is none."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise LinkError(f"{endpoint.host}: {error.strerror or error}") from None
    except UnicodeError as error:  # an empty label, or one of 64 characters
        raise LinkError(f"{endpoint.host}: {error}") from None
    if not found:
        raise LinkError(f"{endpoint.host} has no address")
    family_first = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    host, port = family_first[0][4][:2]
    return (str(host), int(port)), frozenset(str(entry[4][0]) for entry in found)
