"""`ztna ping` and `ztna trace`: whether a service can be reached from this host, and where it ends if not.

The agent on this host tries, through its admin socket; how a name resolves is asked here, as programs ask it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import msgspec

from ztna import config as configuration
from ztna.cli import admin, completing
from ztna.cli.dns import endpoint
from ztna.cli.ending import interruptible
from ztna.config import Config, Endpoint
from ztna.dns import Code, SrvData, Type
from ztna.errors import BadName, ConfigError, ZtnaError
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.remedies import REMEDIES
from ztna.resolver import Resolver
from ztna.system_dns import RESOLV_CONF, nameservers
from ztna.traced import Pong, Step

PROBE_SECONDS = 35.0
INTERVAL_SECONDS = 1.0
DNS_SECONDS = 2.0
DNS_PORT = 53
SRV_SHOWN_MAX = 4


class _Lease(msgspec.Struct, frozen=True):
    service: str
    ip: str


class _Agent(msgspec.Struct, frozen=True):
    services: tuple[_Lease, ...]


class _Status(msgspec.Struct, frozen=True):
    agent: _Agent


config_option = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="The agent's configuration, for agent.admin_socket.",
)
agent_option = click.option("--agent", "path", help="The path of its admin_socket.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("service", shell_complete=completing.services)
@config_option
@agent_option
@click.option("--count", "-c", type=click.IntRange(1), help="Stop after so many; else on Ctrl-C.")
@click.option(
    "--interval",
    "-i",
    type=click.FloatRange(0.05),
    default=INTERVAL_SECONDS,
    show_default=True,
    help="Seconds between two tries.",
)
@json_option
def ping(
    service: str, file: Path | None, path: str | None, count: int | None, interval: float, as_json: bool
) -> None:
    """Measure round trips to the connector of SERVICE, sealed end to end, and say which path they take.

    Exit status 1 when none was answered.
    """
    target, name = _socket(_config(file), path), _service(service)
    times: list[float] = []
    lost = 0
    try:
        with interruptible():
            for number in itertools.count(1):
                try:
                    _, pong = admin.ask(
                        target, f"/ping/{name}", Pong, method="POST", seconds=PROBE_SECONDS, who="agent"
                    )
                except ZtnaError as error:
                    lost += 1
                    _say({"seq": number, "error": str(error)} if as_json else f"{name}: {error}")
                else:
                    times.append(pong.ms)
                    _say(
                        {"seq": number, **msgspec.structs.asdict(pong)}
                        if as_json
                        else _told(name, number, pong)
                    )
                if number == count:
                    break
                time.sleep(interval)
    except KeyboardInterrupt:
        click.echo(err=True)
    if not as_json:
        click.echo(_summary(times, lost))
    sys.exit(0 if times else 1)


@click.command()
@click.argument("service", shell_complete=completing.services)
@config_option
@agent_option
@click.option(
    "--dns",
    "server",
    metavar="HOST:PORT",
    help="Ask this DNS server for the name instead of this host's resolver.",
)
@json_option
def trace(service: str, file: Path | None, path: str | None, server: str | None, as_json: bool) -> None:
    """Go to the backend of SERVICE step by step: name, grant, lease, SRV, relay, session, carriers, backend.

    TCP backends are connected to and reset at once. Exit status 1 when a step fails.
    """
    config, name = _config(file), _service(service)
    target = _socket(config, path)
    _, found = admin.ask(
        target, f"/trace/{name}", tuple[Step, ...], method="POST", seconds=PROBE_SECONDS, who="agent"
    )
    _, status = admin.ask(target, "/status", _Status, who="agent")
    lease = next((each.ip for each in status.agent.services if each.service == name), None)
    resolve = _by_host if server is None else partial(_by_server, endpoint(server))
    full = f"{name}.{config.domain}"
    steps = [_name_step(full, lease, resolve), *found]
    at = next((number for number, step in enumerate(steps) if step.step == "lease" and step.ok), None)
    if at is not None:
        steps.insert(at + 1, _srv_step(full, _nameservers() if server is None else (endpoint(server),)))
    if as_json:
        click.echo(msgspec.json.encode(steps).decode())
    else:
        for step in steps:
            click.echo(_line(step))
    sys.exit(1 if any(step.ok is False for step in steps) else 0)


def _config(file: Path | None) -> Config:
    if file is None:
        return Config()
    try:
        return configuration.load(file, os.environ, {}, "agent")
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def _socket(config: Config, path: str | None) -> str:
    found = path or (config.agent.admin_socket if config.agent is not None else None)
    if found is None:
        raise click.UsageError(
            "the agent's admin socket is needed: --agent PATH, or --config with agent.admin_socket"
        )
    return found


def _service(text: str) -> ServiceName:
    try:
        return ServiceName(text)
    except BadName as error:
        raise click.UsageError(str(error)) from None


def _name_step(name: str, lease: str | None, resolve: Callable[[str], list[str]]) -> Step:
    """Resolve the name and compare with the agent's lease."""
    started = time.monotonic()
    try:
        found = resolve(name)
    except (OSError, ZtnaError) as error:
        told = f"{name} does not resolve: {error}; `ztna doctor dns` says why"
        return Step("name", None if lease is None else False, told, _since(started))
    if lease is not None and lease not in found:
        told = f"{name} is {', '.join(found)}, but its lease is {lease}: somebody else answers, or an answer is old"
        return Step("name", False, told, _since(started))
    return Step("name", True, f"{name} is {', '.join(found)}", _since(started))


def _srv_step(name: str, servers: Sequence[Endpoint]) -> Step:
    """Look for the connectors that may have a session for it, as relays do: they go by these very records."""
    started = time.monotonic()
    try:
        code, records = asyncio.run(_srv(name, servers))
    except (OSError, ZtnaError) as error:
        return Step("SRV", None, f"not known here: {error}", _since(started))
    if code != Code.NOERROR:
        return Step("SRV", None, f"not known here: {servers[0]} knows no {name}", _since(started))
    if not records:
        told = f"{name} has no records: none of its instances passes its checks"
        return Step("SRV", False, told, _since(started), Reason.NO_HEALTHY_CONNECTOR)
    shown = [f"{each.target.partition('.')[0]} (weight {each.weight})" for each in records[:SRV_SHOWN_MAX]]
    more = f" and {len(records) - SRV_SHOWN_MAX} more" if len(records) > SRV_SHOWN_MAX else ""
    return Step("SRV", True, f"{', '.join(shown)}{more}", _since(started))


async def _srv(name: str, servers: Sequence[Endpoint]) -> tuple[int, list[SrvData]]:
    """Return what a server says of a name's SRV records, the first choice first. Raises ZtnaError."""
    if not servers:
        raise ZtnaError(f"/{RESOLV_CONF} names no server; --dns does")
    answer = await Resolver(servers, timeout_s=DNS_SECONDS).ask(name, Type.SRV)
    found = [each.data for each in answer.answers if isinstance(each.data, SrvData)]
    return answer.code, sorted(found, key=lambda each: (each.priority, -each.weight, each.target))


def _nameservers() -> tuple[Endpoint, ...]:
    """Return the servers that this host's resolver asks."""
    try:
        text = Path("/", RESOLV_CONF).read_text(errors="replace")
    except OSError:
        return ()
    return tuple(Endpoint(each, DNS_PORT) for each in nameservers(text))


def _by_host(name: str) -> list[str]:
    """Ask as programs on this host do. Raises OSError."""
    return sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None, socket.AF_INET)})


def _by_server(server: Endpoint, name: str) -> list[str]:
    """Ask one DNS server. Raises ZtnaError."""
    found = asyncio.run(Resolver((server,), timeout_s=DNS_SECONDS).addresses(name))
    if not found:
        raise ZtnaError(f"{server} has no address for it")
    return sorted(map(str, found))


def _line(step: Step) -> str:
    mark = {True: "ok    ", False: "FAILED", None: "-     "}[step.ok]
    timed = "" if step.ms is None else f" ({step.ms:g} ms)"
    advice = f"\n       {REMEDIES[step.reason]}" if step.reason is not None and not step.ok else ""
    return f"{mark} {step.step}: {step.told}{timed}{advice}"


def _told(name: str, number: int, pong: Pong) -> str:
    way = "direct" if pong.path == "direct" else f"{pong.path} by relay {pong.relay}"
    return f"{name}: seq {number} from connector {pong.connector_id}, {way}: {pong.ms:.2f} ms"


def _summary(times: list[float], lost: int) -> str:
    text = f"{len(times) + lost} sent, {len(times)} answered"
    if times:
        text += f"; min {min(times):.2f}, median {statistics.median(times):.2f}, max {max(times):.2f} ms"
    return text


def _say(told: str | dict[str, object]) -> None:
    click.echo(told if isinstance(told, str) else json.dumps(told))
    sys.stdout.flush()


def _since(started: float) -> float:
    return round(1000 * (time.monotonic() - started), 1)
