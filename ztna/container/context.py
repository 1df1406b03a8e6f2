"""Writes the folder that the image is built in: the Dockerfile, the lock, and the wheel of this very version.

    python -m ztna.container.context FOLDER [--wheel ztna_mesh-*.whl] [--wheels FOLDER]

Without `--wheel` the installed distribution is packed into one again, so that whoever has installed ztna-mesh can
build its image. Knows nothing of Docker.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata, resources
from pathlib import Path

import click

from ztna.errors import ZtnaError

DISTRIBUTION = "ztna-mesh"
_OF_THIS_INSTALLATION = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of each file in a wheel: the same files make the same wheel."""


def write(folder: Path, *, wheel: Path | None = None, wheels: Path | None = None) -> str:
    """Fill an empty folder and return a digest of all that is in it.

    `wheel` is ztna-mesh's own, else the installed one; `wheels` a folder with those that the lock names, for a build
    that asks no index. Raises ZtnaError when there is no wheel to be had, or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ZtnaError(f"{folder} is not empty; name a new folder")
    place = folder / "wheels"
    place.mkdir(parents=True)
    for name in ("Dockerfile", "run.txt"):
        (folder / name).write_bytes((resources.files("ztna") / "container" / name).read_bytes())
    if wheel is None:
        pack_installed(folder)
    else:
        shutil.copy(wheel, folder)
    for each in sorted(wheels.glob("*.whl")) if wheels else ():
        shutil.copyfile(each, place / each.name)
    return _digest(folder)


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def pack_installed(folder: Path) -> Path:
    """Pack the installed distribution into a wheel again and return it.

    Raises ZtnaError for an editable installation, which has no files of its own. Source: the binary distribution
    format, packaging.python.org.
    """
    installed = metadata.distribution(DISTRIBUTION)
    listed = [file for file in installed.files or () if ".." not in file.parts]
    kept = [
        file for file in listed if file.name not in _OF_THIS_INSTALLATION and "__pycache__" not in file.parts
    ]
    wheel = installed.read_text("WHEEL")
    if wheel is None or not any(file.parts[0] == "ztna" for file in kept):
        raise ZtnaError(
            f"{DISTRIBUTION} is installed as editable, so it cannot be packed: build a wheel (`make dist`) and name it"
        )
    tag = next(line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: "))
    target = folder / f"{DISTRIBUTION.replace('-', '_')}-{installed.version}-{tag}.whl"
    records = next(file.parts[0] for file in kept if file.parts[0].endswith(".dist-info"))
    _zip(target, [(str(file), Path(str(file.locate())).read_bytes()) for file in kept], f"{records}/RECORD")
    return target


def _zip(target: Path, files: Iterable[tuple[str, bytes]], record: str) -> None:
    lines = [f"{record},,"]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files):
            archive.writestr(_entry(name), data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}")
        archive.writestr(_entry(record), "\n".join(lines) + "\n")


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="ztna-mesh's own."
)
@click.option("--wheels", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of the lock.")
def main(folder: Path, wheel: Path | None, wheels: Path | None) -> None:
    """Write to FOLDER what the image is built from; `docker build FOLDER` builds it."""
    try:
        digest = write(folder, wheel=wheel, wheels=wheels)
    except ZtnaError as error:
        click.echo(f"{error}", err=True)
        sys.exit(1)
    click.echo(f"{folder}: sha256:{digest}")


if __name__ == "__main__":
    main()
