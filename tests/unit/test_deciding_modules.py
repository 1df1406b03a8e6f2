"""Every deciding module is covered to its last branch by its own unit test.

The list is the import-linter contract's in setup.cfg. The unit test of `relay/policy.py` is
`tests/unit/test_relay_policy.py`; a module of `ztna` may leave `ztna_` out. They run once more, alone and
under coverage, in a process of their own, so that nothing else that tests reach counts.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = "importlinter:contract:deciding"
RUN_SECONDS = 240.0
SHOWN = 12


def deciding_modules() -> dict[str, Path]:
    """Return module name -> source file, packages of the list opened up."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    found = {}
    for name in parser[CONTRACT]["source_modules"].split():
        path = ROOT / name.replace(".", "/")
        if path.is_dir():
            found |= {f"{name}.{file.stem}": file for file in path.glob("*.py") if file.stem != "__init__"}
        else:
            found[name] = path.with_suffix(".py")
    return found


def unit_test(module: str) -> Path | None:
    """Return the unit test that mirrors a module."""
    mirrored = module.replace(".", "_")
    candidates = [
        Path(__file__).with_name(f"test_{name}.py") for name in (mirrored, mirrored.removeprefix("ztna_"))
    ]
    return next((path for path in candidates if path.exists()), None)


def test_every_deciding_module_exists_and_has_its_unit_test() -> None:
    missing = [str(path) for path in deciding_modules().values() if not path.exists()]
    assert not missing, f"listed in setup.cfg but not there: {missing}"
    untested = [module for module in deciding_modules() if unit_test(module) is None]
    assert not untested, f"deciding modules without tests/unit/test_<module>.py: {untested}"


@pytest.mark.timeout(RUN_SECONDS + 30)
def test_every_branch_of_every_deciding_module_is_taken_by_its_unit_tests(tmp_path: Path) -> None:
    modules = {module: path for module, path in deciding_modules().items() if path.exists()}
    tests = sorted({str(path) for path in map(unit_test, modules) if path is not None})
    report = tmp_path / "coverage.json"
    # Without the settings in setup.cfg, whose list of sources would put the includes out of force.
    coverage = [sys.executable, "-m", "coverage"]
    settings = [f"--rcfile={os.devnull}"]
    run = [*coverage, "run", *settings, "--branch", f"--include={','.join(map(str, modules.values()))}"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))
    }
    environment["COVERAGE_FILE"] = str(tmp_path / "data")
    done = subprocess.run(
        [*run, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    subprocess.run(
        [*coverage, "json", *settings, "-q", "-o", str(report)],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    files = json.loads(report.read_text())["files"]
    short = []
    for module, path in modules.items():
        measured = files.get(str(path.relative_to(ROOT)))
        if measured is None:
            short.append(f"{module}: never imported")
            continue
        missing = [*measured["missing_lines"], *(f"{a}->{b}" for a, b in measured["missing_branches"])]
        if missing:
            short.append(
                f"{module}: {', '.join(map(str, missing[:SHOWN]))}{', ...' * (len(missing) > SHOWN)}"
            )
    assert not short, "lines and branches not taken by their unit tests:\n  " + "\n  ".join(short)
