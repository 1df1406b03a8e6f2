"""The command `ztna-sidecar`: one program, two roles; only the role that runs is imported."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

import click

from ztna.runtime import daemon_command

ROLES = {"connector": "sidecar.connector.daemon", "agent": "sidecar.agent.daemon"}


class _Roles(click.Group):
    """Makes a role's command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ROLES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ROLES:
            return None
        return daemon_command(f"ztna-sidecar {cmd_name}", cmd_name, import_module(ROLES[cmd_name]).body)


@click.group(cls=_Roles, name="ztna-sidecar", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("ztna-mesh"), prog_name="ztna-sidecar")
def main() -> None:
    """Bring a host or workload into the mesh: serve its services (connector) or reach others' (agent)."""
