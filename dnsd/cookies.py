"""DNS cookies (RFC 7873) as RFC 9018 lays them out: who shows one is where it says it is.

Pure: the secret and the time are passed in. A server cookie is

    version 1 | reserved 3 | Unix time 4 | hash 8     (bytes)

with a keyed BLAKE2s over the client's cookie, the first eight bytes and the client's address; RFC 9018's SipHash
matters only to servers that share their secret with other makes.
"""

from __future__ import annotations

import hashlib
import struct

CLIENT_COOKIE_BYTES = 8
COOKIE_BYTES = 24
"""Of the client's cookie and ours."""
SERVER_COOKIE_BYTES_MIN = 8
SERVER_COOKIE_BYTES_MAX = 32
SECRET_BYTES = 32
LIFETIME_SECONDS = 3600
AHEAD_SECONDS_MAX = 300
"""How far in our future a cookie may have been made, as another of our servers has another clock (RFC 9018 4.3)."""

_VERSION = 1
_HEAD = struct.Struct("!B3xI")
_HASH_BYTES = 8


def is_well_formed(option: bytes) -> bool:
    """Say whether an option has one of the lengths that RFC 7873 4 allows."""
    server = len(option) - CLIENT_COOKIE_BYTES
    return server == 0 or SERVER_COOKIE_BYTES_MIN <= server <= SERVER_COOKIE_BYTES_MAX


def cookie(secret: bytes, option: bytes, address: bytes, now: int) -> bytes:
    """Return the option to answer with: the client's own cookie, and ours for it at Unix time `now`."""
    client = option[:CLIENT_COOKIE_BYTES]
    head = _HEAD.pack(_VERSION, now & 0xFFFFFFFF)
    return client + head + _hash(secret, client, head, address)


def is_valid(secret: bytes, option: bytes, address: bytes, now: int) -> bool:
    """Say whether the option has a server cookie that we gave this client at this address not long ago."""
    client = option[:CLIENT_COOKIE_BYTES]
    head = option[CLIENT_COOKIE_BYTES : CLIENT_COOKIE_BYTES + _HEAD.size]
    if len(option) != CLIENT_COOKIE_BYTES + _HEAD.size + _HASH_BYTES or head[:4] != b"\1\0\0\0":
        return False
    age = (now - _HEAD.unpack(head)[1] + 0x80000000) % 0x100000000 - 0x80000000
    is_of_now = -AHEAD_SECONDS_MAX <= age <= LIFETIME_SECONDS
    return is_of_now and option[CLIENT_COOKIE_BYTES + _HEAD.size :] == _hash(secret, client, head, address)


def _hash(secret: bytes, client: bytes, head: bytes, address: bytes) -> bytes:
    return hashlib.blake2s(client + head + address, digest_size=_HASH_BYTES, key=secret).digest()
