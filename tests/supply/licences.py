"""Which licence each locked package has, and whether a work under Apache-2.0 may use it.

What a package says of itself in its metadata decides; where that is not SPDX, `SAID` translates it.
"""

from __future__ import annotations

from importlib import metadata

from license_expression import AND, OR, LicenseSymbol, get_spdx_licensing

from tests.supply import lock

# Licences that ask for notices at most: anything may be combined with them.
PERMISSIVE = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "MIT",
        "MIT-0",
        "PSF-2.0",
        "Unlicense",
        "Zlib",
    }
)

# Packages whose licence is not permissive, each with why it may be used all the same.
EXCEPTIONS = {
    "certifi": (
        "MPL-2.0",
        "weak copyleft, file by file: it is installed beside the mesh, unchanged, and its source is its package",
    ),
}

# What the metadata says in words -> SPDX.
SAID = {
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
}

# Packages whose metadata says too little, each read in the licence file that it ships.
READ = {
    "dnslib": "BSD-2-Clause",
    "hyperframe": "MIT",
    "uvloop": "MIT OR Apache-2.0",
}

_SPDX = get_spdx_licensing()


class LicenceUnknown(Exception):
    """A package does not say its licence in a way that is known here."""


def of(name: str) -> str:
    """Return the licence of an installed package as an SPDX expression.

    Raises LicenceUnknown when its metadata has none that SPDX or the tables here know: read the licence
    file that it ships, then say so in `SAID` or `READ`.
    """
    said = metadata.metadata(name)
    words: list[str] = [*said.get_all("License-Expression", []), *([READ[name]] if name in READ else [])]
    words += said.get_all("License", [])
    words += [line for line in said.get_all("Classifier", []) if line.startswith("License ::")]
    for word in words:
        expression = SAID.get(word, word)
        if not _SPDX.validate(expression).errors:
            return expression
    raise LicenceUnknown(f"{name} says {words}: read its licence, then name it in READ")


def may_be_used(name: str, expression: str) -> bool:
    """Whether a licence is permissive by one of its choices, or this package is an exception with that licence."""
    if name in EXCEPTIONS:
        return EXCEPTIONS[name][0] == expression
    return _permissive(_SPDX.parse(expression, validate=True))


def table() -> str:
    """Return `docs/dependencies.md`'s table: what `make install` installs on Linux, from the lock and the metadata."""
    rows = ["| Package | Version | Licence |", "|---|---|---|"]
    for package in lock.read(lock.RUN).values():
        if package.on_linux:
            rows.append(f"| {package.name} | {package.version} | {of(package.name)} |")
    return "\n".join(rows) + "\n"


def _permissive(expression: object) -> bool:
    if isinstance(expression, LicenseSymbol):
        return expression.key in PERMISSIVE
    if isinstance(expression, OR):
        return any(map(_permissive, expression.args))
    return isinstance(expression, AND) and all(map(_permissive, expression.args))
