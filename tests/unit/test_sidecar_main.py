"""`ztna-sidecar`: two roles, only one imported."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from sidecar.main import main


def test_lists_its_roles() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "connector" in result.output and "agent" in result.output


def test_an_unknown_role_is_wrong_usage() -> None:
    assert CliRunner().invoke(main, ["router"]).exit_code == 2


def test_each_role_has_its_own_command() -> None:
    for role in ("connector", "agent"):
        result = CliRunner().invoke(main, [role, "--help"])
        assert result.exit_code == 0 and "--config" in result.output


def test_a_missing_configuration_says_what_is_missing() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sidecar", "connector"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "connector" in result.stderr and "Traceback" not in result.stderr


def test_the_connector_does_not_import_the_agent() -> None:
    code = "import sys, sidecar.connector.daemon; sys.exit(any(m.startswith('sidecar.agent') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
