"""Whole IP packets to local programs over raw sockets: replies from virtual ports that no socket is bound to.

Needs CAP_NET_RAW. Makes no packet itself.
"""

from __future__ import annotations

import contextlib
import socket

from sidecar.agent.ruleset import MARK
from ztna.telemetry import dropped

_WHERE = "agent_raw"


class RawSockets:
    """One raw socket for each IP version."""

    def __init__(self) -> None:
        """Raises PermissionError without the capability."""
        self._sockets = {4: _raw(socket.AF_INET)}
        try:
            self._sockets[6] = _raw(socket.AF_INET6)
        except PermissionError:
            raise
        except OSError:
            pass  # a host without IPv6 has nobody to tell over it

    def write(self, packet: bytes) -> None:
        """Send a packet to the local address in it; what the kernel refuses is dropped and counted."""
        version = packet[0] >> 4
        sock = self._sockets.get(version)
        destination = (
            socket.inet_ntop(socket.AF_INET, packet[16:20])
            if version == 4
            else socket.inet_ntop(socket.AF_INET6, packet[24:40])
        )
        try:
            if sock is not None:
                sock.sendto(packet, (destination, 0))
        except OSError:
            dropped(_WHERE, "kernel_refused")

    def close(self) -> None:
        """Close both."""
        for sock in self._sockets.values():
            sock.close()


def _raw(family: socket.AddressFamily) -> socket.socket:
    """Open one that takes packets with their header: IPPROTO_RAW implies that (raw(7))."""
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    sock.setblocking(False)
    with contextlib.suppress(PermissionError):  # no CAP_NET_ADMIN, so no rules of ours either that ask for it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    return sock
