"""`python -m tests.supply table | sbom | audit`: what the Makefile's targets run."""

from __future__ import annotations

import sys

from tests.supply import audit, licences, lock, sbom

PAGE = lock.ROOT / "docs" / "dependencies.md"
TABLE_BEGINS = "<!-- written by `make lock` -->\n"


def with_table(page: str, table: str) -> str:
    """Return a page whose end, from the mark on, is the table."""
    head, mark, _ = page.partition(TABLE_BEGINS)
    assert mark, f"{PAGE} has lost its line {TABLE_BEGINS!r}"
    return f"{head}{mark}\n{table}"


def main(verb: str) -> int:
    """Do one of the three; return the exit code."""
    if verb == "table":
        PAGE.write_text(with_table(PAGE.read_text(), licences.table()))
        return 0
    if verb == "sbom":
        name, version, _ = sbom.root()
        path = lock.ROOT / "dist" / f"{name}-{version}.cdx.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(sbom.text())
        print(f"wrote {path.relative_to(lock.ROOT)}")
        return 0
    return audit.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
