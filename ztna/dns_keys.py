"""Reads the TSIG keys that a configuration names. What they sign is ztna.tsig's."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ztna import secret_files
from ztna.config import TsigKeyConfig
from ztna.errors import ConfigError
from ztna.tsig import SECRET_BYTES_MIN, Key

SECRET_FILE_BYTES_MAX = 4096
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


def load_key(config: TsigKeyConfig, where: str) -> Key:
    """Read one key. Raises ConfigError beginning with `where`, the path of the key in the configuration."""
    name = config.name.lower().rstrip(".")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}.name: expected a DNS name, got {config.name!r}")
    path = Path(config.secret_file)
    try:
        with path.open("rb") as file:
            wrong = secret_files.complaint(path)
            text = file.read(SECRET_FILE_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{where}.secret_file: {path} cannot be read: {error.strerror}") from None
    if wrong:
        raise ConfigError(f"{where}.secret_file: {wrong}")
    try:
        secret = base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        raise ConfigError(f"{where}.secret_file: {path} does not hold base64 alone") from None
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"{where}.secret_file: {path} holds {len(secret)} bytes, expected {SECRET_BYTES_MIN} or more: "
            "openssl rand -base64 32"
        )
    return Key(name, config.algorithm, secret)


def load_keys(configs: Iterable[TsigKeyConfig], where: str) -> Mapping[str, Key]:
    """Read several keys, by name. Raises ConfigError, for two of one name too."""
    keys: dict[str, Key] = {}
    for place, config in enumerate(configs):
        key = load_key(config, f"{where}[{place}]")
        if key.name in keys:
            raise ConfigError(f"{where}[{place}].name: there are two keys named {key.name}")
        keys[key.name] = key
    return keys
