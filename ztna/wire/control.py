"""The messages of the control stream (`ztna-v2`): u32 length, then the JSON of one message.

    0      4
    +------+----------------------------+
    | n    | JSON, n bytes, <= 64 KiB   |     source: protocol.md, Control stream
    +------+----------------------------+

Knows no rule about who may send what; relay.policy and relay.sessions do.
"""

from __future__ import annotations

import base64
import struct
from ipaddress import IPv4Address, ip_address
from typing import Any

import msgspec

from ztna.errors import ProtocolError
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason

MESSAGE_BYTES_MAX = 64 * 1024
CANDIDATES_MAX = 8
PROTOCOL_VERSION = 2
FEATURES = frozenset(
    {
        "register", "registered", "refused", "open", "offered", "accepted", "opened", "denied", "dial",
        "dial_token", "carry", "closed", "candidate_offer", "candidate_answer", "start_punching",
        "punching_result", "health", "conflict", "drain",
    }
)  # fmt: skip

_LENGTH = struct.Struct(">I")


class Binary(bytes):
    """Bytes that travel as base64url without padding."""

    __slots__ = ()


class Secret(Binary):
    """Binary that must never be seen in a log: its repr is `***`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


class Address(msgspec.Struct, frozen=True, order=True):
    """A numeric IP address in its canonical text, and a port."""

    ip: str
    port: int

    def __post_init__(self) -> None:
        try:
            canonical = str(ip_address(self.ip))
        except ValueError:
            raise ValueError(f"address {self.ip!r}: expected an IPv4 or IPv6 address") from None
        if canonical != self.ip or not 0 <= self.port <= 65535:
            raise ValueError(f"address {self.ip!r} port {self.port}: expected canonical text and a port up to 65535")

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class LeaseRef(msgspec.Struct, frozen=True):
    """The lease an agent believes in: what `open`, `offered` and OPEN carry."""

    ip: IPv4Address
    epoch: int


class Offering(msgspec.Struct, frozen=True):
    """One service of a `register`."""

    name: ServiceName
    ports: tuple[Port, ...] = ()


class PeerIdentity(msgspec.Struct, frozen=True):
    """The agent as the relay verified it: its name and the SHA-256 of its leaf, hex."""

    name: str
    fingerprint: str


class ForwarderBind(msgspec.Struct, frozen=True):
    """Where one side of a link binds at the forwarder, and with what."""

    address: Address
    bind_id: Binary
    bind_secret: Secret


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """The root of all messages; the tag is the class name in snake case."""


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class Hello(Message, tag=_snake):
    """First each way."""

    version: int = PROTOCOL_VERSION
    features: frozenset[str] = FEATURES


class Register(Message, tag=_snake):
    """Connector -> relay."""

    connector_id: ConnectorId
    services: tuple[Offering, ...]
    link_address: Address | None = None


class Registered(Message, tag=_snake):
    """Relay -> connector, one per service."""

    name: ServiceName


class Refused(Message, tag=_snake):
    """Relay -> connector, one per service refused."""

    name: str
    reason: Reason


class Open(Message, tag=_snake):
    """Agent -> relay."""

    request: int
    service: ServiceName
    lease: LeaseRef | None = None
    connector_id: ConnectorId | None = None


class Offered(Message, tag=_snake):
    """Relay -> connector."""

    session: SessionId
    service: ServiceName
    agent: PeerIdentity
    lease: LeaseRef | None = None
    forwarder: ForwarderBind | None = None
    probe_key: Secret = Secret()
    v1: bool = False


class Accepted(Message, tag=_snake):
    """Connector -> relay."""

    session: SessionId


class Opened(Message, tag=_snake):
    """Relay -> agent."""

    request: int
    session: SessionId
    service: ServiceName
    connector_id: ConnectorId
    fingerprint: str
    link_address: Address | None = None
    forwarder: ForwarderBind | None = None
    probe_key: Secret = Secret()


class Denied(Message, tag=_snake):
    """Relay -> agent."""

    request: int
    service: str
    reason: Reason


class Dial(Message, tag=_snake):
    """Agent -> relay."""

    session: SessionId


class DialToken(Message, tag=_snake):
    """Relay -> agent: one TCP connection to the forwarder within 30 s."""

    session: SessionId
    token: Secret


class Carry(Message, tag=_snake):
    """Relay -> connector: an agent waits at the forwarder's TCP port."""

    session: SessionId
    token: Secret


class Closed(Message, tag=_snake):
    """Any -> relay -> the other."""

    session: SessionId
    reason: Reason


class CandidateOffer(Message, tag=_snake):
    """Agent -> relay -> that connector."""

    session: SessionId
    candidates: tuple[Address, ...]


class CandidateAnswer(Message, tag=_snake):
    """Connector -> relay -> that agent."""

    session: SessionId
    candidates: tuple[Address, ...]


class StartPunching(Message, tag=_snake):
    """Relay -> both."""

    session: SessionId
    candidates: tuple[Address, ...]
    delay_ms: int = 100


class PunchingResult(Message, tag=_snake):
    """Either -> relay -> the other."""

    session: SessionId
    success: bool
    address: Address | None = None


class Health(Message, tag=_snake):
    """Relay -> agent: for granted services, at the start and on change."""

    service: ServiceName
    state: str


class Conflict(Message, tag=_snake):
    """Agent -> relay."""

    cidr: str
    with_: str = msgspec.field(name="with")
    detail: str = ""


class Drain(Message, tag=_snake):
    """Relay -> all."""

    deadline_s: float
    relays: tuple[str, ...] = ()


AnyMessage = (
    Hello | Register | Registered | Refused | Open | Offered | Accepted | Opened | Denied | Dial | DialToken
    | Carry | Closed | CandidateOffer | CandidateAnswer | StartPunching | PunchingResult | Health | Conflict
    | Drain
)  # fmt: skip
