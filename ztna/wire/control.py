"""The messages of the control stream (`ztna-v2`): u32 length, then the JSON of one message.

    0      4
    +------+----------------------------+
    | n    | JSON, n bytes, <= 64 KiB   |     source: protocol.md, Control stream
    +------+----------------------------+

The same over TLS, where `ping`, `pong` and `goodbye` do what QUIC has frames for. Knows no rule about who may send
what; relay.policy and relay.sessions do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from typing import Annotated, Self, TypeVar

import msgspec

from ztna.errors import ProtocolError
from ztna.jsontypes import Binary as Binary
from ztna.jsontypes import Secret as Secret
from ztna.jsontypes import decode_hook, decoding, to_json
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason

MESSAGE_BYTES_MAX = 64 * 1024
CANDIDATES_MAX = 8
PROTOCOL_VERSION = 2
BIND_ID_BYTES = 16
TOKEN_BYTES = 32
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 16, 64
FEATURES = frozenset(
    {
        "register", "registered", "refused", "open", "offered", "accepted", "opened", "denied", "dial",
        "dial_token", "carry", "closed", "candidate_offer", "candidate_answer", "start_punching",
        "punching_result", "health", "conflict", "drain", "retired", "dns_query", "dns_response",
    }
)  # fmt: skip

UNKNOWN_TYPE_CHARACTERS = 64
SOFTWARE_CHARACTERS_MAX = 64
PHRASE_CHARACTERS_MAX = 256
DNS_HEADER_BYTES = 12
DNS_QUERY_BYTES_MAX = 1024
DNS_RESPONSE_BYTES_MAX = 45_000
"""What fits a frame as base64url."""

_LENGTH = struct.Struct(">I")
_TAG = "type"

Counter = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Software(str):
    """A release (`0.1.0`), empty from one that does not say: shown to operators, and nothing is decided by it.

    So no text is refused, whatever releases to come call themselves: it is cut to SOFTWARE_CHARACTERS_MAX, and what
    cannot be printed is a `?`.
    """

    __slots__ = ()

    def __new__(cls, text: str = "") -> Self:
        """Return what of the text is shown."""
        shown = text[:SOFTWARE_CHARACTERS_MAX]
        return super().__new__(cls, "".join(each if each.isprintable() else "?" for each in shown))


class Address(msgspec.Struct, frozen=True, order=True):
    """A numeric IP address in its canonical text, and a port."""

    ip: str
    port: int

    def __post_init__(self) -> None:
        try:
            canonical = str(ip_address(self.ip))
        except ValueError:
            raise ValueError(f"address {self.ip!r}: expected an IPv4 or IPv6 address") from None
        if canonical != self.ip or "%" in self.ip or not 0 <= self.port <= 65535:
            raise ValueError(
                f"address {self.ip!r} port {self.port}: expected canonical text and a port up to 65535"
            )

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


Candidates = Annotated[tuple[Address, ...], msgspec.Meta(max_length=CANDIDATES_MAX)]


class LeaseRef(msgspec.Struct, frozen=True):
    """The lease an agent believes in: what `open`, `offered` and OPEN carry."""

    ip: IPv4Address
    epoch: Counter


class Offering(msgspec.Struct, frozen=True):
    """One service of a `register`."""

    name: ServiceName
    ports: tuple[Port, ...] = ()


class PeerIdentity(msgspec.Struct, frozen=True):
    """The agent as the relay verified it: its name and the SHA-256 of its leaf, hex."""

    name: str
    fingerprint: Fingerprint


class ForwarderBind(msgspec.Struct, frozen=True):
    """Where one side of a link binds at the forwarder, and with what."""

    address: Address
    bind_id: Binary
    bind_secret: Secret

    def __post_init__(self) -> None:
        _expect_bytes("bind_id", self.bind_id, BIND_ID_BYTES)
        _expect_secret("bind_secret", self.bind_secret)


class Message(msgspec.Struct, frozen=True, tag_field=_TAG):
    """The root of all messages; the tag is the class name in snake case."""


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class Hello(Message, frozen=True, tag=_snake):
    """First each way."""

    version: int = PROTOCOL_VERSION
    features: frozenset[str] = FEATURES
    software: Software = Software()


class Register(Message, frozen=True, tag=_snake):
    """Connector -> relay: adds `services` to those of the connection, and takes the `withdrawn` ones out."""

    connector_id: ConnectorId
    services: tuple[Offering, ...]
    link_address: Address | None = None
    withdrawn: tuple[ServiceName, ...] = ()
    software: Software = Software()


class Registered(Message, frozen=True, tag=_snake):
    """Relay -> connector, one per service."""

    name: ServiceName


class Refused(Message, frozen=True, tag=_snake):
    """Relay -> connector, one per service refused."""

    name: str
    reason: Reason


class Open(Message, frozen=True, tag=_snake):
    """Agent -> relay."""

    request: Counter
    service: ServiceName
    lease: LeaseRef | None = None
    connector_id: ConnectorId | None = None


class Offered(Message, frozen=True, tag=_snake):
    """Relay -> connector."""

    session: SessionId
    service: ServiceName
    agent: PeerIdentity
    lease: LeaseRef | None = None
    forwarder: ForwarderBind | None = None
    probe_key: Secret = Secret()
    v1: bool = False

    def __post_init__(self) -> None:
        if self.forwarder is not None:
            _expect_secret("probe_key", self.probe_key)


class Accepted(Message, frozen=True, tag=_snake):
    """Connector -> relay."""

    session: SessionId


class Opened(Message, frozen=True, tag=_snake):
    """Relay -> agent."""

    request: Counter
    session: SessionId
    service: ServiceName
    connector_id: ConnectorId
    fingerprint: Fingerprint
    link_address: Address | None = None
    forwarder: ForwarderBind | None = None
    probe_key: Secret = Secret()

    def __post_init__(self) -> None:
        if self.forwarder is not None:
            _expect_secret("probe_key", self.probe_key)


class Denied(Message, frozen=True, tag=_snake):
    """Relay -> agent."""

    request: Counter
    service: str
    reason: Reason


class Dial(Message, frozen=True, tag=_snake):
    """Agent -> relay."""

    session: SessionId


class DialToken(Message, frozen=True, tag=_snake):
    """Relay -> agent: one TCP connection to the forwarder within 30 s."""

    session: SessionId
    token: Secret

    def __post_init__(self) -> None:
        _expect_bytes("token", self.token, TOKEN_BYTES)


class Carry(Message, frozen=True, tag=_snake):
    """Relay -> connector: an agent waits at the forwarder's TCP port."""

    session: SessionId
    token: Secret

    def __post_init__(self) -> None:
        _expect_bytes("token", self.token, TOKEN_BYTES)


class Closed(Message, frozen=True, tag=_snake):
    """Any -> relay -> the other."""

    session: SessionId
    reason: Reason


class Retired(Message, frozen=True, tag=_snake):
    """Relay -> agent: nothing new is to use the session; TCP flows on it may finish.

    Beyond protocol.md: for `leaving: move`, as TCP flows cannot follow to another connector. An agent without it in its
    features is sent `closed` instead.
    """

    session: SessionId


class CandidateOffer(Message, frozen=True, tag=_snake):
    """Agent -> relay -> that connector."""

    session: SessionId
    candidates: Candidates


class CandidateAnswer(Message, frozen=True, tag=_snake):
    """Connector -> relay -> that agent."""

    session: SessionId
    candidates: Candidates


class StartPunching(Message, frozen=True, tag=_snake):
    """Relay -> both."""

    session: SessionId
    candidates: Candidates
    delay_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 100


class PunchingResult(Message, frozen=True, tag=_snake):
    """Either -> relay -> the other."""

    session: SessionId
    success: bool
    address: Address | None = None


class Health(Message, frozen=True, tag=_snake):
    """Relay -> agent: for granted services, at the start and on change."""

    service: ServiceName
    state: str


class Conflict(Message, frozen=True, tag=_snake):
    """Agent -> relay: kept while the connection lives, or until the same `cidr` comes with an empty `with`."""

    cidr: str
    with_: str = msgspec.field(name="with")
    detail: str = ""


class Drain(Message, frozen=True, tag=_snake):
    """Relay -> all."""

    deadline_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)]
    relays: tuple[str, ...] = ()


class DnsQuery(Message, frozen=True, tag=_snake):
    """Agent -> relay: a DNS message with one question, for who reaches no resolver; `request` comes back."""

    request: Counter
    message: Binary

    def __post_init__(self) -> None:
        _expect_dns("message", self.message, DNS_QUERY_BYTES_MAX)


class DnsResponse(Message, frozen=True, tag=_snake):
    """Relay -> agent: the DNS message that answers it, of services that the agent is granted only."""

    request: Counter
    message: Binary

    def __post_init__(self) -> None:
        _expect_dns("message", self.message, DNS_RESPONSE_BYTES_MAX)


class Ping(Message, frozen=True, tag=_snake):
    """Either way over TLS: answer with a `pong` at once."""


class Pong(Message, frozen=True, tag=_snake):
    """The answer to a `ping`."""


class Goodbye(Message, frozen=True, tag=_snake):
    """Either way over TLS, the last message: code and phrase of what would be a CONNECTION_CLOSE on QUIC."""

    code: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    reason: Annotated[str, msgspec.Meta(max_length=PHRASE_CHARACTERS_MAX)] = ""


LifeMessage = Ping | Pong | Goodbye

AnyMessage = (
    Hello | Register | Registered | Refused | Open | Offered | Accepted | Opened | Denied | Dial | DialToken
    | Carry | Closed | CandidateOffer | CandidateAnswer | StartPunching | PunchingResult | Health | Conflict
    | Drain | Retired | DnsQuery | DnsResponse
)  # fmt: skip


def _expect_dns(name: str, value: bytes, most: int) -> None:
    if not DNS_HEADER_BYTES <= len(value) <= most:
        raise ValueError(f"{name}: expected {DNS_HEADER_BYTES} to {most} bytes, got {len(value)}")


def _expect_bytes(name: str, value: bytes, length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name} of {len(value)} bytes: expected {length}")


def _expect_secret(name: str, value: bytes) -> None:
    # Whoever has an empty one can forge what it proves.
    if not SECRET_BYTES_MIN <= len(value) <= SECRET_BYTES_MAX:
        raise ValueError(f"{name} of {len(value)} bytes: expected {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}")


class UnknownMessage(msgspec.Struct, frozen=True):
    """A message of a type we do not have: to be counted and ignored."""

    type: str


Read = TypeVar("Read", bound=AnyMessage | LifeMessage | UnknownMessage)


def encode(message: AnyMessage | LifeMessage) -> bytes:
    """Return the message as one whole frame. Raises ProtocolError when it is over MESSAGE_BYTES_MAX."""
    body = to_json(message)
    if len(body) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"control message of {len(body)} bytes: at most {MESSAGE_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts the bytes of one control stream into messages; after a ProtocolError it is of no more use."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._unknown_fields = 0

    def feed(self, data: bytes | memoryview) -> list[AnyMessage | UnknownMessage]:
        """Return the messages that these bytes complete, in order.

        Raises ProtocolError for a frame over MESSAGE_BYTES_MAX as soon as its length is there, and
        for a body that is no message. Unknown fields are ignored, unknown types are UnknownMessage.
        """
        self._buffer += data
        return [self._counted(_decode(body), body) for body in self._bodies()]

    def feed_tls(self, data: bytes | memoryview) -> list[AnyMessage | LifeMessage | UnknownMessage]:
        """Return the messages that these bytes of a TLS connection complete, as `feed`."""
        self._buffer += data
        return [self._counted(_decode_tls(body), body) for body in self._bodies()]

    def take_unknown_fields(self) -> int:
        """Return how many fields that we do not have came in messages that we do have, since the last call."""
        count, self._unknown_fields = self._unknown_fields, 0
        return count

    def _counted(self, message: Read, body: bytes) -> Read:
        if not isinstance(message, UnknownMessage):
            self._unknown_fields += _unknown_fields(message, body)
        return message

    def _bodies(self) -> Iterator[bytes]:
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MESSAGE_BYTES_MAX:
                raise ProtocolError(f"control frame of {length} bytes: at most {MESSAGE_BYTES_MAX}")
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            yield bytes(self._buffer[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


def _unknown_fields(value: object, raw: bytes | msgspec.Raw) -> int:
    """Count the fields of a value's JSON that its type does not have, whatever they lie in.

    Their values are not read: a number may be too big for us.
    """
    if isinstance(value, msgspec.Struct):
        try:
            fields = decoding(_FIELDS, raw)
        except ProtocolError:
            return 1  # whose name is no text, which the message's own type passed over
        own = dict(zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True))
        return sum(
            _unknown_fields(getattr(value, own[name]), each) if name in own else 1
            for name, each in fields.items()
            if name != _TAG
        )
    if isinstance(value, tuple):
        parts = decoding(_ITEMS, raw)
        return sum(_unknown_fields(each, part) for each, part in zip(value, parts, strict=True))
    return 0


class _Typed(msgspec.Struct, frozen=True):
    type: str


_MESSAGES: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage, dec_hook=decode_hook)
_LIFE_MESSAGES: msgspec.json.Decoder[LifeMessage] = msgspec.json.Decoder(LifeMessage)
_LIFE_TYPES = frozenset({"ping", "pong", "goodbye"})
_TYPES = msgspec.json.Decoder(_Typed)
_FIELDS: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_KNOWN_TYPES = FEATURES | {"hello"}


def _decode(body: bytes) -> AnyMessage | UnknownMessage:
    try:
        return decoding(_MESSAGES, body)
    except ProtocolError as error:
        type_ = decoding(_TYPES, body).type
        if type_ in _KNOWN_TYPES:
            raise ProtocolError(f"control message {type_}: {error}") from None
        return UnknownMessage(type_[:UNKNOWN_TYPE_CHARACTERS])


def _decode_tls(body: bytes) -> AnyMessage | LifeMessage | UnknownMessage:
    message = _decode(body)
    if isinstance(message, UnknownMessage) and message.type in _LIFE_TYPES:
        return decoding(_LIFE_MESSAGES, body)
    return message
