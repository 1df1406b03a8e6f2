"""The command line of ztna-relay. Knows only how to start; relay.daemon does the work."""

from __future__ import annotations

from relay.daemon import run
from ztna.runtime import daemon_command

main = daemon_command("ztna-relay", "relay", run)
