"""Names as types: an object that exists is valid (design.md 5). Pure; knows nothing of certificates or DNS messages."""

from __future__ import annotations

import re

from ztna.errors import BadName

SERVICE_NAME_CHARACTERS = 62
CONNECTOR_ID_CHARACTERS = 63
RELAY_NAME_CHARACTERS = 63
RESERVED_SERVICE_NAMES = frozenset({"connector", "relay", "ns"})
SESSION_ID_BYTES = 8

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def is_label(text: str) -> bool:
    """Say whether the text is one lower-case LDH label of 1 to 63 characters (RFC 1034 3.5)."""
    return _LABEL.fullmatch(text) is not None


class ServiceName(str):
    """A service: one lower-case LDH label, 1 to 62 characters, none of the reserved ones."""

    __slots__ = ()

    def __new__(cls, text: str) -> ServiceName:
        if not is_label(text) or len(text) > SERVICE_NAME_CHARACTERS:
            raise BadName(
                f"service name {text!r}: expected one lower-case label of letters, digits and hyphens, "
                f"1 to {SERVICE_NAME_CHARACTERS} characters"
            )
        if text in RESERVED_SERVICE_NAMES:
            raise BadName(f"service name {text!r} is reserved; choose another")
        return super().__new__(cls, text)


class ConnectorId(str):
    """A connector: one LDH label, `<name>` or `<name>--<instance>`; `name` is what its certificate carries."""

    __slots__ = ()

    def __new__(cls, text: str) -> ConnectorId:
        if not is_label(text):
            raise BadName(
                f"connector id {text!r}: expected one lower-case label of letters, digits and hyphens, "
                f"1 to {CONNECTOR_ID_CHARACTERS} characters"
            )
        return super().__new__(cls, text)

    @property
    def name(self) -> str:
        """The part before `--`, which the leaf's `id.<name>.ztna` must carry."""
        return self.partition("--")[0]


class RelayName(str):
    """A relay: one lower-case LDH label without `--`, as its certificate carries it in `relay.<name>.ztna`."""

    __slots__ = ()

    def __new__(cls, text: str) -> RelayName:
        if not is_label(text) or "--" in text:
            raise BadName(
                f"relay name {text!r}: expected the <name> of relay.<name>.ztna in its certificate, one lower-case "
                f"label of letters, digits and single hyphens, 1 to {RELAY_NAME_CHARACTERS} characters"
            )
        return super().__new__(cls, text)


class Zone(str):
    """The DNS zone, lower case, without the trailing dot, e.g. `ztna.local`."""

    __slots__ = ()

    def __new__(cls, text: str) -> Zone:
        zone = text.lower().removesuffix(".")
        labels = zone.split(".")
        if not all(map(is_label, labels)) or len(zone) > 180:
            raise BadName(f"zone {text!r}: expected dot-separated labels of letters, digits and hyphens")
        return super().__new__(cls, zone)


class SessionId(str):
    """A session: 16 lower-case hex digits, 64 bits drawn by the relay."""

    __slots__ = ()

    def __new__(cls, text: str) -> SessionId:
        if re.fullmatch(r"[0-9a-f]{16}", text) is None:
            raise BadName(f"session {text!r}: expected 16 lower-case hex digits")
        return super().__new__(cls, text)

    @classmethod
    def from_bytes(cls, raw: bytes) -> SessionId:
        """Make one of 8 bytes."""
        return cls(raw.hex())

    def to_bytes(self) -> bytes:
        """Return the 8 bytes of the 0x2E datagram."""
        return bytes.fromhex(self)
