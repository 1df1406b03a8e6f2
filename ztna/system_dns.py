"""How a host is told to ask dnsd for the mesh's names, as file changes; and what asking says of the host.

Pure: files are texts that the caller read, changes are texts that the caller writes. Reverse names are not
routed: what stands at a virtual address is asked of dnsd itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from ztna.dns import Code, Message
from ztna.errors import ZtnaError
from ztna.names import Zone
from ztna.sections import Endpoint

RESOLV_CONF = "etc/resolv.conf"
RESOLVED_FILE = "etc/systemd/resolved.conf.d/ztna.conf"
MANAGER_FILE = "etc/NetworkManager/conf.d/ztna.conf"
MANAGER_DNSMASQ_FILE = "etc/NetworkManager/dnsmasq.d/ztna.conf"
DNSMASQ_FILE = "etc/dnsmasq.d/ztna.conf"
OUR_FILES = (RESOLVED_FILE, MANAGER_FILE, MANAGER_DNSMASQ_FILE, DNSMASQ_FILE)
DNS_PORT = 53
MARK = "# Written by `ztna dns install`; `ztna dns uninstall` removes it.\n"
_BLOCK_BEGIN, _BLOCK_END = "# ztna dns begin\n", "# ztna dns end\n"


class How(StrEnum):
    """Who resolves names on a host."""

    RESOLVED = "systemd-resolved"
    MANAGER = "NetworkManager"
    DNSMASQ = "dnsmasq"
    RESOLV_CONF = "resolv.conf"


SIGNS: Mapping[str, How] = {
    "run/systemd/resolve": How.RESOLVED,
    "run/NetworkManager": How.MANAGER,
    "etc/dnsmasq.d": How.DNSMASQ,
}
"""Directories that say who resolves names on a host; the first that is there counts."""

_COMMANDS: Mapping[How, tuple[str, ...]] = {
    How.RESOLVED: ("systemctl", "restart", "systemd-resolved"),
    How.MANAGER: ("systemctl", "restart", "NetworkManager"),
    How.DNSMASQ: ("systemctl", "restart", "dnsmasq"),
}
_OF_FILE = {
    RESOLVED_FILE: How.RESOLVED,
    MANAGER_FILE: How.MANAGER,
    MANAGER_DNSMASQ_FILE: How.MANAGER,
    DNSMASQ_FILE: How.DNSMASQ,
}


class SystemDnsError(ZtnaError):
    """What cannot be installed; says why, and what would help."""


class Seen(msgspec.Struct, frozen=True):
    """What a host looks like: the texts of the files that are there, and which of SIGNS are. Paths from `/`."""

    files: Mapping[str, str]
    directories: frozenset[str] = frozenset()


class Change(msgspec.Struct, frozen=True):
    """A file as it is to be; None removes it."""

    path: str
    text: str | None


class Plan(msgspec.Struct, frozen=True):
    """File changes in order, and the commands that put them in force."""

    changes: tuple[Change, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()


def detect(seen: Seen) -> How:
    """Return who resolves names on this host."""
    return next((how for sign, how in SIGNS.items() if sign in seen.directories), How.RESOLV_CONF)


def install(seen: Seen, how: How, domain: Zone, server: Endpoint) -> Plan:
    """Return what routes the names of `domain` to dnsd at `server`; nothing when that is so already.

    Raises SystemDnsError for a file that somebody else wrote, and where this way cannot name the server.
    """
    wanted = _wanted(seen, how, domain, server)
    for path in wanted:
        text = seen.files.get(path)
        if path in OUR_FILES and text is not None and not text.startswith(MARK):
            raise SystemDnsError(
                f"/{path} is there, and `ztna dns install` did not write it: move it away first"
            )
    changes = tuple(Change(path, text) for path, text in wanted.items() if seen.files.get(path) != text)
    return _plan(changes, {how})


def uninstall(seen: Seen) -> Plan:
    """Return what takes back all that any install did on this host."""
    ours = [path for path in OUR_FILES if seen.files.get(path, "").startswith(MARK)]
    changes = [Change(path, None) for path in ours]
    resolv_conf = seen.files.get(RESOLV_CONF, "")
    if _without_block(resolv_conf) != resolv_conf:
        changes.append(Change(RESOLV_CONF, _without_block(resolv_conf)))
    return _plan(tuple(changes), {_OF_FILE[path] for path in ours})


def installed(seen: Seen) -> tuple[How, ...]:
    """Return the ways in which names of the mesh are routed on this host."""
    ways = {_OF_FILE[path] for path in OUR_FILES if seen.files.get(path, "").startswith(MARK)}
    if _BLOCK_BEGIN in seen.files.get(RESOLV_CONF, ""):
        ways.add(How.RESOLV_CONF)
    return tuple(sorted(ways))


def nameservers(resolv_conf: str) -> tuple[str, ...]:
    """Return the servers that resolv.conf names; the C library asks the first three."""
    lines = (line.split() for line in resolv_conf.splitlines())
    return tuple(words[1] for words in lines if len(words) > 1 and words[0] == "nameserver")[:3]


def _plan(changes: tuple[Change, ...], ways: set[How]) -> Plan:
    return Plan(changes, tuple(_COMMANDS[how] for how in sorted(ways) if changes and how in _COMMANDS))


def _wanted(seen: Seen, how: How, domain: Zone, server: Endpoint) -> Mapping[str, str]:
    # Virtual addresses are private ones, which dnsmasq would drop from answers where it stops rebinding.
    dnsmasq = f"{MARK}server=/{domain}/{server.host}#{server.port}\nrebind-domain-ok=/{domain}/\n"
    match how:
        case How.RESOLVED:
            # A port needs systemd 246.
            return {RESOLVED_FILE: f"{MARK}[Resolve]\nDNS={server}\nDomains=~{domain}\n"}
        case How.MANAGER:
            return {MANAGER_FILE: f"{MARK}[main]\ndns=dnsmasq\n", MANAGER_DNSMASQ_FILE: dnsmasq}
        case How.DNSMASQ:
            return {DNSMASQ_FILE: dnsmasq}
    if server.port != DNS_PORT:
        raise SystemDnsError(
            f"resolv.conf cannot name the port of {server}: let dnsd listen on port {DNS_PORT} "
            "(dnsd.listen) and forward other names (dnsd.upstreams), or install dnsmasq"
        )
    block = f"{_BLOCK_BEGIN}nameserver {server.host}\n{_BLOCK_END}"
    return {RESOLV_CONF: block + _without_block(seen.files.get(RESOLV_CONF, ""))}


def _without_block(text: str) -> str:
    before, begin, rest = text.partition(_BLOCK_BEGIN)
    _, end, after = rest.partition(_BLOCK_END)
    return before + after if begin and end else text


# What asking says


class Verdict(StrEnum):
    """What `ztna doctor dns` finds."""

    FINE = "fine"
    HIJACKED = "hijacked"
    NOT_REGISTERED = "not_registered"
    TIMING_OUT = "timing_out"
    DNSD_SILENT = "dnsd_silent"
    DNSD_WRONG = "dnsd_wrong"


class Heard(msgspec.Struct, frozen=True):
    """What came back for a name that nobody has, and for the zone's freshness; None for no answer in time."""

    random: Message | None
    fresh: Message | None


def judge(domain: Zone, directly: Heard, by_host: Heard, *, resolves_random: bool) -> tuple[Verdict, str]:
    """Return what is wrong and what to do about it.

    `resolves_random` says that the C library found an address for the name that nobody has.
    """
    if directly.random is None:
        return (
            Verdict.DNSD_SILENT,
            "dnsd does not answer: does it run there, and may this host ask (dnsd.allow)?",
        )
    if directly.random.code != Code.NXDOMAIN or not directly.random.authoritative:
        return Verdict.DNSD_WRONG, (
            f"what answers there is no dnsd for {domain}: code {directly.random.code} for a name that nobody has"
        )
    if resolves_random or (by_host.random is not None and by_host.random.answers):
        return Verdict.HIJACKED, f"somebody answers for every name in {domain}: the names are not the mesh's"
    if by_host.random is None and by_host.fresh is None:
        return Verdict.TIMING_OUT, "the host's resolver does not answer: it may ask a dnsd that is gone"
    if by_host.fresh is None or not by_host.fresh.answers:
        return Verdict.NOT_REGISTERED, f"the host's resolver does not know {domain}: ztna dns install"
    return Verdict.FINE, f"names in {domain} come from dnsd"
