"""Fixtures for every test, and the last lines of a run: which Consuls it was proved on, and which not."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from tests.support.consul import (
    NEWEST,
    OLDEST,
    REAL_KINDS,
    VERSIONS_TESTED,
    _shared_consuls,
    acl_consul,
    consul,
    find_binary,
    own_consul,
    unique,
)
from tests.support.lanes import Lanes

# What takes longest, so that with several workers none is left alone with it at the end.
LONG_FIRST = (
    "tests/property/test_mutations_",
    "tests/e2e/",
    "tests/faults/",
    "tests/unit/test_deciding_modules",
)

__all__ = ["_shared_consuls", "acl_consul", "consul", "own_consul", "unique"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make test` ask for a worker beside those of the cores."""
    parser.addoption("--waiting-worker", action="store_true", help="the last worker runs what mostly waits")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes | None:
    """Give what mostly waits to a worker of its own where that is asked for."""
    return Lanes(config, log) if config.getoption("--waiting-worker") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long files first when several workers share the run, which is where their order matters."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: (not item.nodeid.startswith(LONG_FIRST), item.path.parent.name == "unit"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what is left out under CI, and show what the processes of an open lab said when its test failed."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"left out, and CI must have it: {_reason(report)}"
    used = sys.modules.get("tests.support.lab")
    if report.failed and used is not None:
        report.sections += used.open_tails()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests passed on which Consul, and what was not proved for want of which part."""
    skipped = Counter(_reason(report) for report in terminalreporter.getreports("skipped"))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"NOT proved, {count} left out: {reason}")
    passed = Counter(
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == VERSIONS_TESTED
    )
    if passed:
        counted = ", ".join(f"{version} ({count} tests)" for version, count in sorted(passed.items()))
        terminalreporter.write_line(f"Consul: passed on {counted}")
    names = {"oldest": f"the oldest supported Consul ({OLDEST})", "newest": f"the newest Consul ({NEWEST})"}
    missing = [names[kind] for kind in REAL_KINDS if find_binary(kind) is None]
    if missing:
        terminalreporter.write_line(
            f"Consul: NOT proved on {' and '.join(missing)}: not here; `make peers` gets it"
        )


def _reason(report: pytest.TestReport) -> str:
    place_and_words = report.longrepr
    words = place_and_words[2] if isinstance(place_and_words, tuple | list) else place_and_words
    return str(words).removeprefix("Skipped: ")
