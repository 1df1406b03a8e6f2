"""What an operator is told when an address cannot be listened on."""

from __future__ import annotations

import errno

from ztna.config import Endpoint
from ztna.errors import ZtnaError


def port_in_use_error(endpoint: Endpoint | tuple[str, int]) -> ZtnaError:
    """Return the error that names a port somebody else holds."""
    return ZtnaError(f"{endpoint_text(endpoint)} is taken by another process; stop it or choose another port")


def bind_error(endpoint: Endpoint | tuple[str, int], error: OSError) -> ZtnaError:
    """Return the error for a socket that could not be bound, in words for the operator."""
    if error.errno == errno.EADDRINUSE:
        return port_in_use_error(endpoint)
    return ZtnaError(f"cannot listen on {endpoint_text(endpoint)}: {error.strerror or error}")


def endpoint_text(endpoint: Endpoint | tuple[str, int]) -> str:
    """Return `host:port`."""
    return str(endpoint if isinstance(endpoint, Endpoint) else Endpoint(*endpoint))
