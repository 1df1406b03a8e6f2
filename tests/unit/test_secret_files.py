"""ztna.secret_files: modes that keep a secret, and what systemd hands over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ztna.secret_files import complaint


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("secret")
    return file


@pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o400, True), (0o440, False), (0o644, False)])
def test_only_its_owner_may_read_it(key: Path, mode: int, fine: bool) -> None:
    key.chmod(mode)
    said = complaint(key)
    assert said is None if fine else said == f"{key} has mode {mode:04o}, expected 0600 or 0400: chmod 600 it"


def test_roots_credential_with_an_access_list_is_taken_from_its_directory_alone(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(key.parent.parent))
    assert complaint(key)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(key.parent))
    owned_by_root = key.stat().st_uid == 0
    assert (complaint(key) is None) == owned_by_root
    key.chmod(0o444)
    assert complaint(key)
    key.chmod(0o440)
    if os.geteuid() == 0:
        os.chown(key, 1000, 1000)
    assert complaint(key)


def test_a_file_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        complaint(tmp_path / "nothing")
