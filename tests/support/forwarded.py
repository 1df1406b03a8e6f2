"""One packet link's surroundings: a real forwarder, the binds of both sides, and good credentials for both ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from relay.forwarder import Forwarder
from sidecar.link.packet import PacketLink
from tests.support.certificates import Pki
from ztna.jsontypes import Binary, Secret
from ztna.names import ServiceName
from ztna.udp_bulk import BulkSocket
from ztna.wire.control import Address, ForwarderBind

DIAL_SECONDS = 10.0


class LinkGround:
    """`received` has what either of our ends got."""

    PROBE_KEY: ClassVar[Secret] = Secret(b"p" * 32)

    def __init__(self, directory: Path) -> None:
        self.pki = Pki(directory)
        self.forwarder = Forwarder(BulkSocket.open(("127.0.0.1", 0)))
        address = Address(*self.forwarder.address)
        self.agent_bind, self.connector_bind = (
            ForwarderBind(address, Binary(os.urandom(16)), Secret(os.urandom(32))) for _ in range(2)
        )
        self.forwarder.add_link(
            "link",
            (bytes(self.agent_bind.bind_id), self.agent_bind.bind_secret),
            (bytes(self.connector_bind.bind_id), self.connector_bind.bind_secret),
        )
        self.received: list[tuple[ServiceName, bytes]] = []
        self._links: list[PacketLink] = []

    def serve(self) -> PacketLink:
        """Be the connector."""
        link = PacketLink.serve(
            self.connector_bind,
            self.PROBE_KEY,
            self.pki.credentials(self.pki.connector()),
            admit=lambda identity: None,
            receive=self._received,
        )
        self._links.append(link)
        return link

    async def dial(self) -> PacketLink:
        """Be the agent."""
        link = await PacketLink.dial(
            self.agent_bind,
            self.PROBE_KEY,
            self.pki.credentials(self.pki.agent()),
            check=lambda identity: None,
            receive=self._received,
            timeout_s=DIAL_SECONDS,
        )
        self._links.append(link)
        return link

    def close(self) -> None:
        """End the links and the forwarder."""
        for link in self._links:
            link.close()
        self.forwarder.close()

    def _received(self, link: PacketLink, service: ServiceName, packet: bytes) -> None:
        self.received.append((service, packet))
