"""Who can read the file of a secret: this user alone, or the service manager hands it to this process alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MODES = (0o600, 0o400)
_MODE_OF_CREDENTIALS = 0o440
"""Root's file with an access list for the service's user, whose mask stat(2) shows as the group's bits."""


def complaint(path: Path) -> str | None:
    """Return what is wrong with the mode of a secret's file, None when nothing is. Raises OSError.

    systemd gives credentials in a directory that only the service can enter (systemd.exec(5), LoadCredential=).
    """
    state = path.stat()
    mode = stat.S_IMODE(state.st_mode)
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and path.parent == Path(credentials) and (state.st_uid, mode) == (0, _MODE_OF_CREDENTIALS):
        return None
    if mode in _MODES:
        return None
    return f"{path} has mode {mode:04o}, expected 0600 or 0400: chmod 600 it"
