"""`ztna leases`: look at the virtual addresses in Consul's KV, and ask the keeper to change them.

Writes wishes only (design.md 4): the elected keeper carries them out and answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.table import Table as Grid

from ztna import config as configuration
from ztna.cli import completing, conflicts
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.consul.watch import KvWatch
from ztna.errors import BadName, ConfigError, LeaseError, ProtocolError, ZtnaError
from ztna.jsontypes import from_json, to_json
from ztna.leases import (
    SCHEMA_KEY,
    SERVICE_PREFIX,
    VIP_PREFIX,
    Lease,
    Table,
    Wish,
    WishAnswer,
    WishKind,
    audit,
    read_table,
    wish_key,
)
from ztna.names import ServiceName

ANSWER_SECONDS = 15.0
"""How long the keeper has for an answer: as long as another takes to follow one that died."""
LOOK_SECONDS = 0.1

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")


@click.group()
def leases() -> None:
    """Look at the virtual addresses of services, and have the keeper change them."""


def _asking_consul(command: F) -> F:
    """Add the options that say which Consul, and how to print."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--consul", "address", metavar="URL", help="Consul's HTTP address."),
        click.option(
            "--config", "file", type=click.Path(path_type=Path), help="A file with a `consul` section."
        ),
    ):
        command = option(command)
    return command


@leases.command("list")
@_asking_consul
def list_(file: Path | None, address: str | None, as_json: bool) -> None:
    """List every lease, and the addresses that rest in quarantine."""
    table = _read(file, address)
    if as_json:
        click.echo(json.dumps(_as_json(table), indent=2))
        return
    grid = Grid("service", "address", "state", "ports", "since")
    for service, stored in sorted(table.leases.items()):
        held = table.holdings.get(stored.record.ip)
        ports = ", ".join(f"{port.protocol}:{port.port}" for port in stored.record.ports)
        since = _moment(held.record.leased_at) if held else ""
        state = "pinned" if held and held.record.pinned else "leased"
        grid.add_row(service, str(stored.record.ip), state, ports, since)
    for ip, holding in sorted(table.holdings.items()):
        if holding.record.state == "quarantined":
            released = _moment(holding.record.released_at or 0.0)
            grid.add_row(holding.record.service, str(ip), "quarantined", "", released)
    Console().print(grid)


@leases.command("audit")
@_asking_consul
def audit_(file: Path | None, address: str | None, as_json: bool) -> None:
    """Prove that each service has one address and no address two services; exit 1 when not."""
    table = _read(file, address)
    broken = audit(table)
    if as_json:
        report = {
            "ok": not broken,
            "leases": len(table.leases),
            "addresses": len(table.holdings),
            "broken": broken,
        }
        click.echo(json.dumps(report, indent=2))
    else:
        for line in broken:
            click.echo(line)
        verdict = f"{len(broken)} things are wrong" if broken else "nothing is wrong"
        click.echo(f"{len(table.leases)} leases, {len(table.holdings)} addresses: {verdict}")
    if broken:
        raise SystemExit(1)


@leases.command("conflicts")
@click.option(
    "--relay", "relays", multiple=True, metavar="HOST:PORT", help="A relay's admin address, to ask it too."
)
@_asking_consul
def conflicts_(file: Path | None, address: str | None, as_json: bool, relays: tuple[str, ...]) -> None:
    """Show which agents' hosts already use a network that virtual addresses are leased from."""
    told = _with_consul(file, address, conflicts.from_consul)
    try:
        for relay in relays:
            told += conflicts.from_relay(relay)
    except ZtnaError as error:
        raise click.ClickException(str(error)) from None
    found = conflicts.merged(told)
    if as_json:
        click.echo(to_json(found).decode())
    elif not found:
        click.echo("no agent reports a conflict")
    else:
        grid = Grid("agent", "pool", "collides with", "detail", "told by")
        for each in found:
            grid.add_row(each.agent, each.cidr, each.with_, each.detail, ", ".join(each.by))
        Console().print(grid)


@leases.command()
@click.argument("name", shell_complete=completing.services)
@_asking_consul
def show(name: str, file: Path | None, address: str | None, as_json: bool) -> None:
    """Show one service's lease, the addresses that rest for it, and its wish; exit 1 when it has none."""
    service = _service(name)
    table = _read(file, address)
    about = _about(table, service)
    if as_json:
        click.echo(json.dumps(about, indent=2))
    else:
        for line in _told(table, service):
            click.echo(line)
    if about["lease"] is None and not about["addresses"]:
        raise click.ClickException(f"{service} has neither a lease nor an address that rests")


def _wishing(command: F) -> F:
    """Add the options of a command that asks the keeper for a change."""
    for option in (
        click.option("--force", is_flag=True, help="Also where it may hurt."),
        _asking_consul,
    ):
        command = option(command)
    return command


@leases.command()
@click.argument("name", shell_complete=completing.services)
@click.argument("ip", required=False, metavar="[ADDRESS]")
@_wishing
def pin(
    name: str, ip: str | None, force: bool, file: Path | None, address: str | None, as_json: bool
) -> None:
    """Pin a service to its address, or move it to a free ADDRESS and pin it there.

    A pinned lease is kept however long the service is away. --force: take an address that still rests for
    another service.
    """
    _wish(name, "pin", ip, force, file, address, as_json)


@leases.command()
@click.argument("name", shell_complete=completing.services)
@_wishing
def unpin(name: str, force: bool, file: Path | None, address: str | None, as_json: bool) -> None:
    """Let a pinned lease end like any other."""
    _wish(name, "unpin", None, force, file, address, as_json)


@leases.command()
@click.argument("name", shell_complete=completing.services)
@_wishing
def release(name: str, force: bool, file: Path | None, address: str | None, as_json: bool) -> None:
    """Put the address of a service that is gone to rest at once.

    --force: also when it is pinned; and with no lease left, end the rest of its addresses.
    """
    _wish(name, "release", None, force, file, address, as_json)


@leases.command()
@click.argument("name", shell_complete=completing.services)
@click.argument("ip", required=False, metavar="[ADDRESS]")
@_wishing
def move(
    name: str, ip: str | None, force: bool, file: Path | None, address: str | None, as_json: bool
) -> None:
    """Give a service the free ADDRESS, or the next one of the pool; its sessions are opened anew.

    --force: also when it is pinned, or to an address that still rests for another service.
    """
    _wish(name, "move", ip, force, file, address, as_json)


@leases.command()
@_asking_consul
def watch(file: Path | None, address: str | None, as_json: bool) -> None:
    """Print every lease, then each change as it comes, until interrupted."""

    async def follow(client: ConsulClient) -> None:
        # Handled, not left to KeyboardInterrupt: whoever is started with SIGINT ignored gets none (POSIX 2.11).
        ending = asyncio.current_task()
        assert ending is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ending.cancel)
        # The watch itself never gives up, so what is wrong from the start is told here.
        await client.kv_get(SCHEMA_KEY)
        async with asyncio.TaskGroup() as tasks:
            watched = KvWatch(client, SERVICE_PREFIX)
            tasks.create_task(watched.run(), name="leases watch")
            before: dict[str, bytes] = {}
            snapshot = await watched.changed()
            while True:
                now = {key.removeprefix(SERVICE_PREFIX): pair.value for key, pair in snapshot.pairs.items()}
                for line in _differences(before, now, as_json):
                    click.echo(line)
                before = now
                snapshot = await watched.changed(snapshot)

    with contextlib.suppress(asyncio.CancelledError):
        _with_consul(file, address, follow)


def _differences(before: dict[str, bytes], now: dict[str, bytes], as_json: bool) -> Iterator[str]:
    """Yield a line for each service whose lease came, went or changed."""
    for service in sorted(before.keys() | now.keys()):
        if before.get(service) == now.get(service):
            continue
        event = "gone" if service not in now else "new" if service not in before else "changed"
        try:
            lease = from_json(now.get(service, before.get(service, b"")), Lease)
        except ProtocolError as error:
            shown = {"error": str(error)}
        else:
            ports = ",".join(f"{port.protocol}:{port.port}" for port in lease.ports)
            shown = {"ip": str(lease.ip), "ports": ports, "epoch": str(lease.epoch)}
        if as_json:
            yield json.dumps({"event": event, "service": service} | shown)
        else:
            yield " ".join([event, service, *(f"{name}={value}" for name, value in shown.items())])


def _wish(
    name: str,
    kind: WishKind,
    ip: str | None,
    force: bool,
    file: Path | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Write a wish, wait for the answer and print it; exit 1 when it is a refusal."""
    service = _service(name)
    wish = Wish(
        kind=kind,
        id=secrets.token_hex(8),
        ip=None if ip is None else _ip(ip),
        force=force,
        asked_by=f"{getpass.getuser()}@{socket.gethostname()}",
        asked_at=time.time(),
    )
    answer = _with_consul(file, address, lambda client: _ask_keeper(client, service, wish))
    if as_json:
        click.echo(json.dumps({"ok": answer.ok, "what": answer.what, "at": answer.at}, indent=2))
    else:
        click.echo(answer.what)
    if not answer.ok:
        raise SystemExit(1)


async def _ask_keeper(client: ConsulClient, service: ServiceName, wish: Wish) -> WishAnswer:
    """Return the keeper's answer. Raises LeaseError when none comes, and takes the wish back then."""
    key = wish_key(service)
    there = await client.kv_get(key, consistent=True)
    if there is not None and not wish.force and _is_waiting(there.value):
        raise LeaseError(
            f"another wish about {service} is waiting for the keeper ({VIP_PREFIX}wish/{service}); try again, or "
            "replace it with --force"
        )
    if not await client.kv_put(key, to_json(wish), cas=there.modify_index if there else 0):
        raise LeaseError(f"somebody else wished something about {service} just now; try again")
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        pair = await client.kv_get(key, consistent=True)
        if pair is None:
            raise LeaseError(f"the wish about {service} was removed before it was answered")
        found = from_json(pair.value, Wish)
        if found.id != wish.id:
            raise LeaseError(f"the wish about {service} was replaced before it was answered")
        late = time.monotonic() >= deadline
        if found.answer is not None or late:
            # An answer that has been read is of no use to anybody; a wish that nobody waits for neither.
            removed = await client.kv_delete(key, cas=pair.modify_index)
            if found.answer is not None:
                return found.answer
            if removed:
                raise LeaseError(
                    f"no keeper answered within {ANSWER_SECONDS:g} s, the wish is withdrawn: is a ztna-dnsd with "
                    "dnsd.keeper running?"
                )
        await asyncio.sleep(LOOK_SECONDS)


def _is_waiting(value: bytes) -> bool:
    try:
        return from_json(value, Wish).answer is None
    except ProtocolError:
        return False


def _about(table: Table, service: ServiceName) -> dict[str, object]:
    shown = _as_json(table)
    leased, addresses = shown["leases"], shown["addresses"]
    assert isinstance(leased, dict)
    assert isinstance(addresses, dict)
    wish = table.wishes.get(service)
    return {
        "service": service,
        "lease": leased.get(service),
        "addresses": {ip: held for ip, held in addresses.items() if held["service"] == service},
        "wish": None if wish is None else json.loads(to_json(wish.record)),
    }


def _told(table: Table, service: ServiceName) -> Iterator[str]:
    lease = table.leases.get(service)
    if lease is not None:
        ports = ", ".join(f"{port.protocol}:{port.port}" for port in lease.record.ports)
        yield f"{service} has {lease.record.ip} for {ports or 'no ports'}, epoch {lease.record.epoch}"
    for ip, stored in sorted(table.holdings.items()):
        held = stored.record
        if held.service == service and held.state == "leased":
            yield f"  {ip} leased since {_moment(held.leased_at)}{', pinned' if held.pinned else ''}"
        elif held.service == service:
            yield f"  {ip} rests since {_moment(held.released_at or 0.0)}"
    wish = table.wishes.get(service)
    if wish is not None:
        answer = wish.record.answer
        said = f"answered: {answer.what}" if answer else "waits for the keeper"
        yield f"  wish of {wish.record.asked_by or 'somebody'} to {wish.record.kind} it: {said}"


def _service(name: str) -> ServiceName:
    try:
        return ServiceName(name)
    except BadName as error:
        raise click.UsageError(str(error)) from None


def _ip(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError as error:
        raise click.UsageError(f"{text}: {error}") from None


def _read(file: Path | None, address: str | None) -> Table:
    return _with_consul(file, address, _read_from)


def _with_consul(file: Path | None, address: str | None, use: Callable[[ConsulClient], Awaitable[T]]) -> T:
    """Let something use the Consul that was named; what goes wrong there is one line and status 1."""
    overrides = {"consul.address": address} if address else {}
    try:
        config = configuration.load(file, os.environ, overrides)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        return asyncio.run(_used(config.consul, use))
    except ZtnaError as error:
        raise click.ClickException(str(error)) from None


async def _used(consul: ConsulConfig, use: Callable[[ConsulClient], Awaitable[T]]) -> T:
    async with ConsulClient(consul) as client:
        return await use(client)


async def _read_from(client: ConsulClient) -> Table:
    pairs = await client.kv_list(VIP_PREFIX, consistent=True)
    return read_table({pair.key: pair for pair in pairs})


def _as_json(table: Table) -> dict[str, object]:
    return {
        "leases": {
            service: {
                "ip": str(stored.record.ip),
                "epoch": stored.record.epoch,
                "ports": [{"protocol": port.protocol, "port": port.port} for port in stored.record.ports],
            }
            for service, stored in sorted(table.leases.items())
        },
        "addresses": {
            str(ip): {
                "service": held.record.service,
                "state": held.record.state,
                "epoch": held.record.epoch,
                "pinned": held.record.pinned,
                "leased_at": held.record.leased_at,
                "released_at": held.record.released_at,
            }
            for ip, held in sorted(table.holdings.items())
        },
    }


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
