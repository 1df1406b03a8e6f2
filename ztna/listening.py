"""Unix sockets to listen on, and what an operator is told when an address cannot be listened on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ztna.config import Endpoint
from ztna.errors import ConfigError, ZtnaError

UNIX_BACKLOG = 64
LOW_PORTS = "ports below 1024 take CAP_NET_BIND_SERVICE, or root"


def port_in_use_error(endpoint: Endpoint | tuple[str, int]) -> ZtnaError:
    """Return the error that names a port somebody else holds."""
    return ZtnaError(f"{endpoint_text(endpoint)} is taken by another process; stop it or choose another port")


def bind_error(endpoint: Endpoint | tuple[str, int], error: OSError) -> ZtnaError:
    """Return the error for a socket that could not be bound, in words for the operator."""
    if error.errno == errno.EADDRINUSE:
        return port_in_use_error(endpoint)
    # asyncio puts words of its own, with the address once more, in the place of the system's.
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
    told = f"cannot listen on {endpoint_text(endpoint)}: {why}"
    return ZtnaError(f"{told}; {LOW_PORTS}" if isinstance(error, PermissionError) else told)


def endpoint_text(endpoint: Endpoint | tuple[str, int]) -> str:
    """Return `host:port`."""
    return str(endpoint if isinstance(endpoint, Endpoint) else Endpoint(*endpoint))


@contextmanager
def unix_socket(path: Path, mode: int, key: str) -> Iterator[socket.socket]:
    """Listen at the path, where one that a dead daemon left is replaced. Raises ConfigError naming the key."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        try:
            _clear(path, key)
            mask = os.umask(0o777 & ~mode)
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.listen(UNIX_BACKLOG)
            inode = path.stat().st_ino
        except OSError as error:
            raise ConfigError(f"{key}: {path}: {error.strerror or error}") from None
        try:
            yield listener
        finally:
            with suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()


def _clear(path: Path, key: str) -> None:
    """Remove the socket of a daemon that is dead. Raises ConfigError when it lives, or it is no socket."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError(f"{key}: {path}: there is something else, which is not replaced")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"{key}: {path}: another daemon serves it")
