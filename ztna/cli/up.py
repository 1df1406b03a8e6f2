"""`ztna up`: a whole mesh on this machine, with a live view, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ztna.cli import mesh_page
from ztna.cli.check import ZONE, Step, as_objects, check
from ztna.cli.mesh import DATABASE, ECHO, VIRTUAL_PORTS, WEB, Mesh, MeshOptions
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError, ZtnaError

LOOPBACK = IPv4Network("127.0.0.0/8")
VIEW_SECONDS = 1.0
LEASED_SECONDS = 15.0
SIGNALLED = 128
"""The exit status of a check that a signal ended is so much above the signal's number, as shells give it."""


@click.command()
@click.option(
    "--check",
    "check_only",
    is_flag=True,
    help="Do one pass (resolve, UDP echo, HTTP get, a denied service) and exit.",
)
@click.option("--json", "as_json", is_flag=True, help="With --check: print what was done as one JSON object.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Write certificates, configurations and logs to this directory and leave them.",
)
@click.option(
    "--consul", "consul_address", help="Use the running Consul at this URL instead of one of our own."
)
@click.option(
    "--pool", default="127.100.0.0/16", show_default=True, help="Where virtual addresses are leased from."
)
@click.option(
    "--mode",
    type=click.Choice(["listen", "anyip"]),
    default="listen",
    show_default=True,
    help="How the agent takes the addresses; anyip needs root.",
)
def up(
    check_only: bool, as_json: bool, keep: Path | None, consul_address: str | None, pool: str, mode: str
) -> None:
    """Run a whole mesh on this machine: Consul, dnsd, relay, connector, agent, three services."""
    if as_json and not check_only:
        raise click.UsageError("--json goes with --check")
    try:
        network = IPv4Network(pool)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; expected a network such as 127.100.0.0/16", param_hint="--pool"
        ) from None
    if network.subnet_of(LOOPBACK) != (mode == "listen"):
        wanted = "inside 127.0.0.0/8" if mode == "listen" else "outside 127.0.0.0/8, for one 10.100.0.0/16"
        raise click.UsageError(f"--mode {mode} takes a --pool {wanted}, not {network}")
    console = _Console(stderr=as_json)
    with _directory(keep) as directory:
        options = MeshOptions(directory, network, "anyip" if mode == "anyip" else "listen", consul_address)
        status = asyncio.run(_run(options, console, check_only, as_json))
    sys.exit(status)


class _Console(Console):
    """A console whose reader may go: `ztna up --check | head -1` still ends everything in order."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True, mode=0o700)
            is_taken = any(keep.iterdir())
        except OSError as error:
            raise click.BadParameter(f"{keep}: {error.strerror}", param_hint="--keep") from None
        if is_taken:
            raise click.BadParameter(f"{keep} is not empty; name a new directory", param_hint="--keep")
        yield keep.resolve()
        return
    directory = Path(tempfile.mkdtemp(prefix="ztna-up-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _run(options: MeshOptions, console: Console, check_only: bool, as_json: bool) -> int:
    loop = asyncio.get_running_loop()
    stopping: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.put_nowait, number)
    mesh: Mesh | None = None
    body: asyncio.Task[int] | None = None
    try:
        mesh = Mesh(options, lambda text: console.print(f"[yellow]note:[/] {text}", soft_wrap=True))
        body = asyncio.create_task(_body(mesh, console, check_only, as_json), name="ztna up")
        stopped = asyncio.create_task(stopping.get(), name="signals")
        await asyncio.wait((body, stopped), return_when=asyncio.FIRST_COMPLETED)
        if body.done():
            stopped.cancel()
            return body.result()
        body.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await body
        return SIGNALLED + stopped.result() if check_only else 0
    except ZtnaError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error)}))
        console.print(f"[red]failed:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    finally:
        if mesh is not None:
            await _stop(mesh, console)


async def _stop(mesh: Mesh, console: Console) -> None:
    started = time.perf_counter()
    await mesh.stop()
    console.print(f"stopped everything in {time.perf_counter() - started:.1f} s", highlight=False)
    if mesh.options.consul_address and mesh.children:
        console.print(
            "the leases stay in that Consul's KV, so that the names keep their addresses; "
            "`consul kv delete -recurse ztna/` removes them",
            highlight=False,
            soft_wrap=True,
        )


async def _body(mesh: Mesh, console: Console, check_only: bool, as_json: bool) -> int:
    started = time.perf_counter()
    with console.status("starting: certificates, Consul, dnsd, relay, connector, agent"):
        await mesh.start()
    console.print(f"Consul: {mesh.consul_kind}", highlight=False, soft_wrap=True)
    console.print(f"all daemons ready after {time.perf_counter() - started:.1f} s", highlight=False)
    async with ConsulClient(ConsulConfig(address=mesh.consul_address)) as client:
        if check_only:
            return await _check(mesh, client, console, as_json)
        async with mesh_page.serving(mesh):
            await _view(mesh, client, console)
        return 0


async def _check(mesh: Mesh, client: ConsulClient, console: Console, as_json: bool) -> int:
    def told(step: Step) -> None:
        mark = "[green]ok[/]    " if step.ok else "[red]failed[/]"
        console.print(
            f"{mark} {step.step}: {step.detail} ({step.milliseconds:.0f} ms)", highlight=False, soft_wrap=True
        )

    steps = await check(mesh, told)
    fine = all(step.ok for step in steps)
    if as_json:
        services = await mesh.table(client)
        done = {"ok": fine, "consul": mesh.consul_kind, "services": services, "steps": as_objects(steps)}
        click.echo(json.dumps(done, indent=2))
    if not fine:
        for child in mesh.children:
            console.print(
                f"[bold]{child.name}[/] last printed:\n{child.tail()}", highlight=False, markup=True
            )
    return 0 if fine else 1


async def _view(mesh: Mesh, client: ConsulClient, console: Console) -> None:
    rows = await _first_rows(mesh, client)
    if not console.is_terminal:
        console.print(_table(rows))
    for line in commands(mesh, rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        await _follow(mesh, client, console, rows)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            try:
                rows, trouble = await mesh.table(client), ""
            except ConsulError as error:
                trouble = str(error)
            live.update(Group(_table(rows), Text(_footer(mesh, trouble))))
            await asyncio.sleep(VIEW_SECONDS)


async def _first_rows(mesh: Mesh, client: ConsulClient) -> list[dict[str, object]]:
    deadline = time.monotonic() + LEASED_SECONDS
    while True:
        rows = await mesh.table(client)
        if all(row["address"] for row in rows):
            return rows
        if time.monotonic() > deadline:
            without = ", ".join(str(row["service"]) for row in rows if not row["address"])
            raise ZtnaError(
                f"no virtual address for {without} after {LEASED_SECONDS:.0f} s; "
                f"see {mesh.options.directory}/dnsd.log"
            )
        await asyncio.sleep(0.05)


async def _follow(mesh: Mesh, client: ConsulClient, console: Console, rows: list[dict[str, object]]) -> None:
    """Without a terminal: one line whenever something changes."""
    ended: set[str] = set()
    while True:
        await asyncio.sleep(VIEW_SECONDS)
        for child in mesh.children:
            if not child.running and child.name not in ended:
                ended.add(child.name)
                console.print(str(child.ended_error()), highlight=False, markup=False)
        try:
            now = await mesh.table(client)
        except ConsulError as error:
            console.print(f"Consul: {error}", highlight=False, markup=False)
            continue
        for before, after in zip(rows, now, strict=True):
            if before != after:
                console.print(f"{after['service']}: {after['health']}, {after['address']}", highlight=False)
        rows = now


def _footer(mesh: Mesh, trouble: str) -> str:
    ended = [child.name for child in mesh.children if not child.running]
    told = f"ended: {', '.join(ended)}" if ended else f"{len(mesh.children)} processes running"
    return f"{told}{'; ' + trouble if trouble else ''}. Ctrl-C ends everything."


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table("service", "protocol", "virtual address", "health")
    colours = {"passing": "green", "warning": "yellow", "critical": "red"}
    for row in rows:
        health = str(row["health"])
        address = f"{row['address']}:{row['port']}" if row["address"] else "waiting for a lease"
        table.add_row(
            f"{row['service']}.{ZONE}",
            str(row["protocol"]),
            address,
            Text(health, colours.get(health, "dim")),
        )
    return table


def commands(mesh: Mesh, rows: list[dict[str, object]]) -> list[str]:
    """Return the lines that say what to try, with this mesh's own addresses and ports."""
    address = {str(row["service"]): row["address"] for row in rows}
    dig = f"dig @127.0.0.1 -p {mesh.dns_port}"
    named = "".join(f" --config {mesh.options.directory}/{name}.yaml" for name in mesh.admin)
    return [
        "",
        f"Look, in a browser: http://127.0.0.1:{mesh.page_port}/",
        "",
        "Try, from another terminal:",
        f"  {dig} {WEB}.{ZONE}",
        f"  {dig} {WEB}.{ZONE} SRV",
        f"  {dig} -x {address[WEB]}",
        f"  curl http://{address[WEB]}:{VIRTUAL_PORTS[WEB]}/",
        f"  echo hello | timeout 1 nc -u {address[ECHO]} {VIRTUAL_PORTS[ECHO]}",
        f"  curl -X POST http://127.0.0.1:{mesh.backend_ports[WEB]}/db/up      # the database comes up",
        f"  echo select | timeout 1 nc {address[DATABASE]} {VIRTUAL_PORTS[DATABASE]}",
        f"  ztna trace {WEB} --agent {mesh.agent_socket} --dns 127.0.0.1:{mesh.dns_port}",
        f"  ztna ping {WEB} --agent {mesh.agent_socket}",
        f"  ztna status{named}",
        f"  ztna top{named}",
        *_missing_tools(),
        f"Certificates, configurations and logs: {mesh.options.directory}",
        "",
    ]


def _missing_tools() -> list[str]:
    packages = {"dig": "bind9-dnsutils", "curl": "curl", "nc": "netcat-openbsd"}
    missing = [package for tool, package in packages.items() if shutil.which(tool) is None]
    return [f"  (first, as root: apt-get install {' '.join(missing)})"] if missing else []
