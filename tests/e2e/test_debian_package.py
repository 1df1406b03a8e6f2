"""The package of `make deb`, in a Debian of its own: installs, upgrades keeping changes, purges clean."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import require_tools
from tests.support.distribution import ROOT, build, run
from tests.support.docker import base_archive
from tests.support.pages import blocks

pytestmark = pytest.mark.slow

BUILDER = ROOT / "ztna/host/debian/build"
DAEMONS = ("dnsd", "relay", "connector", "agent")
PAGE = ROOT / "docs/hosts.md"
BOOKKEEPING = (
    *("var/lib/dpkg", "var/log/dpkg.log", "var/cache/ldconfig"),
    *("var/lib/apt", "var/log/apt", "var/cache/apt"),
)
"""What dpkg and apt themselves write."""


class Chroot:
    """A Debian in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *argv: str) -> str:
        return run("chroot", self.root, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *argv)

    def install(self, package: Path) -> str:
        """Install or upgrade as an unattended upgrade does: of two changes, the host's stays."""
        (self.root / "tmp/package.deb").write_bytes(package.read_bytes())
        # Without a sync a file, which nobody needs here.
        forced = ("--force-unsafe-io", "--force-confdef", "--force-confold")
        return self.run("dpkg", *forced, "--install", "/tmp/package.deb")

    def install_as_told(self, package: Path) -> str:
        """Install as docs/hosts.md says; without a network, as all that it depends on is there."""
        (line,) = (line for block in blocks(PAGE, "sh") for line in block if ".deb" in line)
        (self.root / "tmp/dist").mkdir()
        (self.root / "tmp/dist" / package.name).write_bytes(package.read_bytes())
        return self.run("sh", "-c", f"cd /tmp && {line}")

    def files(self) -> set[str]:
        """Return the paths of all there is."""
        found = set()
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                found.add(str((Path(folder) / name).relative_to(self.root)))
        return {path for path in found if not path.startswith((*BOOKKEEPING, "tmp/"))}

    def status(self) -> str:
        argv = [
            "chroot",
            str(self.root),
            "dpkg-query",
            "--show",
            "--showformat=${db:Status-Abbrev}${Version}",
            "ztna-mesh",
        ]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """This version's package, and one of a later version with other first configurations of dnsd and relay."""
    require_tools("dpkg-deb", "chroot")
    place = tmp_path_factory.mktemp("deb")
    wheel, _ = build(place / "source")
    run(BUILDER, sys.executable, wheel, place)
    (package,) = place.glob("*.deb")
    later = place / "later"
    run("dpkg-deb", "--raw-extract", package, later)
    control = later / "DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 0.1.0", "Version: 0.2.0"))
    for name in ("dnsd", "relay"):
        with (later / f"etc/ztna/{name}.yaml").open("a") as file:
            file.write("# later\n")
    run("dpkg-deb", "-Zgzip", "-z1", "--build", later, place / "later.deb")
    return package, place / "later.deb"


@pytest.fixture
def debian(tmp_path: Path) -> Iterator[Chroot]:
    archive = base_archive()
    if os.geteuid() != 0 or not archive.exists():
        why = "a Debian to install in takes root and the base image that `make peers` makes"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    run("tar", "--extract", "--gzip", "--file", archive, "--directory", tmp_path)
    yield Chroot(tmp_path)
    run("rm", "--recursive", "--force", "--one-file-system", *tmp_path.iterdir())


def test_it_installs_upgrades_keeping_what_was_changed_and_purges_clean(
    debian: Chroot, packages: tuple[Path, Path]
) -> None:
    package, later = packages
    before = debian.files()

    said = debian.install_as_told(package)
    assert debian.status() == "ii 0.1.0"
    assert "nothing is started" in said
    for program in ("ztna", "ztna-dnsd", "ztna-relay", "ztna-sidecar"):
        assert debian.run(program, "--version").startswith(f"{program}, version 0.1.0")
    for name in DAEMONS:
        assert f"for {name}" in debian.run("ztna", "check-config", "--no-files", f"/etc/ztna/{name}.yaml")
        assert (debian.root / f"usr/lib/systemd/system/ztna-{name}.service").exists()
    assert "etc/ztna/dnsd.yaml, which was there" in debian.run("ztna", "init", "host")
    assert debian.run("dpkg", "--verify", "ztna-mesh") == ""
    bash = ". /usr/share/bash-completion/completions/ztna; complete -p ztna"
    assert debian.run("bash", "-c", bash) == "complete -o nosort -F _ztna_completion ztna\n"
    for file in ("zsh/vendor-completions/_ztna", "fish/vendor_completions.d/ztna.fish"):
        assert "_ZTNA_COMPLETE" in (debian.root / "usr/share" / file).read_text()
    assert (debian.root / "usr/share/ztna-mesh/prometheus/ztna-alerts.yaml").exists()

    relay, dnsd = debian.root / "etc/ztna/relay.yaml", debian.root / "etc/ztna/dnsd.yaml"
    relay.write_text(relay.read_text().replace("edge-1", "mine"))
    said = debian.install(later)
    assert debian.status() == "ii 0.2.0"
    assert "nothing is started" not in said
    assert "name: mine" in relay.read_text() and "# later" not in relay.read_text()
    assert "# later" in dnsd.read_text(), "what nobody changed follows the package"

    for path in (
        "var/lib/private/ztna-relay/reset.key",
        "var/log/private/ztna-relay/audit.log",
        "etc/ztna/relay.key",
    ):
        (debian.root / path).parent.mkdir(parents=True, exist_ok=True)
        (debian.root / path).write_text("theirs")
    for kind in ("lib", "log"):
        (debian.root / f"var/{kind}/ztna-relay").symlink_to("private/ztna-relay")
    debian.run(
        "install",
        "-Dm644",
        "-t",
        "/etc/systemd/system/ztna-agent.service.d",
        "/usr/lib/ztna-mesh/drop-ins/agent-tun.conf",
    )
    debian.run("dpkg", "--remove", "ztna-mesh")
    assert debian.status() == "rc 0.2.0"
    assert "name: mine" in relay.read_text(), "a removed package leaves its configuration"
    assert not (debian.root / "usr/lib/ztna-mesh").exists()

    debian.run("dpkg", "--purge", "ztna-mesh")
    left = debian.files() - before
    # systemd's own folders are not ours to remove, and certificates and keys were never the package's.
    assert left <= {
        "etc/ztna", "etc/ztna/relay.key", "var/lib/private", "var/log/private", "etc/systemd", "etc/systemd/system",
    }  # fmt: skip
    assert "etc/ztna/relay.key" in left
    assert before - debian.files() == set()


def test_a_purge_where_nothing_was_added_leaves_nothing(debian: Chroot, packages: tuple[Path, Path]) -> None:
    before = debian.files()
    debian.install(packages[0])
    debian.run("dpkg", "--purge", "ztna-mesh")
    assert debian.files() == before
