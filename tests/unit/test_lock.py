"""The lock in `requirements/` is complete, exact, hashed, and satisfies setup.cfg; this environment is made of it."""

from __future__ import annotations

import configparser
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply import lock

LOCKS = (lock.BUILD, lock.RUN, lock.TEST)
BEHIND = "the lock has fallen behind setup.cfg: run `make lock`"


def wanted() -> dict[Path, list[Requirement]]:
    """Return what setup.cfg and pyproject.toml ask for, by the lock that has to satisfy it."""
    parser = configparser.ConfigParser()
    parser.read(lock.ROOT / "setup.cfg")
    runs = parser["options"]["install_requires"]
    tests = "".join(parser["options.extras_require"][extra] for extra in ("test", "docs", "testing", "dev"))
    builds = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = {lock.BUILD: builds, lock.RUN: runs.splitlines(), lock.TEST: (runs + tests).splitlines()}
    return {path: [Requirement(line) for line in found if line] for path, found in lines.items()}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_requirement_is_locked_within_its_range(path: Path) -> None:
    locked = lock.read(path)
    for requirement in wanted()[path]:
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name}: {BEHIND}"
        assert locked[name].version in requirement.specifier, (
            f"{requirement}, {locked[name].version}: {BEHIND}"
        )


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_hashes(path: Path) -> None:
    assert [package.name for package in lock.read(path).values() if not package.hashes] == []


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_names_no_server(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    options = [line for line in text.splitlines() if line.startswith("-")]
    assert options == []


def test_what_tests_run_is_what_the_daemons_run() -> None:
    run, test = (
        {name: (package.version, package.hashes) for name, package in lock.read(path).items()}
        for path in (lock.RUN, lock.TEST)
    )
    assert {name: test.get(name) for name in run} == run


def test_what_builds_the_package_is_not_locked_otherwise_for_the_tests() -> None:
    build, test = lock.read(lock.BUILD), lock.read(lock.TEST)
    assert {name: test[name].version for name in build if name in test} == {
        name: package.version for name, package in build.items() if name in test
    }


@pytest.mark.parametrize("python", lock.PYTHONS)
@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_what_a_locked_package_needs_is_locked_too(path: Path, python: str) -> None:
    locked = lock.read(path)
    extras = {
        canonicalize_name(each.name): each.extras
        for each in (*wanted()[lock.TEST], *wanted()[lock.RUN])
        if each.extras
    }
    here = lock.linux(python)
    missing = []
    for package in locked.values():
        if package.marker is not None and not package.marker.evaluate(here):
            continue
        for line in metadata.requires(package.name) or []:
            required = Requirement(line)
            name = canonicalize_name(required.name)
            asked = ("", *extras.get(package.name, ()))
            if required.marker is None or any(required.marker.evaluate(lock.linux(python, e)) for e in asked):
                found = locked.get(name)
                if found is None or found.version not in required.specifier:
                    missing.append(f"{package.name} needs {required}, locked is {found and found.version}")
                elif found.marker is not None and not found.marker.evaluate(here):
                    missing.append(f"{package.name} needs {required}, locked not for Python {python}")
    assert missing == []


def test_this_environment_is_made_of_the_lock() -> None:
    other = {
        package.name: (metadata.version(package.name), package.version)
        for package in (*lock.read(lock.TEST).values(), *lock.read(lock.BUILD).values())
        if package.marker is None or package.marker.evaluate()
        if metadata.version(package.name) != package.version
    }
    assert other == {}, "installed, locked: run `make install-tools`"


@pytest.mark.parametrize("line", ["aiohttp>=3", "aiohttp==3.*", "aiohttp", "aiohttp==1,==2"])
def test_a_lock_that_pins_no_exact_version_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.txt").write_text(f"{line} \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ValueError, match=r"run\.txt pins no exact version of aiohttp"):
        lock.read(tmp_path / "run.txt")


def test_a_package_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.txt").write_text("six==1.0\nSIX==1.1\n")
    with pytest.raises(ValueError, match="names six twice"):
        lock.read(tmp_path / "run.txt")


def test_a_locked_line_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(
        "# from a tool\n"
        "Six==1.17.0 ; python_full_version < '3.13' \\\n"
        f"    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'b' * 64}\n"
        "    # via us\n"
        f"pywin32==312 ; sys_platform == 'win32' \\\n    --hash=sha256:{'c' * 64}\n"
    )
    six, pywin32 = lock.read(path).values()
    assert (six.name, six.version, six.hashes) == ("six", "1.17.0", ("a" * 64, "b" * 64))
    assert six.on_linux and not pywin32.on_linux
    assert six.pin == f"six==1.17.0 --hash=sha256:{'a' * 64} --hash=sha256:{'b' * 64}"
