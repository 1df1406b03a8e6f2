"""A TUN device: IP packets of local programs as bytes, and whole packets back to them (tuntap.rst of the kernel).

It is the process's own: it, its addresses and its routes go when the process does, however that ends. What the packets
mean is sidecar.agent.tunnel's.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Callable

from pyroute2 import IPRoute, NetlinkError

from sidecar.link.network import OWN_DEVICES
from ztna.errors import ZtnaError
from ztna.telemetry import dropped, logger

DEVICE = "/dev/net/tun"
NAME_PATTERN = f"{OWN_DEVICES}%d".encode()
MTU = 1280
"""The least that IPv6 works with. With a service name of up to 24 characters such a packet still fits a DATAGRAM of
1306 bytes, the usual limit; what does not goes on a stream."""
PACKETS_PER_WAKEUP = 64
PACKET_BYTES_MAX = 65_535

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_IFREQ = struct.Struct("16sH22x")
_WHERE = "agent_tun"
_log = logger(__name__)


class Tun:
    """The device, up, with an MTU and without addresses. Made outside the loop's thread: netlink is waited for."""

    def __init__(self) -> None:
        """Make it. Raises ZtnaError saying what is missing."""
        try:
            self._fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ZtnaError(
                f"agent.mode: tun needs {DEVICE}: {error.strerror}; load the module tun, or give the "
                "container that device"
            ) from None
        try:
            made = fcntl.ioctl(self._fd, _TUNSETIFF, _IFREQ.pack(NAME_PATTERN, _IFF_TUN | _IFF_NO_PI))
            self.name = _IFREQ.unpack(made)[0].rstrip(b"\0").decode()
            with IPRoute() as netlink:
                (self.index,) = netlink.link_lookup(ifname=self.name)
                netlink.link("set", index=self.index, mtu=MTU, state="up")
        except (OSError, NetlinkError) as error:
            os.close(self._fd)
            number = error.code if isinstance(error, NetlinkError) else error.errno
            if number == errno.EPERM:
                raise ZtnaError(
                    "agent.mode: tun needs CAP_NET_ADMIN to make a device; grant it (root, or AmbientCapabilities=)"
                ) from None
            raise ZtnaError(f"agent.mode: tun: no device: {os.strerror(number or 0)}") from None
        self._reading: asyncio.AbstractEventLoop | None = None
        _log.info("tun_made", device=self.name)

    def start(self, receive: Callable[[bytes], None]) -> None:
        """Deliver packets on the running loop. `receive` must not raise."""
        self._reading = asyncio.get_running_loop()
        self._reading.add_reader(self._fd, self._readable, receive)

    def write(self, packet: bytes) -> None:
        """Give local programs a packet; what the kernel refuses is dropped and counted."""
        try:
            os.write(self._fd, packet)
        except OSError:
            dropped(_WHERE, "kernel_refused")

    def close(self) -> None:
        """Give the device back, and with it what belongs to it; harmless twice."""
        if self._fd >= 0:
            if self._reading is not None:
                self._reading.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self, receive: Callable[[bytes], None]) -> None:
        for _ in range(PACKETS_PER_WAKEUP):
            try:
                packet = os.read(self._fd, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            receive(packet)
            if self._fd < 0:
                return
