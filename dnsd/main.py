"""The command line of ztna-dnsd. Knows only how to start; dnsd.daemon does the work."""

from __future__ import annotations

from dnsd.daemon import run
from ztna.runtime import daemon_command

main = daemon_command("ztna-dnsd", "dnsd", run)
