"""The admin page of a daemon: what /status has, as plain HTML that asks for nothing else.

Pure: values in, text out. Whatever a value is, it is text in the page and never markup: peers choose names.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

ROWS_MAX = 200
"""Of one table; /status has all."""
DEPTH_MAX = 6

STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}"
    "h2{font-size:1.1em;margin:1.4em 0 .3em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.15em .5em;text-align:left;vertical-align:top}th{background:#f3f3f3}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}th{background:#262626}}"
)
_STYLE_HASH = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def page(title: str, sections: Mapping[str, object]) -> str:
    """Return the page: a heading and a table for each section. Values are what JSON has."""
    body = "".join(f"<h2>{escape(name)}</h2>{_shown(value, 0)}" for name, value in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _shown(value: object, depth: int) -> str:
    if depth == DEPTH_MAX or not isinstance(value, Mapping | list | tuple):
        return escape(_text(value))
    if not value:
        return "none"
    if isinstance(value, Mapping):
        rows = [f"<tr><th>{escape(str(key))}</th><td>{_shown(each, depth + 1)}</td></tr>"
                for key, each in list(value.items())[:ROWS_MAX]]  # fmt: skip
        return _table(rows, len(value))
    if all(isinstance(each, Mapping) for each in value):
        return _records(value, depth)
    return escape(", ".join(map(_text, value[:ROWS_MAX]))) + ("" if len(value) <= ROWS_MAX else ", ...")


def _records(records: Sequence[Mapping[str, object]], depth: int) -> str:
    columns = list(dict.fromkeys(key for record in records[:ROWS_MAX] for key in record))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    rows = [
        "<tr>" + "".join(f"<td>{_shown(record.get(column), depth + 1)}</td>" for column in columns) + "</tr>"
        for record in records[:ROWS_MAX]
    ]
    return _table([f"<tr>{head}</tr>", *rows], len(records))


def _table(rows: Sequence[str], total: int) -> str:
    more = f"<p>{ROWS_MAX} of {total}; /status has all.</p>" if total > ROWS_MAX else ""
    return f"<table>{''.join(rows)}</table>{more}"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
