"""The HTTP client given to python-consul2: one pooled aiohttp session with TLS, token, deadlines and retries.

It decides nothing about Consul's API beyond which requests may safely be sent twice; ztna.consul.client maps
its answers. python-consul2's own async client opens a session per request and drops the client certificate.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import tenacity
from consul import base
from yarl import URL

from ztna.config import ConsulConfig
from ztna.consul.tls import TlsFiles
from ztna.consul.tokens import tokens_of
from ztna.errors import ConfigError, ConsulError, ConsulRejected, ConsulUnavailable
from ztna.jsontypes import shortened
from ztna.telemetry import CONSUL_REQUESTS, CONSUL_SECONDS

POOL_CONNECTIONS = 32
POOL_KEEPALIVE_SECONDS = 60.0
RESPONSE_BYTES_MAX = 64 * 1024 * 1024
RETRY_ATTEMPTS = 3
RETRY_WAIT_SECONDS_MIN = 0.05
RETRY_WAIT_SECONDS_MAX = 1.0
BLOCKING_WAIT_JITTER = 16
"""Consul adds up to wait/16 to a blocking query so that watchers do not come back together."""

_ANSWERED, _REJECTED, _FAILED = map(CONSUL_REQUESTS.labels, ("answered", "rejected", "failed"))

T = TypeVar("T")
Params = Sequence[tuple[str, Any]] | Mapping[str, Any] | None
Callback = Callable[[base.Response], T]
Say = Callable[[str | None], None]

# Saying these twice changes nothing. Session creation, transactions and KV writes are not here: a lost answer
# there means "unknown", and the caller must read before it decides.
_REPEATABLE_PUT = re.compile(r"/v1/(?:agent/|session/renew/|session/destroy/)")

# Faults of the request that Consul answers with 500: asking again is useless. Seen on 1.8.7 and 1.19.2; with ACLs on,
# 1.8.7 says `Unknown check "..."` and `Unknown service {"..." {}}`, without "ID".
_NOT_THERE = re.compile(r"does not have associated TTL|Unknown (?:check|service)\b")
_OUR_FAULT = re.compile(r"invalid session|Invalid (?:Session TTL|Behavior)")


_TOKENLESS = "/v1/status/"
"""What Consul answers whoever asks."""

_KV = "/v1/kv/"


class NotThere(ConsulRejected):
    """What was to be changed does not exist."""


def base_url(address: str) -> str:
    """Return the address as `scheme://host:port`; ConfigError when it is none."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    wrong = ConfigError(f"consul.address: expected http://host:port or https://host:port, got {address!r}")
    try:
        port = parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise wrong
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or 8500}"


class Transport(base.HTTPClient):  # type: ignore[misc]
    """What `consul.base.Consul` calls: get, put, delete and post, each returning what the callback makes.

    Raises ConsulUnavailable when there is no answer in time or the connection breaks, and whatever the
    callback raises on an answer. The deadline covers all attempts of one call.
    """

    def __init__(self, config: ConsulConfig, say: Say | None = None) -> None:
        """`say` hears what is wrong with the token, and None when it is well again."""
        self.base_uri = base_url(config.address)
        self.tokens = tokens_of(config, self._post_once)
        self._say = say or (lambda _: None)
        self._token_problem: str | None = None
        self._unknown_at = 0.0
        self._timeout_s = config.timeout_s
        self._tls = TlsFiles(config) if self.base_uri.startswith("https:") else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transport:
        self.tokens.open()
        connector = aiohttp.TCPConnector(limit=POOL_CONNECTIONS, keepalive_timeout=POOL_KEEPALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=True
        )
        # aiohttp sends PUT and DELETE again by itself when a kept connection turns out to be closed. A lock
        # or a transaction must not run twice; what may be repeated is decided here.
        self._session._retry_connection = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self.tokens.close()
            await self._session.close()
            self._session = None

    async def get(
        self,
        callback: Callback[T],
        path: str,
        params: Params = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Read; sent again on a broken connection or a 5xx unless it blocks."""
        deadline_s, repeatable = self._timeout_s, True
        if wait_s := blocking_wait_s(params):
            deadline_s, repeatable = self._timeout_s + wait_s + wait_s / BLOCKING_WAIT_JITTER, False
        return await self._call(callback, "GET", path, params, headers, None, deadline_s, repeatable)

    async def put(
        self,
        callback: Callback[T],
        path: str,
        params: Params = None,
        data: str | bytes | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Write; sent again only where saying it twice changes nothing."""
        repeatable = _REPEATABLE_PUT.match(path) is not None
        return await self._call(callback, "PUT", path, params, headers, data, self._timeout_s, repeatable)

    async def delete(
        self,
        callback: Callback[T],
        path: str,
        params: Params = None,
        data: str | bytes | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Delete, once."""
        return await self._call(callback, "DELETE", path, params, headers, data, self._timeout_s, False)

    async def post(
        self,
        callback: Callback[T],
        path: str,
        params: Params = None,
        data: str | bytes | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Post, once."""
        return await self._call(callback, "POST", path, params, headers, data, self._timeout_s, False)

    async def _call(
        self,
        callback: Callback[T],
        method: str,
        path: str,
        params: Params,
        headers: Mapping[str, str] | None,
        data: str | bytes | None,
        deadline_s: float,
        repeatable: bool,
    ) -> T:
        url = URL(self.uri(path, params), encoded=True)
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ConsulUnavailable),
            stop=tenacity.stop_after_attempt(RETRY_ATTEMPTS if repeatable else 1),
            wait=tenacity.wait_random_exponential(
                multiplier=RETRY_WAIT_SECONDS_MIN, max=RETRY_WAIT_SECONDS_MAX
            ),
            reraise=True,
        )
        try:
            async with asyncio.timeout(deadline_s):
                return await attempts(self._once, callback, method, url, headers, data)
        except TimeoutError as error:
            _FAILED.inc()
            raise ConsulUnavailable(f"{method} {path}: no answer within {deadline_s:g} s") from error

    async def _once(
        self,
        callback: Callback[T],
        method: str,
        url: URL,
        headers: Mapping[str, str] | None,
        data: str | bytes | None,
    ) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answer = await self._with_token(method, url, headers, data)
            _check_server(answer)
            if _is_no_consul(method, url, answer):
                raise ConsulUnavailable(f"what answers at {self.base_uri} is no Consul: 404 at {url.path}")
        except ConsulRejected:
            _REJECTED.inc()
            raise
        except ConsulError:
            _FAILED.inc()
            raise
        (_REJECTED if _is_rejection(answer) else _ANSWERED).inc()
        if "index" not in url.query:
            CONSUL_SECONDS.observe(loop.time() - began)
        return callback(answer)

    async def _with_token(
        self, method: str, url: URL, headers: Mapping[str, str] | None, data: str | bytes | None
    ) -> base.Response:
        """Send, and once more when Consul does not know the token and there is another: then it did nothing."""
        loop = asyncio.get_running_loop()
        for is_last in (False, True):
            token, began = await self._token(), loop.time()
            answer = await self._send(method, url, headers, data, token)
            if not _is_unknown_token(answer):
                if not url.path.startswith(_TOKENLESS) and began >= self._unknown_at:
                    self._tell(self.tokens.problem)
                break
            self._unknown_at = loop.time()
            if is_last or not await self.tokens.refused(token):
                self._tell(f"Consul does not know the ACL token (ACL not found): {self.tokens.remedy}")
                break
        return answer

    async def _token(self) -> str | None:
        try:
            return await self.tokens.current()
        except ConsulError:
            self._tell(self.tokens.problem)
            raise

    def _tell(self, problem: str | None) -> None:
        if problem != self._token_problem:
            self._token_problem = problem
            self._say(problem)

    async def _post_once(self, path: str, body: str, token: str | None) -> base.Response:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send("POST", URL(self.uri(path, None), encoded=True), None, body, token)
        except TimeoutError as error:
            raise ConsulUnavailable(f"POST {path}: no answer within {self._timeout_s:g} s") from error

    async def _send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None,
        data: str | bytes | None,
        token: str | None,
    ) -> base.Response:
        if self._session is None:
            raise ConsulUnavailable("the Consul client is closed")
        sent = dict(headers or {})
        if token:
            sent["X-Consul-Token"] = token
        try:
            async with self._session.request(
                method,
                url,
                data=data or None,
                headers=sent,
                allow_redirects=False,
                # Kept connections belong to the context that they were made by.
                ssl=self._tls.current() if self._tls is not None else True,
            ) as response:
                body = await _bounded_body(response)
                return base.Response(
                    response.status, response.headers, body.decode("utf-8", errors="replace"), body
                )
        except (aiohttp.ClientError, OSError) as error:
            raise ConsulUnavailable(f"{method} {url.path} at {self.base_uri}: {_told(error)}") from error


def _told(error: aiohttp.ClientError | OSError) -> str:
    """Return what went wrong, without aiohttp's account of its own objects."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return f"cannot connect: {error.certificate_error}"
        case aiohttp.ClientConnectorError():
            return f"cannot connect: {_cause(error.os_error)}"
        case aiohttp.ClientResponseError():
            return "what answers there speaks no HTTP"
    return str(error) or type(error).__name__


def _cause(error: OSError) -> str:
    """Return the system's words, where asyncio has put an address in their place."""
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _is_no_consul(method: str, url: URL, answer: base.Response) -> bool:
    """Say whether something else answered: Consul has a status, and says with an index that a key is not there."""
    if method != "GET" or answer.code != 404:
        return False
    return url.path.startswith(_TOKENLESS) or (
        url.path.startswith(_KV) and "X-Consul-Index" not in answer.headers
    )


def _is_rejection(answer: base.Response) -> bool:
    """Say whether Consul said no: that nothing is there, or that somebody else wrote first, are answers like others."""
    return 400 <= answer.code < 500 and answer.code not in (404, 409)


def _is_unknown_token(answer: base.Response) -> bool:
    return answer.code == 403 and "ACL not found" in answer.body


def blocking_wait_s(params: Params) -> float:
    """Return the seconds a request asks Consul to hold it, 0.0 when it does not block."""
    given = dict(params or ())
    if not given.get("index"):
        return 0.0
    # Without `wait` Consul holds a query for five minutes.
    return float(str(given.get("wait", "300s")).removesuffix("s"))


def _check_server(answer: base.Response) -> None:
    """Raise for a 5xx or 429: worth asking again, except where Consul blames the request."""
    text = answer.body.strip()
    if answer.code != 429 and answer.code < 500:
        return
    if _NOT_THERE.search(text):
        raise NotThere(text)
    if _OUR_FAULT.search(text):
        raise ConsulRejected(f"Consul refused the request: {text}")
    raise ConsulUnavailable(f"Consul answered {answer.code}: {shortened(' '.join(text.split()))}")


async def _bounded_body(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > RESPONSE_BYTES_MAX:
            raise ConsulRejected(f"{response.url.path}: the answer is larger than {RESPONSE_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)
