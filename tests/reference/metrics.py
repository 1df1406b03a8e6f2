"""Every metric: its type and unit, who sets it, and how many values its labels can have."""

from __future__ import annotations

from tests.reference import markdown
from ztna.telemetry import EVERY, METRICS, Documented

INTRODUCTION = """Every daemon shows its own on `/metrics`; [alerts, a dashboard and what to do about
them](../monitoring.md) go by these. Beside these each daemon has Python's `process_*`: processor time, memory, open
files, start. Whoever asks for OpenMetrics, as Prometheus does, gets exemplars too: the session, by which logs and
`ztna sessions` name it."""
UNITS = ("seconds", "bytes", "packets", "addresses")


def page() -> str:
    """Return the page: a table for all daemons, then one for each set of daemons that share some."""
    groups: dict[tuple[str, ...], list[Documented]] = {}
    for each in METRICS.values():
        groups.setdefault(each.daemons, []).append(each)
    parts = [part for daemons, group in groups.items() for part in (f"## {_title(daemons)}", _table(group))]
    return markdown.page("Metrics", "`ztna/telemetry.py`", INTRODUCTION, *parts)


def _title(daemons: tuple[str, ...]) -> str:
    if daemons == EVERY:
        return "Every daemon"
    return ", ".join(daemons[:-1]) + " and " + daemons[-1] if daemons[1:] else daemons[0]


def _table(group: list[Documented]) -> str:
    rows = [
        (
            markdown.code(each.name),
            ", ".join(filter(None, (each.kind, unit(each)))),
            "; ".join(f"`{label}`: {bound}" for label, bound in each.labels.items()),
            each.help,
        )
        for each in group
    ]
    return markdown.table(("Metric", "Type, unit", "Labels: how many values, which", "Meaning"), rows)


def unit(each: Documented) -> str:
    """Return what a metric counts or measures, as its name ends."""
    last = each.name.removesuffix("_total").rpartition("_")[2]
    return last if last in UNITS else "" if each.kind == "gauge" else "events"
