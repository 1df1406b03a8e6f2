"""What a host's kernel knows of networks, to be compared before and after."""

from __future__ import annotations

from tests.support.lab import until
from tests.support.namespaces import Host

_LISTS = (
    ("nft", "list", "ruleset"),
    ("ip", "rule"),
    ("ip", "-6", "rule"),
    ("ip", "route", "show", "table", "all"),
    ("ip", "-6", "route", "show", "table", "all"),
    ("ip", "-o", "addr"),
    ("ip", "-o", "link"),
)


def traces(host: Host) -> dict[str, list[str]]:
    """Return rules, routes, addresses and links of a host, by the command that lists them, once they are settled."""
    until("its addresses are settled", lambda: "tentative" not in host.run("ip", "-o", "addr"))
    return {" ".join(argv): host.run(*argv).splitlines() for argv in _LISTS}
