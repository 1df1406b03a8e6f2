"""Fetches a CRL from where its issuer publishes it: one bounded GET, or a file.

What is in it is ztna.revocation's, when to fetch ztna.renewal's. Plain http is as good as https: a CRL is signed,
ztna.revocation takes no older one, and whoever withholds it makes daemons refuse new sessions from its nextUpdate on.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp

from ztna.credentials import CRL_BYTES_MAX
from ztna.errors import ConfigError, CrlUnavailable

FETCH_SECONDS = 10.0
REDIRECTS_MAX = 3


def check_url(url: str) -> None:
    """Raise ConfigError unless a CRL can be fetched from such a URL."""
    parts = urlsplit(url)
    if not (parts.hostname if parts.scheme in ("http", "https") else parts.scheme == "file" and parts.path):
        raise ConfigError(f"tls.crl_url: {url}: expected http://, https:// or file:///")


async def fetch(url: str) -> bytes:
    """Return the bytes at the URL. Raises CrlUnavailable."""
    found = await _fetched(url)
    if not found:
        # To ztna.credentials nothing means not fetched yet: it must not take the place of a list.
        raise CrlUnavailable(f"{url}: nothing in it")
    return found


async def _fetched(url: str) -> bytes:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return await asyncio.to_thread(_read, Path(unquote(parts.path)))
    try:
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, max_redirects=REDIRECTS_MAX) as response,
        ):
            if response.status != 200:
                raise CrlUnavailable(f"{url}: status {response.status}")
            return await _bounded(response.content, url)
    except TimeoutError:
        raise CrlUnavailable(f"{url}: no answer within {FETCH_SECONDS:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise CrlUnavailable(f"{url}: {str(error) or type(error).__name__}") from None


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
