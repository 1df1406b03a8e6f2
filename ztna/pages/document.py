"""A page as a whole: what the first load has, and what a browser may do with it.

Pure. Style and script are files of their own, so that nothing inline is ever allowed, and Trusted Types keep
even our own script from making markup of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import msgspec

from ztna.pages.markup import Element, html, wire
from ztna.pages.parts import View

RAW_CHARACTERS_MAX = 200_000
"""Of the raw state on the page; /status has all of it."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def document(view: View, raw: str, as_of: str) -> str:
    """Return the page; `raw` is the state as JSON, `as_of` the time that it is of, in words."""
    sections = list(view.sections.values())
    body = "".join(html(section) for section in sections[1:])
    shown = (
        raw if len(raw) <= RAW_CHARACTERS_MAX else f"{raw[:RAW_CHARACTERS_MAX]}\n... /status has all of it"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(view.title)}</title>"
        '<link rel="icon" href="/page.svg" type="image/svg+xml"><link rel="stylesheet" href="/page.css">'
        '<script src="/page.js" defer></script></head><body>'
        f'<p id="live">As of {escape(as_of)}; load again for what has changed</p>'
        f"{html(sections[0])}<main>{body}"
        '<details id="raw"><summary>Everything, as <code>/status</code> has it</summary>'
        f"<pre>{escape(shown)}</pre></details></main></body></html>\n"
    )


def encoded(sections: Mapping[str, Element]) -> dict[str, bytes]:
    """Return each section as the JSON that the script builds it from."""
    return {id_: msgspec.json.encode(wire(section)) for id_, section in sections.items()}


def event(sections: Mapping[str, bytes]) -> bytes:
    """Return a server-sent event with these sections (HTML Living Standard 9.2.5; JSON has no line breaks)."""
    told = b",".join(b'"' + id_.encode() + b'":' + section for id_, section in sections.items())
    return b"event: sections\ndata: {" + told + b"}\n\n"
