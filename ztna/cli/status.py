"""`ztna status`: what the daemons on this host are doing, from their admin ports. Reads only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ztna import config as configuration
from ztna.cli import admin
from ztna.config import DAEMON_SECTIONS, AgentConfig, Config, ConnectorConfig, DnsdConfig, RelayConfig
from ztna.errors import ConfigError, ProtocolError, ZtnaError
from ztna.jsontypes import from_json
from ztna.sections import Section

COUNTERS = {"ztna_refusals": "refused", "ztna_drops": "dropped"}
UNREADABLE = "its /status is not what this version of ztna reads"
WIDTH_PIPED = 160
COLOURS = {
    "up": "green",
    "passing": "green",
    "open": "green",
    "warning": "yellow",
    "critical": "red",
    "down": "red",
}

Json = dict[str, Any]


class Seen(msgspec.Struct, frozen=True):
    """One daemon: what it says of itself, or why it says nothing."""

    name: str
    admin: str
    status: Json | None = None
    counted: Json | None = None
    error: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it answered and awaits nothing."""
        return self.status is not None and bool(self.status["readiness"]["ready"])


@click.command()
@click.option(
    "--config",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Configurations of the daemons to ask; without any, those at the default admin ports that run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(files: tuple[Path, ...], as_json: bool) -> None:
    """Show the daemons on this host: relays, services, addresses, sessions, paths, round trips, refusals.

    Exit status 0 when each is ready, 1 when one is not or none answers.
    """
    asked = asked_of(files)
    seen = [look(name, address) for name, address in asked]
    if not files:
        seen = [each for each in seen if each.error is None or "refused" not in each.error]
    if as_json:
        click.echo(json.dumps({each.name: msgspec.to_builtins(each) for each in seen}, indent=2))
    elif not seen:
        click.echo(
            "no daemon answers at the default admin ports of this host; --config FILE says where one is",
            err=True,
        )
    else:
        show(Console(width=None if sys.stdout.isatty() else WIDTH_PIPED, highlight=False), seen)
    sys.exit(0 if seen and all(each.is_ready for each in seen) else 1)


def look(name: str, address: str) -> Seen:
    """Ask one daemon."""
    try:
        _, body = admin.fetch(address, "/status")
        status = from_json(body, Json)
        if "readiness" not in status:
            raise ZtnaError(status.get("error", admin.STRANGER))
        seen = Seen(name, address, status)
        _headline(seen), _tables(seen)
        _, metrics = admin.fetch(address, "/metrics")
        return msgspec.structs.replace(seen, counted=counters(metrics.decode()))
    except (KeyError, TypeError, AttributeError):
        return Seen(name, address, error=UNREADABLE)
    except ProtocolError as error:
        return Seen(name, address, error=f"{admin.STRANGER}: {error}")
    except (ValueError, ZtnaError) as error:
        return Seen(name, address, error=str(error))


def counters(metrics: str) -> Json:
    """Return what was refused and dropped, `{"refused": {"where reason": count}, ...}`, of a metrics page."""
    found: Json = {told: {} for told in COUNTERS.values()}
    for family in text_string_to_metric_families(metrics):
        told = COUNTERS.get(family.name)
        if told is None:
            continue
        for sample in family.samples:
            if sample.value:
                found[told][" ".join(sample.labels.values())] = int(sample.value)
    return found


def show(console: Console, seen: Iterable[Seen]) -> None:
    """Print the daemons, each with its tables."""
    for each in seen:
        if each.status is None:
            console.print(Text(printable(f"{each.name} at {each.admin}: {each.error}"), "red"))
            continue
        console.print(_headline(each))
        for table in _tables(each):
            if table.row_count:
                console.print(table)
        for told, found in (each.counted or {}).items():
            if found:
                console.print(
                    f"{told}: " + ", ".join(f"{what} {count}" for what, count in sorted(found.items()))
                )
        console.print()


def _tables(each: Seen) -> list[Table]:
    return _TABLES[each.name](each.status) if each.status is not None and each.name in _TABLES else []


def _headline(each: Seen) -> Text:
    assert each.status is not None, "shown only when it answered"
    readiness = each.status["readiness"]
    text = Text(f"{each.name} ", "bold")
    text.append("ready" if readiness["ready"] else "not ready", "green" if readiness["ready"] else "red")
    text.append(f", version {each.status['version']}, up {_age(each.status['uptime_s'])}, admin {each.admin}")
    for what, detail in readiness["awaiting"].items():
        text.append(f"\n  waits for {what}: {printable(detail)}", "red")
    for what, detail in readiness["warnings"].items():
        text.append(f"\n  warning, {what}: {printable(detail)}", "yellow")
    return text


def printable(text: str) -> str:
    """Return a text that others had a hand in (certificates, backends, Consul) so that no terminal obeys it."""
    return text if text.isprintable() else repr(text)


def asked_of(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Return name and admin address of the daemons of these configurations, without any of those by default."""
    return _of_files(files) if files else _defaults()


def _of_files(files: Iterable[Path]) -> list[tuple[str, str]]:
    asked = []
    for file in files:
        try:
            config = configuration.load(file, os.environ, {})
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        asked += admins(config)
        if not admins(config):
            raise click.UsageError(f"{file} has no section of a daemon: {', '.join(DAEMON_SECTIONS)}")
    return asked


def admins(config: Config) -> list[tuple[str, str]]:
    """Return name and admin address of each daemon that a configuration has."""
    return [
        (name, str(getattr(config, name).admin))
        for name in DAEMON_SECTIONS
        if getattr(config, name) is not None
    ]


def _defaults() -> list[tuple[str, str]]:
    types: dict[str, type[Section]] = {
        "dnsd": DnsdConfig,
        "relay": RelayConfig,
        "connector": ConnectorConfig,
        "agent": AgentConfig,
    }
    found = {
        name: field.default
        for name, section in types.items()
        for field in msgspec.structs.fields(section)
        if field.name == "admin"
    }
    return [(name, str(found[name])) for name in DAEMON_SECTIONS]


# --- the tables of each daemon; what a daemon of another version does not say stays empty


def _agent(status: Json) -> list[Table]:
    agent = status.get("agent", {})
    streams = agent.get("streams", {})
    services = [each | {"ports": _ports(each.get("ports", ()))} for each in agent.get("services", ())]
    links = [each | {"tried": _candidates(each.get("candidates", ()))} for each in agent.get("links", ())]
    running = [{"service": name, **own} for name, own in streams.get("running", {}).items()]
    carried = streams | {"udp_flows": agent.get("udp_flows")}
    return [
        _table("relays", agent.get("relays", ()), "relay state transport version rtt_ms preferred problem"),
        _table("services", services, "service address=ip ports health session=state connector reason"),
        _table(
            "links",
            links,
            "connector path relay carrier rtt_ms direct_paths=tried sent=sent_bytes received=received_bytes",
        ),
        _table("running TCP flows", running, "service flows sent=sent_bytes received=received_bytes"),
        _table(
            "", [carried], "TCP_flows=flows UDP_flows=udp_flows stream_carriers=carriers their_ways=routes"
        ),
    ]


def _candidates(tried: Iterable[Json]) -> list[str] | None:
    """Return a few words on each direct path that was tried, None where none was."""
    told = [
        f"{each['address']} {each['state']}" + (f" {each['rtt_ms']} ms" if each["rtt_ms"] is not None else "")
        for each in tried
    ]
    return told or None


def _connector(status: Json) -> list[Table]:
    own = status.get("connector", {})
    services = [
        each
        | {
            "service": name,
            "address": (each.get("lease") or {}).get("ip"),
            "checks": [
                f"{check['kind']} {check['target']}: {check['output']}"
                for backend in each.get("backends", ())
                for check in backend["checks"]
            ],
            "ejected": [backend["backend"] for backend in each.get("backends", ()) if backend["ejected"]]
            or None,
        }
        for name, each in own.get("services", {}).items()
    ]
    return [
        _table("services", services, "service verdict registered address refused checks ejected"),
        _table("relays", own.get("relays", ()), "relay=name address version connected problem"),
    ]


def _relay(status: Json) -> list[Table]:
    connections, sessions = status.get("connections", ()), status.get("sessions", ())
    return [
        _table(
            "connections",
            connections,
            "peer address version connector=connector_id sessions certificate_days",
        ),
        _table("sessions", sessions, "agent service connector=connector_id path bytes link=link_bytes age_s"),
    ]


def _dnsd(status: Json) -> list[Table]:
    row = status.get("dns", {}) | status.get("pool", {}) | status.get("keeper", {})
    columns = "zone serial services leases stale elected trouble free resting"
    return [_table("names and leases", [row], columns)]


_TABLES = {"agent": _agent, "connector": _connector, "relay": _relay, "dnsd": _dnsd}


def _table(title: str, rows: Iterable[Mapping[str, Any]], columns: str) -> Table:
    """Return a table with the columns that at least one row has something for.

    A column is the key of a row, or `head=key` where its head is another; a `_` is shown as a space.
    """
    rows = list(rows)
    shown = {
        head.replace("_", " "): key or head
        for head, _, key in (each.partition("=") for each in columns.split())
        if any(row.get(key or head) not in (None, "", {}) for row in rows)
    }
    table = Table(*shown, title=title, title_justify="left", title_style="")
    for row in rows if shown else ():
        table.add_row(*(_cell(row.get(key)) for key in shown.values()))
    return table


def _cell(value: Any) -> Text:
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, dict):
        return Text(printable(", ".join(f"{key} {entry}" for key, entry in value.items())))
    if isinstance(value, list):
        return Text(printable(", ".join(map(str, value))))
    text = "" if value is None else str(value)
    return Text(printable(text), COLOURS.get(text, ""))


def _ports(ports: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{port['protocol']}:{port['port']}" for port in ports)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
