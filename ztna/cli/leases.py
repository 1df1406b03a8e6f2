"""`ztna leases`: look at the virtual addresses in Consul's KV. Changes nothing; the keeper does."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.table import Table as Grid

from ztna import config as configuration
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.errors import ConfigError, ZtnaError
from ztna.leases import VIP_PREFIX, Table, audit, read_table

F = TypeVar("F", bound=Callable[..., object])


@click.group()
def leases() -> None:
    """Look at the virtual addresses of services."""


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
        grid.add_row(service, str(stored.record.ip), "leased", ports, since)
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


def _read(file: Path | None, address: str | None) -> Table:
    overrides = {"consul.address": address} if address else {}
    try:
        config = configuration.load(file, os.environ, overrides)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        return asyncio.run(_read_from(config.consul))
    except ZtnaError as error:
        raise click.ClickException(str(error)) from None


async def _read_from(consul: ConsulConfig) -> Table:
    async with ConsulClient(consul) as client:
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
