"""Asks a relay's admin port or socket, on this host. Knows nothing of what it answers."""

from __future__ import annotations

import http.client
import socket
from typing import TypeVar

from ztna.errors import ProtocolError, ZtnaError
from ztna.jsontypes import from_json

ANSWER_SECONDS = 5.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024

T = TypeVar("T")


def is_socket(admin: str) -> bool:
    """Say whether an admin address is the path of a unix socket."""
    return "/" in admin


def ask(admin: str, path: str, type_: type[T], *, method: str = "GET") -> tuple[int, T]:
    """Return the status and the JSON that `host:port`, or the socket at a path, answers. Raises ZtnaError."""
    connection = (
        _UnixConnection(admin)
        if is_socket(admin)
        else http.client.HTTPConnection(admin, timeout=ANSWER_SECONDS)
    )
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read(ANSWER_BYTES_MAX)
        if answer.status == 403:
            raise ZtnaError(f"relay at {admin}: {from_json(body, dict[str, str]).get('error', 'refused')}")
        return answer.status, from_json(body, type_)
    except (OSError, ValueError, http.client.HTTPException, ProtocolError) as error:
        raise ZtnaError(f"relay at {admin}: {error}") from None
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(self._path)
