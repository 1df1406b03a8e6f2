"""Every package that the mesh runs with has a licence that a work under Apache-2.0 may use, and the page says which."""

from __future__ import annotations

from importlib import metadata

import pytest

from tests.supply import licences, lock
from tests.supply.__main__ import PAGE, TABLE_BEGINS, with_table


def test_every_package_may_be_used() -> None:
    found = {name: licences.of(name) for name, package in lock.read(lock.RUN).items() if package.on_linux}
    assert {name: said for name, said in found.items() if not licences.may_be_used(name, said)} == {}


def test_every_exception_is_in_use_and_justified_on_the_page() -> None:
    locked = lock.read(lock.RUN)
    for name, (licence, why) in licences.EXCEPTIONS.items():
        assert name in locked and licences.of(name) == licence and why
        assert f"`{name}`" in PAGE.read_text().partition(TABLE_BEGINS)[0]


def test_what_was_read_by_hand_is_in_use() -> None:
    assert licences.READ.keys() <= lock.read(lock.RUN).keys()


def test_the_page_lists_what_is_locked() -> None:
    page = PAGE.read_text()
    assert page == with_table(page, licences.table()), "run `make lock`"


@pytest.mark.parametrize(
    ("expression", "may"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-2-Clause", True),
        ("GPL-2.0-or-later OR Apache-2.0", True),
        ("GPL-2.0-or-later AND Apache-2.0", False),
        ("(GPL-3.0-only OR MIT) AND (ISC OR AGPL-3.0-only)", True),
        ("AGPL-3.0-only", False),
        ("MPL-2.0", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
    ],
)
def test_one_permissive_choice_is_enough_and_every_part_counts(expression: str, may: bool) -> None:
    assert licences.may_be_used("some-package", expression) is may


def test_an_exception_holds_for_its_licence_only() -> None:
    assert licences.may_be_used("certifi", "MPL-2.0")
    assert not licences.may_be_used("certifi", "GPL-3.0-only")


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("License-Expression: MIT OR Apache-2.0\nLicense: BSD", "MIT OR Apache-2.0"),
        ("License: Apache 2.0", "Apache-2.0"),
        ("License: MIT\nClassifier: License :: OSI Approved :: MIT License", "MIT"),
        ("Classifier: Topic :: System\nClassifier: License :: OSI Approved :: MIT License", "MIT"),
    ],
)
def test_the_licence_is_what_the_metadata_says(
    monkeypatch: pytest.MonkeyPatch, lines: str, licence: str
) -> None:
    _pretend(monkeypatch, lines)
    assert licences.of("some-package") == licence


@pytest.mark.parametrize(
    "lines", ["License: as is", "License: BSD", "Classifier: License :: Other", "Name: x"]
)
def test_a_licence_that_is_not_known_has_to_be_read(monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    _pretend(monkeypatch, lines)
    with pytest.raises(licences.LicenceUnknown, match=r"some-package says .*read its licence"):
        licences.of("some-package")


def _pretend(monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    class Pretended(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return f"Metadata-Version: 2.4\nVersion: 1\n{lines}\n" if filename == "METADATA" else None

        def locate_file(self, path: object) -> object:
            raise NotImplementedError

    monkeypatch.setattr(metadata, "metadata", lambda name: Pretended().metadata)
