"""Whose messages about a session count (protocol.md, Ownership).

Pure; what a message then does is relay.sessions' part.
"""

from __future__ import annotations

from relay.commands import ConnectionKey
from relay.state import Session
from ztna.wire import control

AboutSession = (
    control.Accepted
    | control.Dial
    | control.Closed
    | control.CandidateOffer
    | control.CandidateAnswer
    | control.PunchingResult
)

Signaling = control.CandidateOffer | control.CandidateAnswer | control.PunchingResult
"""What is passed on to the other end."""


def owns(key: ConnectionKey, session: Session, message: AboutSession) -> bool:
    """Say whether the message is this connection's to send.

    The agent learns of a session when it is open; before that only the connector can name it.
    """
    match message:
        case control.Accepted():
            return key == session.connector
        case control.CandidateAnswer():
            return key == session.connector and session.open
        case control.Dial() | control.CandidateOffer():
            return key == session.agent and session.open
    return key == session.connector or (key == session.agent and session.open)
