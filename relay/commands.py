"""What relay.sessions decides, as values for relay.daemon to carry out, in order.

Pure; does nothing itself.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ztna.jsontypes import Secret
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.wire.control import AnyMessage, Carry, DialToken, DnsQuery, Health

ConnectionKey = int
"""Stands for one connection object while it lives; never used again."""

LinkKey = tuple[ConnectionKey, ConnectionKey]
"""(agent connection, connector connection)."""


class BindTicket(msgspec.Struct, frozen=True):
    """What lets one side of a link bind at the forwarder: id(16) and secret(32)."""

    bind_id: bytes
    secret: Secret


class Send(msgspec.Struct, frozen=True):
    """Send a message to a connection."""

    to: ConnectionKey
    message: AnyMessage


class SendHealth(msgspec.Struct, frozen=True):
    """Send a connection news of many services at once."""

    to: ConnectionKey
    news: tuple[Health, ...]


class AskDns(msgspec.Struct, frozen=True):
    """Answer an agent's question about names; not `in_pace`, it is one too many."""

    by: ConnectionKey
    query: DnsQuery
    in_pace: bool


class AddLink(msgspec.Struct, frozen=True):
    """Let both sides of a link bind at the forwarder."""

    link: LinkKey
    agent: BindTicket
    connector: BindTicket
    peers: tuple[str, str]
    """The agent's name and the connector's id: whose quota the link uses."""


class RemoveLink(msgspec.Struct, frozen=True):
    """End a link at the forwarder."""

    link: LinkKey


class AdmitAgent(msgspec.Struct, frozen=True):
    """Let one TCP connection with the message's token in, and send the message when there was room."""

    to: ConnectionKey
    message: DialToken
    agent: str
    link: LinkKey


class AdmitConnector(msgspec.Struct, frozen=True):
    """Let one TCP connection join the waiting one, and send the message when that one is still there."""

    to: ConnectionKey
    waiter: int
    message: Carry


class EndSession(msgspec.Struct, frozen=True):
    """Void the session's tokens and close its TCP connections at the forwarder."""

    session: SessionId


class Refusal(msgspec.Struct, frozen=True):
    """Count and log what a connection was refused; `owners` are the names of whose it was."""

    by: ConnectionKey
    name: str
    about: str
    reason: Reason
    subject: str
    owners: tuple[str, ...] = ()


class Told(msgspec.Struct, frozen=True):
    """Log and audit what became of a session; `fields` say what relay.sessions knows of it.

    It comes before the session's EndSession, so that what the forwarder counted can still be told.
    """

    event: Literal["session_opened", "session_closed"]
    session: SessionId
    link: LinkKey
    path: str | None
    v1_bytes: int
    fields: dict[str, str | float]
    opening_s: float
    """From the agent's `open` to the connector's `accepted`."""


class Event(msgspec.Struct, frozen=True):
    """Log something that happened."""

    event: str
    fields: dict[str, str]


Command = (
    Send
    | SendHealth
    | AskDns
    | AddLink
    | RemoveLink
    | AdmitAgent
    | AdmitConnector
    | EndSession
    | Refusal
    | Told
    | Event
)
