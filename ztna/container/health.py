"""The image's HEALTHCHECK: asks the daemon of this container whether it is ready, and says what it awaits.

A script of the standard library alone, as it runs every few seconds: no curl, no imports worth naming. The daemon is
found at the default admin ports; `READY_AT` (`host:port`, or with a path) names another place.
"""

from __future__ import annotations

import os
import socket
import sys

ADMIN_PORTS = (9431, 9432, 9433, 9434)
"""Of relay, dnsd, connector and agent, as ztna.config has them."""
ANSWER_SECONDS = 2.0
ANSWER_BYTES_MAX = 64 * 1024
READY = b"200"


def main() -> int:
    """Return 0 when the daemon is ready, 1 when it is not or nobody answers."""
    told = os.environ.get("READY_AT")
    for place in [told] if told else [f"127.0.0.1:{port}" for port in ADMIN_PORTS]:
        address, _, path = place.partition("/")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            print(f"READY_AT: expected host:port or host:port/path, got {place!r}")
            return 1
        try:
            status, body = _ask(host.strip("[]"), int(port), path or "readyz")
        except ConnectionRefusedError:
            continue
        except OSError as error:
            print(f"{place}: {error}")
            return 1
        print(body.decode(errors="replace"))
        return 0 if status == READY else 1
    print("no daemon answers at " + (told or "the default admin ports; READY_AT names another place"))
    return 1


def _ask(host: str, port: int, path: str) -> tuple[bytes, bytes]:
    """Return the status and the body of an answer by HTTP/1.0, which ends when its connection does (RFC 1945)."""
    with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
        connection.sendall(f"GET /{path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while len(answer) < ANSWER_BYTES_MAX and (part := connection.recv(ANSWER_BYTES_MAX)):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b" ", 2)[1] if b" " in head else b"", body


if __name__ == "__main__":
    sys.exit(main())
