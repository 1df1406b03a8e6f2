"""Live peers follow the trust of the moment: the revoked and expired are ended, each once, and nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.certificates import Pki, Presented
from ztna import verdicts as verdicts_module
from ztna.errors import IdentityError, LinkError
from ztna.identity import Identity, Trust
from ztna.reasons import Reason
from ztna.revocation import Revocations
from ztna.verdicts import Verdicts

DEADLINE_SECONDS = 20.0


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


class Guests:
    """Peers that came in under one trust, and why each was ended."""

    def __init__(self, pki: Pki) -> None:
        self.pki = pki
        self.now = datetime.now(UTC)
        self.trust = Trust.from_pem(pki.ca_file.read_bytes())
        self.verdicts = Verdicts(self.trust, lambda: self.now)
        self.ended: list[tuple[str, Reason]] = []

    def enter(self, name: str, **more: object) -> tuple[Identity, Presented]:
        presented = self.pki.signed(dns=["agent.db.ztna"], cn=name, **more)
        identity = self.verdicts.verify(presented.der, "client")
        self.followed = self.verdicts.follow(identity, lambda error: self.ended.append((name, error.reason)))
        return identity, presented

    def crl(self, *revoked: Presented, days: float = 1) -> None:
        pem = self.pki.authority.crl(None, [each.chain[0] for each in revoked], days=days)
        self.verdicts.use(self.trust.with_revocations(Revocations.from_bytes(pem)))


async def until(found: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not found():
            await asyncio.sleep(0.01)


async def test_a_crl_ends_exactly_the_revoked(pki: Pki) -> None:
    guests = Guests(pki)
    identities = {name: guests.enter(name) for name in ("alice", "bob", "carol")}
    guests.crl(identities["bob"][1])
    await until(lambda: guests.ended)
    assert guests.ended == [("bob", Reason.REVOKED)]
    for name, (identity, _) in identities.items():
        if name == "bob":
            with pytest.raises(IdentityError, match="revoked"):
                guests.verdicts.require(identity)
        else:
            guests.verdicts.require(identity)
            guests.verdicts.require(identity)
    guests.crl(*(presented for _, presented in identities.values()))
    await until(lambda: len(guests.ended) == 3)
    assert [name for name, _ in guests.ended] == ["bob", "alice", "carol"], "each is told once"


async def test_expiry_ends_whoever_it_is_about(pki: Pki) -> None:
    guests = Guests(pki)
    guests.enter("brief", not_after=guests.now + timedelta(hours=1))
    lasting, _ = guests.enter("lasting")
    guests.now += timedelta(hours=1, seconds=1)
    await until(lambda: guests.ended)
    assert guests.ended == [("brief", Reason.EXPIRED)]
    guests.verdicts.require(lasting)
    guests.now += timedelta(days=2)
    with pytest.raises(IdentityError, match="expired"):
        guests.verdicts.require(lasting)


async def test_a_clock_that_was_wrong_bars_nobody_once_it_is_right(pki: Pki) -> None:
    guests = Guests(pki)
    identity, _ = guests.enter("alice")
    right = guests.now
    guests.now += timedelta(days=400)
    guests.verdicts.use(guests.trust)
    guests.verdicts.follow(identity, lambda error: guests.ended.append(("again", error.reason)))
    await until(lambda: len(guests.ended) == 2)
    with pytest.raises(IdentityError, match="expired"):
        guests.verdicts.require(identity)
    guests.now = right
    guests.verdicts.require(identity)


async def test_who_left_is_not_ended_and_forgotten(pki: Pki) -> None:
    guests = Guests(pki)
    guests.enter("stays")
    for number in range(10):
        guests.enter(f"leaves-{number}")
        guests.followed.forget()
        guests.followed.forget()
    await until(lambda: len(guests.verdicts._expiries) == 1)
    guests.now += timedelta(days=2)
    await until(lambda: guests.ended)
    assert guests.ended == [("stays", Reason.EXPIRED)]
    assert not guests.verdicts._followed
    await until(lambda: guests.verdicts._ticking is None)


async def test_thousands_are_judged_without_stopping_the_loop(pki: Pki) -> None:
    guests = Guests(pki)
    identity, presented = guests.enter("one")
    for _ in range(5_000):
        guests.verdicts.follow(identity, lambda error: guests.ended.append(("more", error.reason)))
    turns = 0
    guests.crl(presented)
    started = time.monotonic()
    while len(guests.ended) < 5_001:
        assert time.monotonic() - started < DEADLINE_SECONDS
        before = len(guests.ended)
        await asyncio.sleep(0)
        turns += 1
        assert len(guests.ended) - before <= 2 * verdicts_module.JUDGED_PER_TURN
    assert turns >= 5_000 / (2 * verdicts_module.JUDGED_PER_TURN)


async def test_one_that_cannot_be_ended_does_not_keep_the_others_in(pki: Pki) -> None:
    guests = Guests(pki)

    def fail(error: IdentityError) -> None:
        raise LinkError("it went at this moment")

    identity, presented = guests.enter("first")
    guests.verdicts.follow(identity, fail)
    _, last = guests.enter("last")
    guests.crl(presented, last)
    await until(lambda: len(guests.ended) == 2)


async def test_nor_does_an_error_that_nobody_foresaw(pki: Pki) -> None:
    guests = Guests(pki)
    unforeseen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unforeseen.append(context))

    def fail(error: IdentityError) -> None:
        raise RuntimeError

    identity, presented = guests.enter("first")
    brief, _ = guests.enter("brief", not_after=guests.now + timedelta(hours=1))
    guests.verdicts.follow(identity, fail)
    guests.verdicts.follow(brief, fail)
    _, last = guests.enter("last")
    guests.crl(presented, last)
    await until(lambda: len(guests.ended) == 2)
    guests.now += timedelta(hours=2)
    await until(lambda: len(guests.ended) == 3)
    guests.enter("later", not_after=guests.now + timedelta(hours=1))
    guests.now += timedelta(hours=2)
    await until(lambda: len(guests.ended) == 4)
    assert len(unforeseen) == 2


async def test_who_is_revoked_between_being_verified_and_being_followed_is_ended(pki: Pki) -> None:
    guests = Guests(pki)
    presented = pki.signed(dns=["agent.db.ztna"], cn="late")
    identity = guests.verdicts.verify(presented.der, "client")
    guests.crl(presented)
    guests.verdicts.follow(identity, lambda error: guests.ended.append(("late", error.reason)))
    assert guests.ended == [], "not before who follows knows of it"
    await until(lambda: guests.ended)
    assert guests.ended == [("late", Reason.REVOKED)]


async def test_the_owner_hears_of_each_who_was_refused(pki: Pki) -> None:
    guests = Guests(pki)
    heard: list[tuple[str, Reason]] = []
    guests.verdicts.on_refused = lambda identity, error: heard.append((identity.name, error.reason))
    _, bad = guests.enter("bad")
    guests.enter("good")
    guests.crl(bad)
    await until(lambda: heard)
    assert heard == guests.ended == [("bad", Reason.REVOKED)]


async def test_an_outdated_crl_keeps_new_peers_out_and_ends_nobody(pki: Pki) -> None:
    guests = Guests(pki)
    identity, presented = guests.enter("alice")
    assert not guests.verdicts.goes_by_crls and guests.verdicts.unknown(identity) is None
    guests.crl(days=0.5)
    assert guests.verdicts.goes_by_crls and guests.verdicts.unknown(identity) is None
    guests.verdicts.verify(presented.der, "client")
    guests.now += timedelta(hours=13)
    assert "out of date" in str(guests.verdicts.unknown(identity))
    with pytest.raises(IdentityError) as caught:
        guests.verdicts.verify(presented.der, "client")
    assert caught.value.reason is Reason.POLICY_UNKNOWN
    guests.verdicts.require(identity)
    guests.verdicts.use(guests.trust.with_revocations(Revocations(())))
    assert "no CRL of" in str(guests.verdicts.unknown(identity))
    await asyncio.sleep(0)
    assert guests.ended == []


async def test_verdicts_are_remembered_within_bounds(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts_module, "PROVEN_MAX", 2)
    guests = Guests(pki)
    for number in range(4):
        identity, _ = guests.enter(f"guest-{number}")
        guests.verdicts.require(identity)
    assert len(guests.verdicts._judged) <= 2
