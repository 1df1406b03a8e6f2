"""What mkdocs calls while it builds the site: takes what pages link to outside of docs/ in, under `source/`.

Links stay as the repository's readers need them; the site gets copies that lie elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

CHANGELOG = "CHANGELOG.md"
_TO_OUTSIDE = re.compile(r"\]\((?:\.\./)+(?P<path>[^)#]+)(?=[)#])")
_TO_DOCS = re.compile(r"\]\(docs/(?P<path>[^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the changelog and each file outside of docs/ that a page links to."""
    docs = Path(config.docs_dir)
    wanted = {CHANGELOG}
    for page in files.documentation_pages():
        for match in _TO_OUTSIDE.finditer(page.content_string):
            wanted |= _outside(docs, page.src_uri, match)
    for path in sorted(wanted):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(docs.parent / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links to what lies outside of docs/ lead to its copy, and those of the changelog back."""
    docs = Path(config.docs_dir)
    uri = page.file.src_uri
    if uri == f"source/{CHANGELOG}":
        return _TO_DOCS.sub(r"](../\g<path>)", markdown)

    def moved(match: re.Match[str]) -> str:
        up = "../" * uri.count("/")
        return next((f"]({up}source/{path}" for path in _outside(docs, uri, match)), match[0])

    return _TO_OUTSIDE.sub(moved, markdown)


def _outside(docs: Path, uri: str, match: re.Match[str]) -> set[str]:
    """Return the path in the repository that a link of a page leads to, if it is a file outside of docs/."""
    target = (docs / uri).parent.joinpath(match[0][2:]).resolve()
    is_outside = docs not in target.parents and docs.parent in target.parents
    return {str(target.relative_to(docs.parent))} if is_outside and target.is_file() else set()
