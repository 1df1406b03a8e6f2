"""Certificate, key, CA and CRL are taken up as their files change; what is broken changes nothing and is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.certificates import DAY, Pki
from ztna import crl_times
from ztna import renewal as renewal_module
from ztna.ca import replace_file
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import ConfigError, IdentityError
from ztna.reasons import Reason
from ztna.renewal import Renewal
from ztna.runtime import Readiness
from ztna.telemetry import CERTIFICATE_EXPIRING, CREDENTIALS_BROKEN, CRL_NEXT_UPDATE

DEADLINE_SECONDS = 20.0
DER = Encoding.DER


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal_module, "POLL_SECONDS", 0.02)


class Kept:
    """A daemon's credentials that are kept."""

    def __init__(self, config: TlsConfig) -> None:
        self.config = config
        self.readiness = Readiness()
        self.first = Credentials.load(config)
        self.accepted: list[Credentials] = []
        self.refuse: str | None = None
        self.renewal = Renewal(
            config, self.first, self.readiness, check=self._check, accept=self.accepted.append
        )

    @property
    def now(self) -> Credentials:
        return self.renewal.credentials

    @property
    def warnings(self) -> dict[str, str]:
        return dict(self.readiness.report()["warnings"])

    @property
    def awaiting(self) -> dict[str, str]:
        return dict(self.readiness.report()["awaiting"])

    def lets_in(self, config: TlsConfig) -> Reason | None:
        peer = Credentials.load(msgspec.structs.replace(config, crl_file=None))
        try:
            self.first.verdicts.verify([each.public_bytes(DER) for each in peer.chain], "client")
        except IdentityError as error:
            return error.reason
        return None

    def _check(self, credentials: Credentials) -> None:
        if self.refuse is not None:
            raise ConfigError(self.refuse)


@contextlib.asynccontextmanager
async def kept(config: TlsConfig) -> AsyncIterator[Kept]:
    made = Kept(config)
    task = asyncio.ensure_future(made.renewal.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(what: str, found: Callable[[], Any]) -> None:
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def take_over(target: TlsConfig, source: TlsConfig) -> None:
    """Put another certificate and its key in place, one after the other."""
    os.replace(source.certificate, target.certificate)
    os.replace(source.key, target.key)


async def test_a_new_certificate_and_key_are_taken_up_by_themselves(pki: Pki) -> None:
    config, other = pki.agent("agent-1"), pki.agent("agent-1", ["web"])
    expected = Credentials.load(other).identity.fingerprint
    async with kept(config) as daemon:
        take_over(config, other)
        await until("renewed", lambda: daemon.now.identity.fingerprint == expected)
        assert [each.identity.fingerprint for each in daemon.accepted] == [expected]
        assert daemon.accepted[0].verdicts is daemon.first.verdicts
        assert not daemon.warnings


async def test_swapped_directories_behind_symlinks_count(pki: Pki, tmp_path: Path) -> None:
    """As Kubernetes does it: the files stay symlinks, the directory behind `..data` is swapped."""
    mount = tmp_path / "mount"
    mount.mkdir()

    def version(name: str, config: TlsConfig) -> None:
        directory = mount / name
        directory.mkdir()
        for source, target in (
            (config.certificate, "tls.crt"),
            (config.key, "tls.key"),
            (config.ca, "ca.crt"),
        ):
            shutil.copy2(source, directory / target)
        (mount / "..new").symlink_to(name)
        os.replace(mount / "..new", mount / "..data")

    version("..v1", pki.agent("agent-1"))
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (mount / name).symlink_to(f"..data/{name}")
    config = TlsConfig(
        certificate=str(mount / "tls.crt"), key=str(mount / "tls.key"), ca=str(mount / "ca.crt")
    )
    async with kept(config) as daemon:
        version("..v2", pki.agent("agent-1"))
        await until("renewed", lambda: daemon.accepted)
        assert daemon.now.identity.fingerprint != daemon.first.identity.fingerprint
        assert not daemon.warnings


async def test_a_broken_file_keeps_the_one_before_and_is_said(pki: Pki) -> None:
    config = pki.with_crl(pki.agent())
    good = {path: Path(path).read_bytes() for path in (config.certificate, config.ca, str(config.crl_file))}
    async with kept(config) as daemon:
        for part, path in zip(("certificate", "ca", "crl"), good, strict=True):
            Path(path).write_bytes(b"half a fi")
            await until(f"{part} is told", lambda part=part: f"tls_{part}" in daemon.warnings)
            assert path in daemon.warnings[f"tls_{part}"] and "in use" in daemon.warnings[f"tls_{part}"]
            assert CREDENTIALS_BROKEN.labels(part)._value.get() == 1
            assert daemon.now.material == daemon.first.material
            assert daemon.renewal.status()["broken"].keys() == {part}  # type: ignore[attr-defined]
            Path(path).write_bytes(good[path])
            await until(f"{part} is mended", lambda: not daemon.warnings)
            assert CREDENTIALS_BROKEN.labels(part)._value.get() == 0
        Path(config.key).unlink()
        await until("the key is missed", lambda: "tls_certificate" in daemon.warnings)
        assert daemon.accepted == [] and daemon.lets_in(pki.agent("agent-2")) is None


async def test_a_broken_certificate_does_not_keep_a_crl_from_counting(pki: Pki) -> None:
    config, bad = pki.with_crl(pki.agent()), pki.agent("bad")
    async with kept(config) as daemon:
        assert daemon.lets_in(bad) is None
        Path(config.certificate).write_bytes(b"junk")
        pki.revoke(bad)
        await until("revoked", lambda: daemon.lets_in(bad) is Reason.REVOKED)
        await until("told", lambda: daemon.warnings)
        assert daemon.warnings.keys() == {"tls_certificate"}
        assert daemon.now.identity == daemon.first.identity


async def test_a_certificate_this_daemon_cannot_be_with_is_refused_and_a_ca_beside_it_taken(
    pki: Pki, tmp_path: Path
) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(pki.ca_file.read_bytes())
    config = msgspec.structs.replace(pki.agent(), ca=str(authorities))
    stranger = pki.write(*pki.rogue.issue("stranger", agent=["web"]))
    stranger = msgspec.structs.replace(stranger, ca=str(tmp_path / "rogue" / "ca.pem"))
    async with kept(config) as daemon:
        take_over(config, pki.agent("another"))
        await until("renewed", lambda: daemon.accepted)
        daemon.refuse = "carries no relay.edge.ztna"
        take_over(config, pki.agent("a-third"))
        await until("refused", lambda: "tls_certificate" in daemon.warnings)
        assert "relay.edge" in daemon.warnings["tls_certificate"] and len(daemon.accepted) == 1
        daemon.refuse = None
        take_over(config, pki.agent("a-fourth"))
        await until("taken", lambda: not daemon.warnings)
        assert daemon.lets_in(stranger) is Reason.UNTRUSTED
        replace_file(authorities, pki.authority.ca_pem + pki.rogue.ca_pem)
        await until("two roots", lambda: daemon.lets_in(stranger) is None)


async def test_two_roots_during_a_rotation_without_anybody_noticing(pki: Pki, tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(pki.authority.ca_pem)
    config = msgspec.structs.replace(pki.agent(), ca=str(authorities))
    renewed = pki.write(*pki.rogue.issue("agent-1", agent=["echo-service"]))
    async with kept(config) as daemon:
        gone: list[Reason] = []
        daemon.first.verdicts.follow(daemon.first.identity, lambda error: gone.append(error.reason))
        replace_file(authorities, pki.authority.ca_pem + pki.rogue.ca_pem)
        await until("both", lambda: daemon.now.material.ca.count(b"BEGIN") == 2)
        take_over(config, renewed)
        await until("of the new root", lambda: daemon.now.identity.path[-1] == pki.rogue.root)
        assert gone == []
        replace_file(authorities, pki.rogue.ca_pem)
        await until("the old root's leave", lambda: gone)
        assert gone == [Reason.UNTRUSTED] and not daemon.warnings


async def test_the_next_leaf_and_the_next_root_may_come_at_once(pki: Pki, tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(pki.authority.ca_pem)
    config = msgspec.structs.replace(pki.agent(), ca=str(authorities))
    renewed = pki.write(*pki.rogue.issue("agent-1", agent=["echo-service"]))
    async with kept(config) as daemon:
        replace_file(authorities, pki.rogue.ca_pem)
        await until("the root alone is refused", lambda: "tls_ca" in daemon.warnings)
        assert daemon.lets_in(pki.agent("agent-2")) is None
        take_over(config, renewed)
        await until("both are taken", lambda: daemon.now.material.ca == pki.rogue.ca_pem)
        await until("nothing is wrong", lambda: not daemon.warnings)


async def test_sighup_looks_at_once_and_says_what_is_wrong_at_once(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal_module, "POLL_SECONDS", 3600.0)
    config = pki.agent()
    async with kept(config) as daemon:
        await until("looked", lambda: daemon.renewal._seen)
        take_over(config, pki.agent("agent-1"))
        daemon.renewal.reload()
        await until("renewed", lambda: daemon.accepted)
        Path(config.certificate).write_bytes(b"junk")
        daemon.renewal.reload()
        await until("told", lambda: "tls_certificate" in daemon.warnings)


async def test_an_old_crl_makes_the_daemon_not_ready_until_there_is_another(pki: Pki) -> None:
    config = pki.agent()
    pki.revoke(until=datetime.now(UTC) - timedelta(seconds=2))
    async with kept(pki.with_crl(config)) as daemon:
        assert "out of date" in daemon.awaiting["crl"]
        assert daemon.lets_in(config) is Reason.POLICY_UNKNOWN
        pki.revoke()
        await until("ready again", lambda: "crl" not in daemon.awaiting)
        assert daemon.lets_in(config) is None
        assert CRL_NEXT_UPDATE._value.get() > datetime.now(UTC).timestamp()
        crls = daemon.renewal.status()["crls"]
        assert isinstance(crls, list) and crls[0]["revoked"] == 0


async def test_less_than_a_third_of_the_lifetime_is_told(pki: Pki) -> None:
    now = datetime.now(UTC)
    late = pki.signed(dns=["agent.db.ztna"], not_before=now - 3 * DAY, not_after=now + DAY)
    config = pki.write(late.chain_pem, late.key_pem)
    async with kept(config) as daemon:
        assert "certificate_expiring" in daemon.warnings and CERTIFICATE_EXPIRING._value.get() == 1
        status = daemon.renewal.status()
        assert status["expiring"] is True and status["days_left"] == 1.0
        take_over(config, pki.agent())
        await until("renewed", lambda: not daemon.warnings)
        assert CERTIFICATE_EXPIRING._value.get() == 0


async def test_ones_own_end_makes_the_daemon_not_ready(pki: Pki) -> None:
    config = pki.with_crl(pki.agent())
    async with kept(config) as daemon:
        assert "certificate" not in daemon.awaiting
        pki.revoke(config)
        await until("told", lambda: "revoked" in daemon.awaiting.get("certificate", ""))
        take_over(config, pki.agent())
        await until("ready again", lambda: "certificate" not in daemon.awaiting)


async def test_a_crl_is_fetched_and_fetched_again(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crl_times, "RETRY_SECONDS_MIN", 0.05)
    bad = pki.agent("bad")
    config = msgspec.structs.replace(pki.agent(), crl_url=f"file://{pki.crl_file}", crl_refresh_s=0.05)
    async with kept(config) as daemon:
        await until("told that there is none", lambda: "crl_url" in daemon.warnings)
        assert "not fetched" in daemon.awaiting["crl"]
        assert daemon.lets_in(bad) is Reason.POLICY_UNKNOWN
        pki.revoke()
        await until("there is one", lambda: daemon.lets_in(bad) is None)
        await until("ready", lambda: not daemon.awaiting and not daemon.warnings)
        pki.revoke(bad)
        await until("revoked", lambda: daemon.lets_in(bad) is Reason.REVOKED)
        pki.crl_file.write_bytes(b"<html>not a CRL</html>")
        await until("said", lambda: "tls_crl" in daemon.warnings)
        assert daemon.lets_in(bad) is Reason.REVOKED
        pki.crl_file.write_bytes(b"")
        await until("said", lambda: "nothing in it" in daemon.warnings.get("crl_url", ""))
        assert daemon.lets_in(bad) is Reason.REVOKED


async def test_a_crl_of_before_and_one_that_nobody_can_read_change_nothing(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crl_times, "RETRY_SECONDS_MIN", 0.05)
    bad = pki.agent("bad")
    earlier = pki.authority.crl(None, now=datetime.now(UTC) - timedelta(seconds=10))
    pki.crl_file.write_bytes(earlier)
    config = msgspec.structs.replace(pki.agent(), crl_url=f"file://{pki.crl_file}", crl_refresh_s=0.05)
    async with kept(config) as daemon:
        await until("ready", lambda: not daemon.awaiting)
        assert daemon.lets_in(bad) is None
        pki.revoke(bad)
        await until("revoked", lambda: daemon.lets_in(bad) is Reason.REVOKED)
        der = x509.load_pem_x509_crl(earlier).public_bytes(DER)
        pki.crl_file.write_bytes(der.replace(b"\x02\x01\x01", b"\x02\x01\x05", 1))
        await until("said", lambda: "version" in daemon.warnings.get("tls_crl", ""))
        replace_file(pki.crl_file, earlier)
        await until("taken", lambda: daemon.now.material.crl == earlier)
        assert daemon.lets_in(bad) is Reason.REVOKED


async def test_a_list_is_asked_for_before_it_is_out_of_date_and_once_when_it_has_not_changed(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crl_times, "FETCH_SECONDS_MIN", 0.05)
    asked: list[str | None] = []

    async def serve(request: web.Request) -> web.Response:
        data = pki.crl_file.read_bytes()
        tag = f'"{hash(data)}"'
        asked.append(request.headers.get("If-None-Match"))
        if asked[-1] == tag:
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=data, headers={"ETag": tag})

    app = web.Application()
    app.router.add_get("/crl", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    bad = pki.agent("bad")
    pki.revoke(until=datetime.now(UTC) + timedelta(seconds=3))
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/crl"
    config = msgspec.structs.replace(pki.agent(), crl_url=url, crl_refresh_s=86_400.0)
    async with kept(config) as daemon:
        await until("ready", lambda: not daemon.awaiting)
        # Once a day, said the configuration; but this list ends in seconds, and its successor is taken in time.
        await until("asked again", lambda: len(asked) >= 3)
        assert asked[0] is None and all(each is not None for each in asked[1:])
        assert not daemon.warnings and not daemon.awaiting
        pki.revoke(bad)
        await until("revoked", lambda: daemon.lets_in(bad) is Reason.REVOKED)
        assert "crl" not in daemon.awaiting
        pki.revoke(until=datetime.now(UTC) + timedelta(days=7))
        # SIGHUP asks at once.
        before = len(asked)
        daemon.renewal.reload()
        await until("asked", lambda: len(asked) > before)
    await runner.cleanup()


async def test_a_url_that_cannot_be_fetched_is_refused_at_the_start(pki: Pki) -> None:
    with pytest.raises(ConfigError, match="crl_url"):
        Kept(msgspec.structs.replace(pki.agent(), crl_url="ldap://x"))
    with pytest.raises(ConfigError, match="not both"):
        Kept(msgspec.structs.replace(pki.with_crl(pki.agent()), crl_url="http://x/crl"))
