"""The few shapes that the reference pages are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def page(title: str, made_from: str, *parts: str) -> str:
    """Return a page that says where it comes from."""
    return (
        "\n\n".join((f"# {title}", f"<!-- written by `make reference` from {made_from} -->", *parts)) + "\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a bar in a cell is escaped, a line break becomes a space."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def code(value: object) -> str:
    """Return inline code; nothing for nothing."""
    return f"`{value}`" if str(value) else ""


def anchor(heading: str) -> str:
    """Return the anchor that mkdocs and GitHub alike give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def sentence(docstring: str | None) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((docstring or "").partition("\n\n")[0].split())


def text(words: str) -> str:
    """Return prose in which what is not code means itself: no tag, no emphasis."""
    parts = words.split("`")
    parts[::2] = [
        re.sub(r"[*<]", lambda match: {"<": "&lt;"}.get(match[0], f"\\{match[0]}"), part)
        for part in parts[::2]
    ]
    return "`".join(parts)


def _cell(words: str) -> str:
    return text(" ".join(words.split())).replace("|", "\\|")
