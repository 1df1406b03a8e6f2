"""The control connections of one sidecar to all its relays: those of its configuration, and those that DNS names.

Makes and ends sidecar.link.control's clients. Which relay is used for what is the owner's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from sidecar.link.control import RelayClient
from sidecar.link.discovery import follow_relays
from sidecar.link.transports import Transport
from ztna.config import Endpoint, RelayTarget
from ztna.credentials import Credentials
from ztna.errors import ConfigError
from ztna.names import Zone
from ztna.resolver import Resolver
from ztna.telemetry import logger
from ztna.udp import SockAddr
from ztna.wire.control import Address, AnyMessage

RESOLVER_SECONDS = 3.0
LEAVE_SECONDS = 30.0
"""How long a relay that DNS names no longer is kept, for what rides it to go elsewhere."""

_log = logger(__name__)


class RelayClients:
    """All relays of one sidecar, by label: a relay's name, and its address too where several share a name.

    `left(client)` is called when a relay is to be used no more, `back(client)` when it may be after all, and
    `gone(label)` when it is forgotten, its connection lost.
    """

    def __init__(
        self,
        make: Callable[[RelayTarget], RelayClient],
        *,
        tasks: asyncio.TaskGroup,
        left: Callable[[RelayClient], None] = lambda client: None,
        back: Callable[[RelayClient], None] = lambda client: None,
        gone: Callable[[str], None] = lambda label: None,
    ) -> None:
        self._make = make
        self._tasks = tasks
        self._left, self._back, self._gone = left, back, gone
        self._clients: dict[str, RelayClient] = {}
        self._labels: dict[RelayClient, str] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._found: dict[RelayTarget, str] = {}

    def __iter__(self) -> Iterator[RelayClient]:
        return iter(tuple(self._clients.values()))

    def send(self, label: str, message: AnyMessage) -> bool:
        """Send a message to a relay; False when it is not connected, or forgotten by now."""
        client = self._clients.get(label)
        return client is not None and client.send(message)

    def label(self, client: RelayClient) -> str:
        """Return a client's label."""
        return self._labels[client]

    @property
    def connected(self) -> bool:
        """Whether any of them is."""
        return any(client.connected for client in self)

    def add(self, targets: Sequence[RelayTarget]) -> None:
        """Add the relays of a configuration. Raises ConfigError for one that is listed twice."""
        names = [target.name for target in targets]
        for target in targets:
            label = target.name if names.count(target.name) == 1 else f"{target.name}@{target.address}"
            if label in self._clients:
                raise ConfigError(f"relays: {label} is listed twice")
            self._add(label, target)

    def start(self, resolvers: Sequence[Endpoint], domain: Zone) -> None:
        """Connect to all, and follow what DNS names where there are resolvers to ask."""
        for label in self._clients:
            self._run(label)
        if resolvers:
            resolver = Resolver(resolvers, RESOLVER_SECONDS)
            self._tasks.create_task(follow_relays(resolver, domain, self.found), name="relay discovery")

    def dial_at(self, label: str, forwarder: Address) -> SockAddr:
        """Return where to dial in for TCP flows of a relay's sessions."""
        client = self._clients.get(label)
        return (forwarder.ip, forwarder.port) if client is None else client.dial_at(forwarder)

    def is_udp_blocked(self, label: str) -> bool:
        """Say whether UDP does not reach a relay, as far as is known."""
        client = self._clients.get(label)
        return client is not None and client.transport is Transport.TLS

    def use_credentials(self, credentials: Credentials) -> None:
        """Have all prove themselves with these from now on."""
        for client in self:
            client.use_credentials(credentials)

    def proven(self, label: str) -> Credentials | None:
        """Return what was shown to a relay, None when it is forgotten."""
        client = self._clients.get(label)
        return None if client is None else client.proven

    def found(self, targets: Sequence[RelayTarget]) -> None:
        """Keep exactly these beside those of the configuration."""
        listed = {client.target for client in self} - self._found.keys()
        for target in targets:
            if target in listed:
                continue
            if target not in self._found:
                taken = target.name in self._clients
                label = self._found[target] = f"{target.name}@{target.address}" if taken else target.name
                _log.info("relay_found", relay=label, address=target.address)
                self._add(label, target)
                self._run(label)
            elif (timer := self._leaving.pop(self._found[target], None)) is not None:
                timer.cancel()
                self._back(self._clients[self._found[target]])
        for target, label in self._found.items():
            if target not in targets and label not in self._leaving:
                _log.info("relay_left", relay=label, address=target.address)
                loop = asyncio.get_running_loop()
                self._leaving[label] = loop.call_later(LEAVE_SECONDS, self._end, target, label)
                self._left(self._clients[label])

    def _add(self, label: str, target: RelayTarget) -> None:
        client = self._clients[label] = self._make(target)
        self._labels[client] = label

    def _run(self, label: str) -> None:
        task = self._tasks.create_task(self._clients[label].run(), name=f"relay {label}")
        self._running[label] = task

    def _end(self, target: RelayTarget, label: str) -> None:
        del self._leaving[label], self._found[target]
        task = self._running.pop(label)
        task.add_done_callback(lambda _: self._forget(label))
        task.cancel()

    def _forget(self, label: str) -> None:
        del self._labels[self._clients.pop(label)]
        self._gone(label)
