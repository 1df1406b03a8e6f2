"""Elements of a page, as HTML for the first load and as JSON for the script that keeps it up to date.

Pure. What a value says is always text or a quoted attribute: peers choose names. `static/page.js` has the same
lists of what may stand in a page, and builds nothing else.
"""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

TAGS = frozenset(
    [
        "a",
        "caption",
        "circle",
        "code",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "g",
        "h1",
        "h2",
        "header",
        "li",
        "meter",
        "nav",
        "p",
        "path",
        "pre",
        "rect",
        "section",
        "span",
        "strong",
        "summary",
        "svg",
        "table",
        "tbody",
        "td",
        "text",
        "th",
        "thead",
        "title",
        "tr",
        "ul",
    ]
)
ATTRIBUTES = frozenset(
    [
        "aria-hidden",
        "aria-label",
        "aria-labelledby",
        "class",
        "cx",
        "cy",
        "d",
        "data-label",
        "height",
        "high",
        "href",
        "id",
        "low",
        "max",
        "min",
        "optimum",
        "r",
        "role",
        "rx",
        "scope",
        "tabindex",
        "value",
        "viewBox",
        "width",
        "x",
        "y",
    ]
)
LINK = re.compile(r"http://127\.0\.0\.1:\d+/")
"""The whole of an address that may be linked to: whatever is shown, a click stays on this host."""


class Element(NamedTuple):
    """One element with what is in it."""

    tag: str
    attributes: tuple[tuple[str, str], ...] = ()
    children: tuple[Element | str, ...] = ()


def el(tag: str, *children: Element | str, **attributes: object) -> Element:
    """Return an element; `class_="x"` is class, `_` in a name is `-`, an attribute of None is left out.

    Raises ValueError for a tag, an attribute or a link that has no business in a page.
    """
    named = tuple(
        (name.rstrip("_").replace("_", "-"), str(value))
        for name, value in attributes.items()
        if value is not None
    )
    if tag not in TAGS:
        raise ValueError(f"no page has <{tag}>")
    for name, value in named:
        if name not in ATTRIBUTES:
            raise ValueError(f"no page has an attribute {name}")
        if name == "href" and LINK.fullmatch(value) is None:
            raise ValueError(f"{value} leads away from this host")
    return Element(tag, named, children)


def html(node: Element | str) -> str:
    """Return the element as HTML."""
    if isinstance(node, str):
        return escape(node)
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in node.attributes)
    return f"<{node.tag}{attributes}>{''.join(map(html, node.children))}</{node.tag}>"


def wire(node: Element | str) -> object:
    """Return the element as JSON has it: text, or `[tag, {attribute: value}, child, ...]`."""
    if isinstance(node, str):
        return node
    return [node.tag, dict(node.attributes), *map(wire, node.children)]
