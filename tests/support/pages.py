"""The documents as tests read them: their fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fences(text: str) -> list[tuple[str, list[str]]]:
    """Return language and lines of each fenced block, in order."""
    found = re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(language.strip(), body.splitlines()) for language, body in found]


def blocks(page: Path, language: str, heading: str | None = None) -> list[list[str]]:
    """Return the lines of each block of a language, of those under a heading (`## ...`) when it is named."""
    text = page.read_text()
    if heading is not None:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert text, f"{page.name} has no heading {heading!r}"
    return [lines for of, lines in fences(text) if of == language]
