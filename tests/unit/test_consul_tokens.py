from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from consul import base

from ztna.config import ConsulConfig, ConsulLoginConfig
from ztna.consul import tokens
from ztna.consul.tokens import (
    LOGIN_RETRY_SECONDS,
    RENEW_AT_PART,
    SETTLE_SECONDS,
    FileToken,
    GivenToken,
    LoginToken,
    tokens_of,
)
from ztna.errors import ConfigError, ConsulForbidden, ConsulUnavailable


async def nobody(path: str, body: str, token: str | None) -> base.Response:
    raise AssertionError((path, body, token))


class Consul:
    """Takes logins and logouts, and has a clock; `answers` are what the next logins get instead of a token."""

    def __init__(self, life_s: int | None = 100) -> None:
        self.now = 1000.0
        self.posts: list[tuple[str, str | None]] = []
        self.bodies: list[Any] = []
        self.answers: list[tuple[int, str] | ConsulUnavailable] = []
        self.after_login: tuple[int, str] | ConsulUnavailable | None = None
        self._life_s = life_s

    async def post(self, path: str, body: str, token: str | None) -> base.Response:
        self.posts.append((path, token))
        await asyncio.sleep(0)
        if path == "/v1/acl/login":
            self.bodies.append(json.loads(body))
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, ConsulUnavailable):
                raise answer
            return response(*answer)
        if path == "/v1/acl/logout":
            return response(200, "true")
        if self.after_login is not None:
            self.answers = [self.after_login]
        made = {"SecretID": f"token-{len(self.posts)}", "CreateTime": "2026-11-30T13:19:30.693807429Z"}
        if self._life_s is not None:
            minute, second = divmod(19 * 60 + 30 + self._life_s, 60)
            made["ExpirationTime"] = f"2026-11-30T13:{minute:02}:{second:02}.693807429Z"
        return response(200, json.dumps(made))

    @property
    def logins(self) -> int:
        return len(self.bodies)


def response(status: int, text: str) -> base.Response:
    return base.Response(status, {}, text, text.encode())


@pytest.fixture
def jwt(tmp_path: Path) -> Path:
    file = tmp_path / "nomad_consul.jwt"
    file.write_text("header.claims.signature\n")
    return file


def login(consul: Consul, jwt: Path) -> LoginToken:
    source = LoginToken(ConsulLoginConfig(method="nomad", jwt_file=str(jwt)), consul.post, lambda: consul.now)
    source.open()
    return source


async def test_what_was_given_stays() -> None:
    source = tokens_of(ConsulConfig(token="given", token_file="/none"), nobody)
    assert isinstance(source, GivenToken)
    source.open()
    assert await source.current() == "given"
    assert not await source.refused("given")
    await source.close()
    assert await tokens_of(ConsulConfig(), nobody).current() is None


def test_a_login_beside_a_token_is_refused() -> None:
    both = ConsulLoginConfig(method="m", jwt_file="f")
    for config in (ConsulConfig(token="t", login=both), ConsulConfig(token_file="t", login=both)):
        with pytest.raises(ConfigError, match=r"^consul\.login: expected"):
            tokens_of(config, nobody)


async def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    source = tokens_of(ConsulConfig(token_file=str(file)), nobody)
    assert isinstance(source, FileToken)
    source.open()
    assert (await source.current(), source.generation) == ("one", 1)
    fresh = tmp_path / "fresh"
    fresh.write_text("two")
    fresh.replace(file)
    assert (await source.current(), source.generation) == ("two", 2)
    file.write_text("two\n")
    assert (await source.current(), source.generation) == ("two", 2), "the same token is no other one"


async def test_a_file_that_is_being_rewritten_takes_no_token_away(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    source = FileToken(file)
    source.open()
    for spoil, said in ((lambda: file.write_text(""), "is empty"), (file.unlink, "cannot read")):
        spoil()
        assert await source.current() == "one"
        assert source.problem is not None and said in source.problem and "the token it had" in source.problem
    file.write_text("two")
    assert await source.current() == "two"
    assert source.problem is None


async def test_a_refused_token_of_a_file_is_looked_at_once_more(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    source = FileToken(file)
    source.open()
    assert not await source.refused("one")
    file.write_text("two")
    assert await source.refused("one")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"two words", "holds no token"), (b"\xff\xfe", "holds no token")],
    ids=["empty", "words", "binary"],
)
def test_a_file_without_a_token_is_refused_at_the_start(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"consul\.token_file: .*{said}"):
        FileToken(file).open()
    with pytest.raises(ConfigError, match=r"consul\.token_file: cannot read .*No such file"):
        FileToken(tmp_path / "none").open()
    with pytest.raises(ConfigError, match=r"consul\.login\.jwt_file: cannot read"):
        login(Consul(), tmp_path / "none")


async def test_it_logs_in_once_for_all_who_ask_and_out_at_the_end(jwt: Path) -> None:
    consul = Consul()
    source = login(consul, jwt)
    assert await asyncio.gather(*(source.current() for _ in range(5))) == ["token-1"] * 5
    assert consul.bodies == [{"AuthMethod": "nomad", "BearerToken": "header.claims.signature"}]
    await source.close()
    await source.close()
    assert consul.posts == [("/v1/acl/login", None), ("/v1/acl/logout", "token-1")]


async def test_it_is_renewed_before_it_ends_with_the_jwt_of_then(jwt: Path) -> None:
    consul = Consul(life_s=100)
    source = login(consul, jwt)
    assert await source.current() == "token-1"
    consul.now += 100 * RENEW_AT_PART - 1
    assert await source.current() == "token-1"
    jwt.write_text("another")
    consul.now += 1
    assert await source.current() == "token-2"
    assert consul.bodies[-1]["BearerToken"] == "another"
    assert source.generation == 2


async def test_one_without_an_end_is_kept(jwt: Path) -> None:
    consul = Consul(life_s=None)
    source = login(consul, jwt)
    await source.current()
    consul.now += 1e9
    assert await source.current() == "token-1"


async def test_a_renewal_that_fails_leaves_the_token_until_its_end(jwt: Path) -> None:
    consul = Consul(life_s=100)
    source = login(consul, jwt)
    await source.current()
    consul.answers = [(500, "token is expired (exp)")] * 2
    consul.now += 80
    assert await source.current() == "token-1"
    assert source.problem is not None and "token is expired" in source.problem and str(jwt) in source.problem
    assert await source.current() == "token-1"
    assert consul.logins == 2, "not at once again"
    consul.now += 20
    with pytest.raises(ConsulUnavailable, match="token is expired"):
        await source.current()
    consul.now += LOGIN_RETRY_SECONDS
    assert await source.current() == "token-4"
    assert source.problem is None


async def test_a_login_that_consul_refuses_says_what_it_needs(jwt: Path) -> None:
    consul = Consul()
    source = login(consul, jwt)
    consul.answers = [(403, "Permission denied"), ConsulUnavailable("nobody there"), (200, "no JSON")]
    for _ in range(2):
        with pytest.raises(ConsulForbidden, match=r"method nomad .*Permission denied.*binding rule"):
            await source.current()
    assert consul.logins == 1
    for said in ("nobody there", "unknown shape"):
        consul.now += LOGIN_RETRY_SECONDS
        with pytest.raises(ConsulUnavailable, match=said):
            await source.current()
    jwt.unlink()
    consul.now += LOGIN_RETRY_SECONDS
    with pytest.raises(ConsulUnavailable, match=r"no login to Consul: consul\.login\.jwt_file: cannot read"):
        await source.current()


async def test_a_revoked_token_is_replaced_but_a_fresh_one_given_time(jwt: Path) -> None:
    consul = Consul()
    source = login(consul, jwt)
    await source.current()
    with pytest.raises(ConsulUnavailable, match="yet"):
        await source.refused("token-1")
    consul.now += SETTLE_SECONDS
    assert await source.refused("token-1")
    assert await source.current() == "token-2"
    assert await source.refused("token-1"), "who asked by the old one asks by the new one"
    assert await source.current() == "token-2"


async def test_one_that_consul_knows_after_all_is_given_back_and_one_it_does_not_is_no_failure(
    jwt: Path,
) -> None:
    """A server that has just started has not read all that it stored."""
    consul = Consul()
    source = login(consul, jwt)
    token = await source.current()
    for answer in ((200, "true"), (403, "ACL not found"), ConsulUnavailable("away")):
        consul.now += SETTLE_SECONDS
        assert await source.refused(token)
        before = len(consul.posts)
        consul.answers = [(500, "no leader")]
        with pytest.raises(ConsulUnavailable, match="no leader"):
            await source.current()
        consul.now += LOGIN_RETRY_SECONDS
        consul.after_login = answer
        new = await source.current()
        assert consul.posts[before:] == [("/v1/acl/login", None)] * 2 + [("/v1/acl/logout", token)]
        assert new != token
        token = new


async def test_one_that_was_given_up_is_given_back_by_who_ends_before_the_next_login(jwt: Path) -> None:
    consul = Consul()
    source = login(consul, jwt)
    token = await source.current()
    consul.now += SETTLE_SECONDS
    assert await source.refused(token)
    consul.answers = [(500, "no leader")]
    with pytest.raises(ConsulUnavailable, match="no leader"):
        await source.current()
    await source.close()
    assert consul.posts[-1] == ("/v1/acl/logout", token)


async def test_a_token_is_given_back_without_holding_others_up_and_not_lost_with_who_asked(
    jwt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging: list[str | None] = []

    async def post(path: str, body: str, token: str | None) -> base.Response:
        if path == "/v1/acl/logout" and token == "token-1":
            hanging.append(token)
            await asyncio.Event().wait()
        return await consul.post(path, body, token)

    consul = Consul()
    source = LoginToken(ConsulLoginConfig(method="nomad", jwt_file=str(jwt)), post, lambda: consul.now)
    token = await source.current()
    consul.now += SETTLE_SECONDS
    assert await source.refused(token)
    monkeypatch.setattr(tokens, "LOGOUT_RETRY_SECONDS", 60)
    asking = asyncio.create_task(source.current())
    while not hanging:
        await asyncio.sleep(0)
    assert await source.current() == "token-2"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    monkeypatch.setattr(tokens, "LOGOUT_RETRY_SECONDS", 0.05)
    assert await source.current() == "token-2"
    assert hanging == [token, token]
    await source.close()
    assert consul.posts[-1] == ("/v1/acl/logout", "token-2")


@pytest.mark.parametrize(
    "answer",
    [(500, "no leader"), (429, "too many"), (403, "ACL not found"), ConsulUnavailable("away")],
    ids=["500", "429", "403", "away"],
)
async def test_who_cannot_log_out_goes_nevertheless(
    jwt: Path,
    answer: tuple[int, str] | ConsulUnavailable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "LOGOUT_SECONDS", 0.5)
    monkeypatch.setattr(tokens, "LOGOUT_RETRY_SECONDS", 0.02)
    consul = Consul()
    source = login(consul, jwt)
    await source.current()
    consul.answers = [answer] * 1000
    await source.close()
    tried = consul.posts[1:]
    assert set(tried) == {("/v1/acl/logout", "token-1")}
    assert (len(tried) == 1) == (answer == (403, "ACL not found")), "what Consul refuses is not asked again"


async def test_who_ends_while_consul_elects_a_leader_logs_out_once_it_has_one(
    jwt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LOGOUT_RETRY_SECONDS", 0.02)
    consul = Consul()
    source = login(consul, jwt)
    await source.current()
    consul.answers = [(500, "no leader"), ConsulUnavailable("away")]
    await source.close()
    assert consul.posts[1:] == [("/v1/acl/logout", "token-1")] * 3
    assert not consul.answers


async def test_a_consul_that_hangs_holds_no_end_up(jwt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LOGOUT_SECONDS", 0.1)

    async def post(path: str, body: str, token: str | None) -> base.Response:
        if path == "/v1/acl/logout":
            await asyncio.Event().wait()
        return await consul.post(path, body, token)

    consul = Consul()
    source = LoginToken(ConsulLoginConfig(method="nomad", jwt_file=str(jwt)), post, lambda: consul.now)
    await source.current()
    async with asyncio.timeout(5):
        await source.close()
