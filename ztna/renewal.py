"""Keeps a daemon's credentials those of its files: certificate, key, CA and CRL are taken into use when they change.

Looks at the files every POLL_SECONDS (mtime, size, inode, through symlinks: renames and swapped directories count) and
on SIGHUP, fetches `crl_url`, and says what is broken, expiring or out of date. What cannot be used changes nothing.
Nobody is disconnected by a reload as such: whom the new CA or CRL does not let stay is ztna.verdicts' to end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from ztna.config import TlsConfig
from ztna.credentials import Credentials, read_ca, read_certificate, read_crl
from ztna.crl_fetch import Fetched, check_url, fetch
from ztna.crl_times import retry_s, wait_s
from ztna.errors import ConfigError, CrlUnavailable
from ztna.identity import Identity
from ztna.revocation import Revocations
from ztna.runtime import Readiness
from ztna.telemetry import (
    CERTIFICATE_EXPIRES,
    CERTIFICATE_EXPIRING,
    CREDENTIAL_RELOADS,
    CREDENTIALS_BROKEN,
    CRL_NEXT_UPDATE,
    logger,
)
from ztna.verdicts import wall_clock
from ztna.watching import POLL_SECONDS, Stamp, stamp, wait

SETTLE_LOOKS = 3
"""A certificate and its key are two files, written one after the other: only what is still broken then is told."""
EXPIRING_PART = 1 / 3
DAY_SECONDS = 86_400

_PARTS = ("ca", "certificate", "crl")

_log = logger(__name__)

Content = dict[str, Any]
"""Fields of a Material."""
Seen = tuple[Stamp, ...]


class Renewal:
    """`check` raises ConfigError for credentials that this daemon cannot be with; `accept` takes others into use."""

    def __init__(
        self,
        config: TlsConfig,
        credentials: Credentials,
        readiness: Readiness,
        *,
        check: Callable[[Credentials], None],
        accept: Callable[[Credentials], None],
    ) -> None:
        self.credentials = credentials
        self._config = config
        self._readiness = readiness
        self._check = check
        self._accept = accept
        self._broken: dict[str, str] = {}
        self._looks_broken = 0
        self._is_expiring = False
        self._fetched: bytes | None = None
        self._wake = asyncio.Event()
        self._fetch_now = False
        self._fetch_plan = asyncio.Event()
        """Set when the time of the next fetch may have changed."""
        # Older than the credentials: what changed since they were read is seen as a change.
        self._seen: Seen = ()
        if config.crl_url is not None:
            check_url(config.crl_url)
            readiness.awaiting("crl", f"{config.crl_url} is not fetched yet")
        self._tell_times()

    def reload(self) -> None:
        """Look at the files now, and fetch the CRL: SIGHUP."""
        self._looks_broken = SETTLE_LOOKS
        self._seen = ()
        self._wake.set()
        self._fetch_now = True
        self._fetch_plan.set()

    async def run(self) -> None:
        """Look, fetch and tell until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._config.crl_url is not None:
                tasks.create_task(self._keep_fetching(self._config.crl_url), name="fetch the CRL")
            while True:
                await self._look()
                self._tell_times()
                await wait(self._wake, POLL_SECONDS)
                self._wake.clear()

    def status(self) -> dict[str, object]:
        """Return what /status shows of the own certificate and the CRLs."""
        now, identity = wall_clock(), self.credentials.identity
        revocations = self.credentials.verdicts.trust.revocations
        return {
            "name": identity.name,
            "fingerprint": identity.fingerprint,
            "not_after": identity.not_after.isoformat(),
            "days_left": _days_left(identity.not_after, now),
            "expiring": self._is_expiring,
            "broken": dict(self._broken),
            "crls": [
                {
                    "issuer": each.issuer.rfc4514_string(),
                    "next_update": each.next_update.isoformat(),
                    "revoked": len(each.serials),
                }
                for each in (revocations.lists if revocations is not None else ())
            ],
        }

    async def _look(self) -> None:
        seen = _seen(self._config)
        if seen == self._seen and not (self._broken or self._looks_broken):
            return
        self._seen = seen
        # CRLs may be large and signatures cost: not in the loop.
        taken, broken = await asyncio.to_thread(
            _newest, self._config, self.credentials, self._fetched, self._check
        )
        self._use(taken)
        self._tell_broken(broken)

    def _use(self, fresh: Credentials) -> None:
        before, self.credentials = self.credentials, fresh
        if fresh.trust is not before.trust:
            before.verdicts.use(fresh.trust)
            self._fetch_plan.set()
        if fresh is not before:
            self._accept(fresh)
        for part in _PARTS:
            if getattr(fresh.material, part) != getattr(before.material, part):
                CREDENTIAL_RELOADS.labels(part).inc()
                _log.info("reloaded", what=part, name=fresh.identity.name)

    def _tell_broken(self, broken: dict[str, str]) -> None:
        self._looks_broken = self._looks_broken + 1 if broken else 0
        if broken and self._looks_broken < SETTLE_LOOKS:
            return
        for part in _PARTS:
            detail, before = broken.get(part), self._broken.get(part)
            CREDENTIALS_BROKEN.labels(part).set(detail is not None)
            if detail is not None and detail != before:
                _log.error("reload_failed", what=part, error=detail)
                self._readiness.warn(f"tls_{part}", f"{detail}; the one before it is in use")
            elif detail is None and before is not None:
                self._readiness.unwarn(f"tls_{part}")
        self._broken = broken

    # What time does.

    def _tell_times(self) -> None:
        now, identity = wall_clock(), self.credentials.identity
        CERTIFICATE_EXPIRES.set(identity.not_after.timestamp())
        self._tell_expiring(identity, now)
        self._tell_own_verdict(identity, now)
        revocations = self.credentials.verdicts.trust.revocations
        if revocations is not None:
            self._tell_crl(revocations, now)

    def _tell_expiring(self, identity: Identity, now: datetime) -> None:
        is_expiring = identity.not_after - now < identity.lifetime * EXPIRING_PART
        CERTIFICATE_EXPIRING.set(is_expiring)
        if is_expiring and not self._is_expiring:
            _log.warning("certificate_expiring", name=identity.name, not_after=identity.not_after.isoformat())
        if is_expiring:
            self._readiness.warn("certificate_expiring", f"{identity.name}: {identity.not_after.isoformat()}")
        elif self._is_expiring:
            self._readiness.unwarn("certificate_expiring")
        self._is_expiring = is_expiring

    def _tell_own_verdict(self, identity: Identity, now: datetime) -> None:
        """Be not ready with a certificate that no peer takes any more."""
        error = self.credentials.verdicts.trust.judge(identity, now)
        if error is not None:
            self._await("certificate", f"the own certificate does not stand: {error}")
        else:
            self._readiness.done("certificate")

    def _tell_crl(self, revocations: Revocations, now: datetime) -> None:
        next_update = revocations.next_update
        self._tell_own_issuer(next_update is not None)
        if next_update is None:
            return
        CRL_NEXT_UPDATE.set(next_update.timestamp())
        if next_update <= now:
            self._await("crl", f"a CRL is out of date since {next_update.isoformat()}: no new session begins")
        else:
            self._readiness.done("crl")

    def _tell_own_issuer(self, has_lists: bool) -> None:
        """Warn of lists among which the own issuer's is missing: most peers' issuer is that one, and none gets in."""
        unknown = self.credentials.verdicts.unknown(self.credentials.identity)
        if has_lists and unknown is not None:
            self._readiness.warn("crl_issuer", f"{unknown}: peers of this issuer begin no new session")
        else:
            self._readiness.unwarn("crl_issuer")

    def _await(self, name: str, detail: str) -> None:
        if self._readiness.report()["awaiting"].get(name) != detail:
            _log.error("not_ready", what=name, detail=detail)
            self._readiness.awaiting(name, detail)

    # The CRL that is fetched.

    async def _keep_fetching(self, url: str) -> None:
        failures, known = 0, None
        while True:
            try:
                # What cannot be used is fetched whole: it may have been spoilt on its way.
                known = await fetch(url, None if "crl" in self._broken else known)
                failures = 0
                self._readiness.unwarn("crl_url")
                if known.data is not None:
                    self._fetched = known.data
                    self._seen = ()
                    self._wake.set()
            except CrlUnavailable as error:
                failures += 1
                if failures == 1:
                    _log.warning("crl_not_fetched", url=url, error=error)
                self._readiness.warn("crl_url", str(error))
            await self._until_next_fetch(failures, known)

    async def _until_next_fetch(self, failures: int, known: Fetched | None) -> None:
        """Wait as long as the list that is in use by then says."""
        asked_at, chance = wall_clock(), random.random()
        while not self._fetch_now:
            longest_s, revocations = self._config.crl_refresh_s, self.credentials.verdicts.trust.revocations
            if failures or known is None:
                due_s = retry_s(longest_s, failures, chance)
            else:
                next_update = revocations.next_update if revocations is not None else None
                due_s = wait_s(longest_s, known.good_s, next_update, asked_at, chance)
            left_s = due_s - (wall_clock() - asked_at).total_seconds()
            if not 0 < left_s <= due_s:  # over, or somebody has set the clock back
                break
            await wait(self._fetch_plan, left_s)
            self._fetch_plan.clear()
        self._fetch_now = False


def _newest(
    config: TlsConfig, current: Credentials, fetched: bytes | None, check: Callable[[Credentials], None]
) -> tuple[Credentials, dict[str, str]]:
    """Return the newest credentials that can be used, and what is wrong with the parts that are not the newest.

    All parts together first, as a new certificate may need a new CA; else each that can be changed alone.
    """
    found, broken = _read(config, fetched)
    try:
        return _changed(config, current, found, check), broken
    except ConfigError:
        pass
    best = current
    for part, content in found.items():
        try:
            best = _changed(config, best, {part: content}, check)
        except ConfigError as error:
            broken[part] = str(error)
    return best, broken


def _read(config: TlsConfig, fetched: bytes | None) -> tuple[dict[str, Content], dict[str, str]]:
    """Return what the parts of the files hold, and what is wrong with those that cannot be read."""
    readers: dict[str, Callable[[], Content]] = {
        "ca": lambda: {"ca": read_ca(config)},
        "certificate": lambda: dict(zip(("certificate", "key"), read_certificate(config), strict=True)),
        "crl": lambda: {"crl": fetched if fetched is not None else read_crl(config)},
    }
    found: dict[str, Content] = {}
    broken: dict[str, str] = {}
    for part, read in readers.items():
        try:
            found[part] = read()
        except ConfigError as error:
            broken[part] = str(error)
    return found, broken


def _changed(
    config: TlsConfig, current: Credentials, found: dict[str, Content], check: Callable[[Credentials], None]
) -> Credentials:
    """Return the credentials with these parts in place of their own. Raises ConfigError."""
    changes: Content = {}
    for content in found.values():
        changes |= content
    material = replace(current.material, **changes)
    if material == current.material:
        return current
    if replace(material, crl=current.material.crl) == current.material:
        # Also when the own certificate has expired meanwhile: others' may be revoked all the same.
        return current.with_crl(config, material.crl)
    made = Credentials.of(config, material, verdicts=current.verdicts)
    check(made)
    return made


def _seen(config: TlsConfig) -> Seen:
    paths = (config.certificate, config.key, config.ca, config.crl_file)
    return tuple(stamp(path) for path in paths if path is not None)


def _days_left(until: datetime, now: datetime) -> float:
    return round((until - now).total_seconds() / DAY_SECONDS, 2)
