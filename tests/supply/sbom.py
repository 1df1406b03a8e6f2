"""The bill of materials: what `make install` installs on Linux, as CycloneDX 1.6.

A component has the version and the hashes of the lock (one for each file that may be installed), and the
licence and dependencies that its metadata names. Files that a package carries inside are not looked into.
"""

from __future__ import annotations

import configparser
from importlib import metadata

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply import licences, lock

SCHEMA = SchemaVersion.V1_6


def root() -> tuple[str, str, str]:
    """Return the mesh's own name, version and licence, from setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(lock.ROOT / "setup.cfg")
    about = parser["metadata"]
    return about["name"], about["version"], about["license"]


def needs(name: str) -> set[str]:
    """Return what an installed package requires on Linux, with any Python that the lock serves."""
    found: set[str] = set()
    for line in metadata.requires(name) or []:
        required = Requirement(line)
        if required.marker is None or any(required.marker.evaluate(lock.linux(p)) for p in lock.PYTHONS):
            found.add(canonicalize_name(required.name))
    return found


def bill() -> Bom:
    """Return the bill of materials of the lock."""
    name, version, licence = root()
    locked = {each.name: each for each in lock.read(lock.RUN).values() if each.on_linux}
    mesh = _component(name, version, licence, (), ComponentType.APPLICATION)
    components = {
        each.name: _component(
            each.name, each.version, licences.of(each.name), each.hashes, ComponentType.LIBRARY
        )
        for each in locked.values()
    }
    bom = Bom(components=components.values())
    bom.metadata.component = mesh
    for dependent, component in ((name, mesh), *components.items()):
        bom.register_dependency(component, [components[each] for each in sorted(needs(dependent))])
    return bom


def text() -> str:
    """Return the bill of materials as CycloneDX JSON."""
    written: str = make_outputter(bill(), OutputFormat.JSON, SCHEMA).output_as_string(indent=2)
    return written + "\n"


def _component(
    name: str, version: str, licence: str, hashes: tuple[str, ...], kind: ComponentType
) -> Component:
    purl = PackageURL("pypi", name=name, version=version)
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=str(purl),
        purl=purl,
        licenses=[LicenseFactory().make_from_string(licence)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=each) for each in hashes],
    )
