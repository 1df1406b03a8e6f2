"""Asks a daemon's admin port or socket, on this host. Knows nothing of what it answers."""

from __future__ import annotations

import http.client
import socket
from typing import TypeVar

import msgspec

from ztna.errors import ProtocolError, ZtnaError
from ztna.jsontypes import from_json

ANSWER_SECONDS = 5.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024
STRANGER = "what answers there is no daemon of ours"

_EVERYWHERE = {"0.0.0.0:": "127.0.0.1:", "[::]:": "[::1]:"}

T = TypeVar("T")


class _Refusal(msgspec.Struct, frozen=True):
    error: str | None = None


def is_socket(admin: str) -> bool:
    """Say whether an admin address is the path of a unix socket: it has a slash, or no port."""
    return "/" in admin or ":" not in admin


def ask(
    admin: str,
    path: str,
    type_: type[T],
    *,
    method: str = "GET",
    body: bytes | None = None,
    seconds: float = ANSWER_SECONDS,
    who: str = "relay",
) -> tuple[int, T]:
    """Return the status and the JSON that `host:port`, or the socket at a path, answers. Raises ZtnaError."""
    try:
        status, answer = fetch(admin, path, method=method, body=body, seconds=seconds)
        refusal = _refusal(answer) if status >= 400 else None
        if refusal is None:
            return status, from_json(answer, type_)
    except ProtocolError as error:
        raise ZtnaError(f"{who} at {admin}: {STRANGER}, or of another version: {error}") from None
    except ZtnaError as error:
        raise ZtnaError(f"{who} at {admin}: {error}") from None
    raise ZtnaError(f"{who} at {admin}: {refusal}")


def fetch(
    admin: str,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    seconds: float = ANSWER_SECONDS,
) -> tuple[int, bytes]:
    """Return the status and the body. Raises ZtnaError that says why there is none, and what to look at."""
    connection = (
        _UnixConnection(admin, seconds)
        if is_socket(admin)
        else http.client.HTTPConnection(_dialled(admin), timeout=seconds)
    )
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read(ANSWER_BYTES_MAX)
    except OSError as error:
        raise ZtnaError(_why_not(error, seconds)) from None
    except (ValueError, http.client.HTTPException):
        raise ZtnaError(f"{STRANGER}: it speaks no HTTP") from None
    finally:
        connection.close()


def _why_not(error: OSError, seconds: float) -> str:
    match error:
        case ConnectionRefusedError() | FileNotFoundError():
            return f"{error.strerror}; does it run, and is this its address?"
        case PermissionError():
            return f"{error.strerror}; only who runs it may, or root"
        case TimeoutError():
            return f"no answer within {seconds:g} s"
    return error.strerror or str(error)


def _dialled(admin: str) -> str:
    """Return the address to call: who listens everywhere shows its state to who calls it by a loopback address."""
    for everywhere, here in _EVERYWHERE.items():
        if admin.startswith(everywhere):
            return here + admin.removeprefix(everywhere)
    return admin


def _refusal(body: bytes) -> str | None:
    """Return what an answer says is wrong, None when it says something else."""
    try:
        return from_json(body, _Refusal).error
    except ProtocolError:
        return None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
