"""Which local user a program's socket belongs to, asked of the kernel (sock_diag(7)); no privilege is needed.

A socket whose program has closed it belongs to nobody. Decides nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import ip_address

from ztna.leases import Protocol
from ztna.udp import SockAddr

ANSWER_BYTES = 4096
TIMEOUT_SECONDS = 1.0

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
_REQUEST = struct.Struct("=BBBBI")
"""struct inet_diag_req_v2 before its socket: family, protocol, extensions, padding, states."""
_SOCKET = struct.Struct("=HH16s16sI8s")
"""struct inet_diag_sockid, but for its ports, which are big-endian: source and destination, interface, cookie."""
_ANSWER = struct.Struct("=4x48x5I")
"""struct inet_diag_msg: its last five are expires, receive queue, send queue, user and inode."""
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


class Owners:
    """Asks about sockets, one at a time."""

    def __init__(self) -> None:
        self._netlink = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )
        self._netlink.settimeout(TIMEOUT_SECONDS)
        self._sequence = 0

    def uid(self, protocol: Protocol, program: SockAddr, called: SockAddr) -> int | None:
        """Return the user of the socket at `program` that sends to `called`, None when there is none to be found."""
        try:
            # A program that speaks IPv4 on an IPv6 socket is found by IPv4 addresses too.
            return self._ask(protocol, program, called)
        except OSError:
            return None

    def close(self) -> None:
        """Ask no more."""
        self._netlink.close()

    def _ask(self, protocol: Protocol, program: SockAddr, called: SockAddr) -> int | None:
        self._sequence += 1
        here, there = ip_address(program[0]), ip_address(called[0])
        family = socket.AF_INET if here.version == 4 else socket.AF_INET6
        # For UDP the kernel looks up as if it had received: source and destination change places (net/ipv4/udp_diag.c).
        near, far = ((program[1], here), (called[1], there))
        if protocol == "udp":
            near, far = far, near
        body = _REQUEST.pack(family, _NUMBERS[protocol], 0, 0, _ALL_STATES) + _SOCKET.pack(
            socket.htons(near[0]), socket.htons(far[0]), near[1].packed, far[1].packed, 0, _NO_COOKIE
        )
        header = _HEADER.pack(
            _HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0
        )
        self._netlink.send(header + body)
        while True:
            answer = self._netlink.recv(ANSWER_BYTES)
            _length, kind, _flags, sequence, _port = _HEADER.unpack_from(answer)
            if sequence == self._sequence:
                break  # else the late answer to a question that was given up
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            raise OSError(number, errno.errorcode.get(number, "?"))
        *_, uid, inode = _ANSWER.unpack_from(answer, _HEADER.size)
        return uid if inode else None
