"""What to make of an operator's wish about one service's address (design.md 4, `ztna/vip/wish/<service>`).

Pure, and only a judgement: dnsd.keeper turns it into a transaction that also writes the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec

from dnsd.services import Service
from ztna.leases import Holding, Lease, Wish

ANSWER_KEPT_SECONDS = 3600.0
"""How long an answered wish stays in KV when whoever asked has not removed it."""

Obstacle = Callable[[IPv4Address, bool], str | None]
"""(address, force) -> why the service cannot have it, None when it can."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the service; `holding` is that of its lease, and agrees with it.

    `resting` are the addresses it had before, `service` is None when the catalog does not list it.
    """

    service: Service | None
    lease: Lease | None
    holding: Holding | None
    resting: tuple[IPv4Address, ...]
    obstacle: Obstacle


class Refuse(msgspec.Struct, frozen=True):
    """Change nothing; `what` says why."""

    what: str


class Leave(msgspec.Struct, frozen=True):
    """Change nothing, for all is as it was wished."""

    what: str


class SetPin(msgspec.Struct, frozen=True):
    """Pin the lease where it is, or end that."""

    pinned: bool


class Move(msgspec.Struct, frozen=True):
    """Lease another address: this one, or whichever is next when there is none."""

    ip: IPv4Address | None
    pinned: bool


class Release(msgspec.Struct, frozen=True):
    """Put the address to rest without waiting for the grace to end."""


class Forget(msgspec.Struct, frozen=True):
    """End the rest of these addresses: anybody may have them."""

    addresses: tuple[IPv4Address, ...]


Judgement = Refuse | Leave | SetPin | Move | Release | Forget


def judge(name: str, wish: Wish, facts: Facts) -> Judgement:
    """Return what to do about a wish. The service's records agree, else it is not asked yet."""
    if wish.kind == "release":
        return _release(name, wish, facts)
    lease, holding = facts.lease, facts.holding
    if lease is None or holding is None:
        return Refuse(f"{name} has no lease; register the service first")
    if wish.kind == "pin":
        return _pin(name, wish, lease, holding, facts)
    if wish.kind == "unpin":
        return SetPin(False) if holding.pinned else Leave(f"{name} is not pinned")
    return _move(name, wish, lease, holding, facts)


def _pin(name: str, wish: Wish, lease: Lease, holding: Holding, facts: Facts) -> Judgement:
    address = lease.ip if wish.ip is None else wish.ip
    if address == lease.ip:
        return Leave(f"{name} is pinned to {address} already") if holding.pinned else SetPin(True)
    obstacle = _asked_elsewhere(name, address, facts) or facts.obstacle(address, wish.force)
    return Refuse(obstacle) if obstacle else Move(address, pinned=True)


def _move(name: str, wish: Wish, lease: Lease, holding: Holding, facts: Facts) -> Judgement:
    if wish.ip == lease.ip:
        return Leave(f"{name} has {lease.ip} already")
    if holding.pinned and not wish.force:
        return Refuse(f"{name} is pinned to {lease.ip}; unpin it, or move it with --force")
    obstacle = _asked_elsewhere(name, wish.ip, facts)
    if obstacle is None and wish.ip is not None:
        obstacle = facts.obstacle(wish.ip, wish.force)
    return Refuse(obstacle) if obstacle else Move(wish.ip, pinned=holding.pinned)


def _release(name: str, wish: Wish, facts: Facts) -> Judgement:
    if facts.service is not None:
        return Refuse(f"{name} is registered and would get its address back; deregister it, or use move")
    if facts.lease is not None:
        if facts.holding is not None and facts.holding.pinned and not wish.force:
            return Refuse(f"{name} is pinned to {facts.lease.ip}; unpin it, or release it with --force")
        return Release()
    if not facts.resting:
        return Refuse(f"{name} has neither a lease nor an address that rests")
    if not wish.force:
        return Refuse(
            f"{name} has no lease, but its address {facts.resting[0]} rests, as programs may remember whose "
            "it was; --force frees it at once"
        )
    return Forget(facts.resting)


def _asked_elsewhere(name: str, address: IPv4Address | None, facts: Facts) -> str | None:
    asked = facts.service.virtual_ip if facts.service else None
    if asked is None or asked == address:
        return None
    return f"the definition of {name} asks for {asked}; change its virtual_ip instead"
