"""Get the real parts that tests and benches run against into a cached folder, pinned and verified.

    python tests/peers/fetch.py [consul] [consul-oldest] [nomad] [coredns] [base-image]

What is there is skipped. Go modules are built from the go.mod and go.sum beside this file, so that the checksums
are those that were committed; Debian packages, also those of the containers' base image, are verified by apt or
debootstrap against the archive's signature. Exits 1 with the reason when a part cannot be had; the others are
still got.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
GO_VERSION_MIN = (1, 25)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
OLDEST_SUITE = "bullseye"
OLDEST_PACKAGE_VERSION = "1.8.7"
IMAGE_SUITE = "bookworm"
IMAGE_NUMBER = 2
"""Of what is in it: another one for other packages, so that it is made anew."""
IMAGE_PACKAGES = "python3,python3-venv,ca-certificates,bind9-dnsutils,libnftables1"
IMAGE_LEAVES_OUT = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
)


class Unavailable(Exception):
    """A part cannot be got here; the text says why and what to do."""


def folder() -> Path:
    """Return where parts are kept; ZTNA_PEERS_DIR overrides it. tests/support/consul.py looks there too."""
    return Path(os.environ.get("ZTNA_PEERS_DIR", Path.home() / ".cache" / "ztna-mesh" / "peers"))


def say(text: str) -> None:
    """Print a progress line at once."""
    print(f"peers: {text}", flush=True)


def run(*argv: str | Path, **keywords: object) -> str:
    """Run a program and return what it printed; Unavailable with its last words when it fails."""
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, **keywords)  # type: ignore[call-overload]
    if done.returncode != 0:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise Unavailable(f"`{' '.join(str(part) for part in argv[:4])} ...` failed:\n{last}")
    return str(done.stdout)


def build_go(name: str, module: str, minutes: int) -> Callable[[], None]:
    """Return what builds a module's main program at the version in its go.mod."""

    def build() -> None:
        wrapper = HERE / name
        pinned = re.search(rf"{re.escape(module)} v(\S+)", (wrapper / "go.mod").read_text())
        if pinned is None:
            raise Unavailable(f"{wrapper / 'go.mod'} requires no {module}")
        place = folder() / f"{name}-{pinned[1]}"
        if place.exists():
            say(f"{place} is there")
            return
        go = require_go()
        say(f"building {name} {pinned[1]} from source with {go} (about {minutes} minutes on two cores) ...")
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            # -mod=readonly: what go.sum does not name is an error, never a download.
            built = Path(scratch) / name
            run(go, "build", "-mod=readonly", "-trimpath", "-o", built, module, cwd=wrapper)
            built.replace(place)
        say(f"{place}: {run(place, 'version' if name != 'coredns' else '-version').splitlines()[0]}")

    return build


def require_go() -> str:
    """Return a Go toolchain that is new enough for these programs."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    wanted = ".".join(map(str, GO_VERSION_MIN))
    if go is None:
        raise Unavailable(
            f"no Go toolchain here: install Go {wanted} or newer (Debian's is too old) so that `go` is on PATH"
        )
    said = run(go, "env", "GOVERSION").strip()
    found = re.match(r"go(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < GO_VERSION_MIN:
        raise Unavailable(f"{go} is {said}: Go {wanted} or newer is needed")
    return go


def fetch_oldest_consul() -> None:
    """Get the Consul of an older Debian release with apt, lists and cache of its own; nothing is installed."""
    place = folder() / f"consul-{OLDEST_PACKAGE_VERSION}"
    if place.exists():
        say(f"{place} is there")
        return
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise Unavailable(
            f"Consul {OLDEST_PACKAGE_VERSION} comes as a Debian package: apt-get and {KEYRING} are needed"
        )
    say(f"getting Consul {OLDEST_PACKAGE_VERSION}, the Debian {OLDEST_SUITE} package ...")
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        work = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial"):
            (work / name).mkdir(parents=True)
        source = f"deb [signed-by={KEYRING}] {debian_mirror()} {OLDEST_SUITE} main\n"
        (work / "sources.list").write_text(source)
        options = apt_options(work)
        run("apt-get", *options, "-q", "update", cwd=work)
        # apt-get checks the package's hash against the lists, and those against the archive's signature.
        run("apt-get", *options, "-q", "download", "consul", cwd=work)
        [package] = work.glob("consul_*.deb")
        if not package.name.startswith(f"consul_{OLDEST_PACKAGE_VERSION}"):
            raise Unavailable(f"expected consul {OLDEST_PACKAGE_VERSION}, the archive has {package.name}")
        run("dpkg", "-x", package, work / "unpacked")
        (work / "unpacked/usr/bin/consul").replace(place)
    say(f"{place}: {run(place, 'version').splitlines()[0]}")


def make_base_image() -> None:
    """Make the root file system that containers of the tests start from; tests/support/docker.py imports it."""
    place = folder() / f"base-{IMAGE_SUITE}-{IMAGE_NUMBER}.tar.gz"
    if place.exists():
        say(f"{place} is there")
        return
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise Unavailable("root and debootstrap (`apt-get install debootstrap`) are needed")
    say(f"making a Debian {IMAGE_SUITE} base image by debootstrap (about a minute) ...")
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        root, archive = Path(scratch) / "root", Path(scratch) / "base.tar.gz"
        run(
            "debootstrap",
            "--variant=minbase",
            f"--include={IMAGE_PACKAGES}",
            IMAGE_SUITE,
            root,
            debian_mirror(),
        )
        excluded = [f"--exclude=./{path}/*" for path in IMAGE_LEAVES_OUT]
        run("tar", "-C", root, "--gzip", *excluded, "-cf", archive, ".")
        archive.replace(place)
    say(f"{place}: {place.stat().st_size >> 20} MiB")


def apt_options(work: Path) -> list[str]:
    """Return the options that keep apt away from this machine's own configuration of sources and caches."""
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": work / "cache",
        # The download lies in a folder of ours that apt's own user may not enter.
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def debian_mirror() -> str:
    """Return the Debian mirror that this machine's own apt uses, which is the one it can reach."""
    said = run(
        "apt-get", "indextargets", "--format", "$(SITE) $(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
    )
    for line in said.splitlines():
        words = line.split()
        if len(words) >= 2 and words[-1] == "Debian" and not words[1].rstrip("/").endswith("security"):
            return words[1]
    raise Unavailable(
        "no Debian mirror in this machine's apt sources (is it Debian? has `apt-get update` run?)"
    )


PARTS: dict[str, Callable[[], None]] = {
    "consul": build_go("consul", "github.com/hashicorp/consul", 5),
    "consul-oldest": fetch_oldest_consul,
    "nomad": build_go("nomad", "github.com/hashicorp/nomad", 5),
    "coredns": build_go("coredns", "github.com/coredns/coredns", 2),
    "base-image": make_base_image,
}


def main(names: list[str]) -> int:
    """Get the named parts, all without names; return the exit status."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    folder().mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names or PARTS:
        try:
            PARTS[name]()
        except Unavailable as error:
            print(f"peers: {name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
