"""`python -m tests.reference`: write docs/reference/ from the code."""

from __future__ import annotations

from tests.reference import commands, configuration, consul, limits, metrics, reasons, records
from tests.reference.markdown import ROOT

DIRECTORY = ROOT / "docs" / "reference"
PAGES = {
    "configuration.md": configuration.page,
    "cli.md": commands.page,
    "records.md": records.page,
    "consul.md": consul.page,
    "metrics.md": metrics.page,
    "reasons.md": reasons.page,
    "limits.md": limits.page,
}


def main() -> None:
    """Write every page."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (DIRECTORY / name).write_text(page())


if __name__ == "__main__":
    main()
