"""libnftables by ctypes: runs nft commands in this process, atomically and without a fork.

One context is one netlink socket, so tables with `flags owner` live exactly as long as it (and so die with the
process, however that ends). Knows no rule of ours. Source: libnftables(3).
"""

from __future__ import annotations

import ctypes
from typing import Final

from ztna.errors import ZtnaError

LIBRARY: Final = "libnftables.so.1"
_OUTPUT_JSON: Final = 1 << 4
ERROR_CHARACTERS: Final = 200


class NftError(ZtnaError):
    """nft said no; nothing of the command took effect."""


class Nft:
    """A context of libnftables; its netlink socket belongs to the network namespace of who makes it."""

    def __init__(self) -> None:
        """Load the library. Raises NftError when it is not installed."""
        try:
            self._library = _library()
        except OSError as error:
            raise NftError(f"{LIBRARY}: {error}") from None
        self._context: int | None = self._library.nft_ctx_new(0)
        if not self._context:
            raise NftError(f"{LIBRARY}: no netlink socket")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_output_set_flags(self._context, _OUTPUT_JSON)

    def run(self, commands: str) -> str:
        """Run commands as one transaction; return what was printed, as JSON. Raises NftError."""
        if self._context is None:
            raise NftError("closed")
        status = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        said: bytes = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if status != 0:
            first = said.decode(errors="replace").partition("\n")[0]
            raise NftError(f"nft: {first[:ERROR_CHARACTERS] or f'status {status}'}")
        printed: bytes = self._library.nft_ctx_get_output_buffer(self._context) or b""
        return printed.decode()

    def close(self) -> None:
        """Give the socket back, and with it every table it owns; harmless twice."""
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = (ctypes.c_uint32,)
    library.nft_ctx_free.argtypes = (ctypes.c_void_p,)
    library.nft_ctx_free.restype = None
    library.nft_ctx_output_set_flags.argtypes = (ctypes.c_void_p, ctypes.c_uint)
    library.nft_ctx_output_set_flags.restype = None
    library.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
        getattr(library, name).restype = ctypes.c_char_p
    return library
