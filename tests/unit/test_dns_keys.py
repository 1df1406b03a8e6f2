"""ztna.dns_keys: what is read, and every reason not to take a key."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from ztna.config import TsigKeyConfig
from ztna.dns_keys import load_key, load_keys
from ztna.errors import ConfigError

SECRET = bytes(range(32))


def key_file(
    tmp_path: Path, text: bytes = base64.b64encode(SECRET) + b"\n", mode: int = 0o600
) -> TsigKeyConfig:
    path = tmp_path / "dns.key"
    path.write_bytes(text)
    path.chmod(mode)
    return TsigKeyConfig(name="Edge.ztna.", secret_file=str(path))


def test_a_key_is_read(tmp_path: Path) -> None:
    key = load_key(key_file(tmp_path), "relay.dns_key")
    assert (key.name, key.algorithm, key.secret) == ("edge.ztna", "hmac-sha256", SECRET)


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (b"", 0o600, "holds 0 bytes"),
        (b"not base64!", 0o600, "base64 alone"),
        (base64.b64encode(SECRET), 0o644, "mode 0644"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: bytes, mode: int, told: str) -> None:
    with pytest.raises(ConfigError, match=f"relay.dns_key.secret_file: .*{told}"):
        load_key(key_file(tmp_path, text, mode), "relay.dns_key")


def test_a_missing_file_and_a_bad_name_are_named(tmp_path: Path) -> None:
    missing = TsigKeyConfig(name="a", secret_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_key(missing, "relay.dns_key")
    with pytest.raises(ConfigError, match="expected a DNS name"):
        load_key(TsigKeyConfig(name="a b", secret_file="/"), "relay.dns_key")


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    config = key_file(tmp_path)
    assert list(load_keys([config], "dnsd.keys")) == ["edge.ztna"]
    with pytest.raises(ConfigError, match=r"dnsd.keys\[1\].name: there are two"):
        load_keys([config, config], "dnsd.keys")
