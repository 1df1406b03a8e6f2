"""The ACL token that a client shows to Consul: one that was given, the content of a file, or that of a login.

A source says what the token is now, and what to do when Consul does not know it. Sends nothing itself: a login goes
by the `post` that it is given. Requests and their answers are ztna.consul.transport's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec
import tenacity
from consul import base

from ztna.config import ConsulConfig, ConsulLoginConfig
from ztna.errors import ConfigError, ConsulError, ConsulForbidden, ConsulUnavailable
from ztna.telemetry import logger
from ztna.watching import Stamp, stamp

TOKEN_BYTES_MAX = 16 * 1024
"""A JWT with many claims; an ACL token is 36 bytes."""
RENEW_AT_PART = 0.7
"""A login is renewed when so much of its token's life is over, so that there is time for it to fail for a while."""
LOGIN_RETRY_SECONDS = 1.0
LOGOUT_SECONDS = 3.0
"""So long a daemon that ends tries to log out: Consul may be electing a leader, or starting on the same host."""
LOGOUT_RETRY_SECONDS = 0.5
"""Between two tries of that, and how long a request waits while an earlier token is given back."""
SETTLE_SECONDS = 2.0
"""A server that did not create a token may not have heard of it for so long."""

Post = Callable[[str, str, str | None], Awaitable[base.Response]]
"""Posts a body to a path with a token, once, and returns the answer. Raises ConsulUnavailable when there is none."""

_log = logger(__name__)


class Tokens(Protocol):
    """Where the token comes from. `generation` rises with each other token, `problem` is for people."""

    generation: int
    problem: str | None
    remedy: str
    """What to do when Consul does not know the token."""

    def open(self) -> None:
        """Read what there is to read. Raises ConfigError when it cannot be."""

    async def current(self) -> str | None:
        """Return the token of now, None to show none. Raises ConsulError when there is none to be had."""

    async def refused(self, token: str | None) -> bool:
        """Hear that Consul does not know a token; return whether there is another one now."""

    async def close(self) -> None:
        """Give back what was obtained."""


def tokens_of(config: ConsulConfig, post: Post) -> Tokens:
    """Return the source that a configuration asks for. Raises ConfigError when it asks for two."""
    if config.login is not None:
        if config.token is not None or config.token_file is not None:
            raise ConfigError("consul.login: expected it or consul.token or consul.token_file, not both")
        return LoginToken(config.login, post)
    if config.token is None and config.token_file is not None:
        return FileToken(Path(config.token_file))
    return GivenToken(config.token)


class GivenToken:
    """The token of the configuration or the environment, or none."""

    def __init__(self, token: str | None) -> None:
        self.generation = 0
        self.problem: str | None = None
        self.remedy = "set consul.token to a valid one and restart; consul.token_file is followed without"
        self._token = token

    def open(self) -> None:
        """There is nothing to read."""

    async def current(self) -> str | None:
        """Return it."""
        return self._token

    async def refused(self, token: str | None) -> bool:
        """There is no other one."""
        return False

    async def close(self) -> None:
        """It is its owner's."""


class FileToken:
    """The content of a file, read again when it changes. One that is being rewritten takes no token away."""

    def __init__(self, path: Path) -> None:
        self.generation = 0
        self.problem: str | None = None
        self.remedy = f"write a valid one to {path}: it is taken up at once"
        self._path = path
        self._token: str | None = None
        self._seen: Stamp = None

    def open(self) -> None:
        """Read the token. Raises ConfigError."""
        self._read()

    async def current(self) -> str | None:
        """Return the token of the file as it is now; the last one while there is none in it."""
        try:
            self._read()
            self.problem = None
        except ConfigError as error:
            self.problem = f"{error}; the token it had is used"
        return self._token

    async def refused(self, token: str | None) -> bool:
        """Look once more, also where the file looks as it did."""
        self._seen = None
        return await self.current() != token

    async def close(self) -> None:
        """It is its owner's."""

    def _read(self) -> None:
        seen = stamp(self._path)
        if seen is not None and seen == self._seen:
            return
        token = read_secret("token_file", self._path)
        self._seen = seen
        if token != self._token:
            self._token = token
            self.generation += 1


class _LoggedIn(msgspec.Struct, frozen=True, rename="pascal"):
    """What Consul answers to a login."""

    secret_id: str = msgspec.field(name="SecretID")
    create_time: datetime
    expiration_time: datetime | None = None


class LoginToken:
    """The token of a login by a JWT, as Nomad gives its tasks one; obtained anew in time, and when it was revoked."""

    def __init__(
        self, config: ConsulLoginConfig, post: Post, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.generation = 0
        self.problem: str | None = None
        self.remedy = f"it is obtained anew with the JWT of {config.jwt_file}"
        self._method = config.method
        self._jwt_file = Path(config.jwt_file)
        self._post = post
        self._clock = clock
        self._lock = asyncio.Lock()
        self._token: str | None = None
        self._given_up: str | None = None
        self._made_at = self._renew_at = self._ends_at = 0.0
        self._failure: ConsulError | None = None
        self._retry_at = 0.0

    def open(self) -> None:
        """See that there is a JWT. Raises ConfigError."""
        read_secret("login.jwt_file", self._jwt_file)

    async def current(self) -> str:
        """Return the token, after a login where there is none or it is to be renewed."""
        if self._due:
            async with self._lock:
                if self._due:
                    await self._renew()
        if self._given_up is not None and self._token is not None:
            await self._give_back(self._given_up)
        if self._token is None or self._clock() >= self._ends_at:
            assert self._failure is not None
            raise self._failure
        return self._token

    async def refused(self, token: str | None) -> bool:
        """Give up a token that was revoked; a fresh one may only not be known everywhere yet."""
        if token != self._token:
            return True
        if self._clock() < self._made_at + SETTLE_SECONDS:
            raise ConsulUnavailable("Consul does not know the token of the login yet")
        self._token, self._given_up = None, token
        return True

    async def close(self) -> None:
        """Log out, within LOGOUT_SECONDS. A token that cannot be given back ends with its time."""
        held = [each for each in (self._token, self._given_up) if each is not None]
        self._token = self._given_up = None
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ConsulUnavailable),
            stop=tenacity.stop_before_delay(LOGOUT_SECONDS),
            wait=tenacity.wait_fixed(LOGOUT_RETRY_SECONDS),
            reraise=True,
        )
        try:
            async with asyncio.timeout(LOGOUT_SECONDS):
                for each in held:
                    await attempts(self._log_out, each)
        except ConsulError as error:
            _log.warning("not_logged_out", error=error)
        except TimeoutError:
            _log.warning("not_logged_out", error=f"Consul did not answer within {LOGOUT_SECONDS:g} s")

    @property
    def _due(self) -> bool:
        now = self._clock()
        return (self._token is None or now >= self._renew_at) and now >= self._retry_at

    async def _renew(self) -> None:
        try:
            login = await self._login()
        except ConsulError as error:
            self._failure, self.problem = error, str(error)
            self._retry_at = self._clock() + LOGIN_RETRY_SECONDS
            return
        now = self._clock()
        self._token, self._made_at = login.secret_id, now
        # Its life by Consul's clock, counted from now by ours: the two may differ.
        life_s = float("inf")
        if login.expiration_time is not None:
            life_s = (login.expiration_time - login.create_time).total_seconds()
        self._renew_at, self._ends_at = now + life_s * RENEW_AT_PART, now + life_s
        self._failure = self.problem = None
        self.generation += 1
        _log.info("logged_in", method=self._method, seconds=life_s)

    async def _give_back(self, token: str) -> None:
        """Log a token out that Consul did not know: a server that has just started may not know all that there are."""
        self._given_up = None
        try:
            async with asyncio.timeout(LOGOUT_RETRY_SECONDS):
                await self._log_out(token)
        except (ConsulError, TimeoutError) as error:
            _log.debug("not_given_back", error=error)
        except asyncio.CancelledError:
            self._given_up = token
            raise

    async def _log_out(self, token: str) -> None:
        """Give a token back. Raises ConsulError."""
        answer = await self._post("/v1/acl/logout", "", token)
        if answer.code != 200:
            kind = ConsulUnavailable if answer.code == 429 or answer.code >= 500 else ConsulForbidden
            raise kind(f"Consul answered {answer.code}: {answer.body.strip()}")

    async def _login(self) -> _LoggedIn:
        try:
            jwt = read_secret("login.jwt_file", self._jwt_file)
        except ConfigError as error:
            raise ConsulUnavailable(f"no login to Consul: {error}") from None
        answer = await self._post(
            "/v1/acl/login", json.dumps({"AuthMethod": self._method, "BearerToken": jwt}), None
        )
        if answer.code != 200:
            kind = ConsulForbidden if answer.code == 403 else ConsulUnavailable
            raise kind(
                f"Consul refused the login by auth method {self._method} with the JWT of {self._jwt_file} "
                f"({answer.code} {answer.body.strip()}): it needs a method of that name, a JWT that this takes "
                "and that has not expired, and a binding rule that matches"
            )
        try:
            return msgspec.json.decode(answer.content, type=_LoggedIn)
        except msgspec.DecodeError as error:
            raise ConsulUnavailable(f"Consul's answer to the login has an unknown shape: {error}") from None


def read_secret(key: str, path: Path) -> str:
    """Return the one line of a file. Raises ConfigError naming the key when there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(TOKEN_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"consul.{key}: cannot read {path}: {error.strerror}") from None
    text = data.decode("ascii", "replace").strip()
    if not text:
        raise ConfigError(f"consul.{key}: {path} is empty")
    if len(data) > TOKEN_BYTES_MAX or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"consul.{key}: {path} holds no token: expected one line of ASCII")
    return text
