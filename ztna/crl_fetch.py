"""Fetches a CRL from where its issuer publishes it: one bounded GET, or a file.

What is in it is ztna.revocation's, when to fetch ztna.renewal's. Plain http is as good as https: a CRL is signed,
ztna.revocation takes no older one, and whoever withholds it makes daemons refuse new sessions from its nextUpdate on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp

from ztna.credentials import CRL_BYTES_MAX
from ztna.crl_times import fresh_s
from ztna.errors import ConfigError, CrlUnavailable

FETCH_SECONDS = 10.0
REDIRECTS_MAX = 3
HTTP_OK, HTTP_NOT_MODIFIED = 200, 304


@dataclass(frozen=True, slots=True)
class Fetched:
    """An answer: the list, None when it is the one that was `known`, and for how long that is good, if it said so.

    `etag` and `modified` are what names this version to its server.
    """

    data: bytes | None
    good_s: float | None = None
    etag: str | None = None
    modified: str | None = None


def check_url(url: str) -> None:
    """Raise ConfigError unless a CRL can be fetched from such a URL."""
    parts = urlsplit(url)
    if not (parts.hostname if parts.scheme in ("http", "https") else parts.scheme == "file" and parts.path):
        raise ConfigError(f"tls.crl_url: {url}: expected http://, https:// or file:///")


async def fetch(url: str, known: Fetched | None = None) -> Fetched:
    """Return what is at the URL, unless the server says that it is still what is `known`. Raises CrlUnavailable."""
    found = await _fetched(url, known)
    if found.data is not None and not found.data:
        # To ztna.credentials nothing means not fetched yet: it must not take the place of a list.
        raise CrlUnavailable(f"{url}: nothing in it")
    return found


async def _fetched(url: str, known: Fetched | None) -> Fetched:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Fetched(await asyncio.to_thread(_read, Path(unquote(parts.path))))
    try:
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, headers=_unless(known), max_redirects=REDIRECTS_MAX) as response,
        ):
            good_s = fresh_s(response.headers, datetime.now(UTC))
            if response.status == HTTP_NOT_MODIFIED and known is not None:
                return Fetched(None, good_s, known.etag, known.modified)
            if response.status != HTTP_OK:
                raise CrlUnavailable(f"{url}: status {response.status}")
            data = await _bounded(response.content, url)
            return Fetched(data, good_s, response.headers.get("ETag"), response.headers.get("Last-Modified"))
    except TimeoutError:
        raise CrlUnavailable(f"{url}: no answer within {FETCH_SECONDS:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise CrlUnavailable(f"{url}: {str(error) or type(error).__name__}") from None


def _unless(known: Fetched | None) -> dict[str, str]:
    """Return the headers that ask for nothing when nothing has changed (RFC 9110 13.1)."""
    if known is None:
        return {}
    wanted = {"If-None-Match": known.etag, "If-Modified-Since": known.modified}
    return {name: value for name, value in wanted.items() if value is not None}


async def _bounded(content: aiohttp.StreamReader, url: str) -> bytes:
    found = bytearray()
    async for chunk in content.iter_any():
        found += chunk
        if len(found) > CRL_BYTES_MAX:
            raise CrlUnavailable(f"{url}: more than {CRL_BYTES_MAX} bytes")
    return bytes(found)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = file.read(CRL_BYTES_MAX + 1)
    except OSError as error:
        raise CrlUnavailable(f"{path}: {error.strerror}") from None
    if len(found) > CRL_BYTES_MAX:
        raise CrlUnavailable(f"{path}: more than {CRL_BYTES_MAX} bytes")
    return found
