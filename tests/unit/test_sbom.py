"""The bill of materials is valid CycloneDX and holds every locked package with its hashes, licence and needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cyclonedx.validation.json import JsonStrictValidator

from tests.supply import licences, lock, sbom
from tests.supply.__main__ import main


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(sbom.text())
    return loaded


def test_it_is_valid() -> None:
    assert JsonStrictValidator(sbom.SCHEMA).validate_str(sbom.text()) is None


def test_every_locked_package_is_in_it_with_its_hashes_and_licence(bill: dict[str, Any]) -> None:
    listed = {each["name"]: each for each in bill["components"]}
    locked = {name: package for name, package in lock.read(lock.RUN).items() if package.on_linux}
    assert listed.keys() == locked.keys()
    for name, package in locked.items():
        assert listed[name]["version"] == package.version
        assert listed[name]["purl"] == f"pkg:pypi/{name}@{package.version}"
        assert sorted(each["content"] for each in listed[name]["hashes"]) == sorted(package.hashes)
        (licence,) = listed[name]["licenses"]
        assert licences.of(name) == (licence.get("expression") or licence["license"]["id"])


def test_it_is_about_the_mesh_and_everything_in_it_is_needed(bill: dict[str, Any]) -> None:
    mesh = bill["metadata"]["component"]
    assert (mesh["name"], mesh["version"], mesh["type"]) == (*sbom.root()[:2], "application")
    needed = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert {"pkg:pypi/aiohttp@" + lock.read(lock.RUN)["aiohttp"].version} <= set(needed[mesh["bom-ref"]])
    reached, left = set(), [mesh["bom-ref"]]
    while left:
        reference = left.pop()
        if reference not in reached:
            reached.add(reference)
            left += needed[reference]
    assert reached == {mesh["bom-ref"], *(each["bom-ref"] for each in bill["components"])}


def test_it_names_no_server(bill: dict[str, Any]) -> None:
    assert "externalReferences" not in json.dumps([bill["components"], bill["metadata"]["component"]])


def test_the_command_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("sbom") == 0
    name, version, _ = sbom.root()
    path = f"dist/{name}-{version}.cdx.json"
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert JsonStrictValidator(sbom.SCHEMA).validate_str((lock.ROOT / path).read_text()) is None
