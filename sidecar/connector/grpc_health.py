"""Ask a gRPC server for its health (grpc.health.v1.Health/Check): one call on one HTTP/2 connection.

h2 speaks HTTP/2; the two messages are small enough to write by hand
(https://github.com/grpc/grpc/blob/master/doc/health-checking.md).
"""

from __future__ import annotations

import asyncio
import ssl

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from ztna.udp import SockAddr

READ_BYTES = 16_384
MESSAGE_BYTES_MAX = 1_024
GRPC_OK = "0"

_PATH = "/grpc.health.v1.Health/Check"
_FRAME_HEAD_BYTES = 5
_SERVICE_FIELD = b"\x0a"  # field 1, length-delimited
_STATUS_FIELD = b"\x08"  # field 1, varint
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_UNIMPLEMENTED = "12"
_NOT_FOUND = "5"


class GrpcFailed(Exception):
    """The server's answer was none; the text says why."""


async def ask_health(
    address: SockAddr, service: str, *, authority: str, context: ssl.SSLContext | None, server_name: str
) -> str:
    """Return the status of a service ("" is the server itself): SERVING, NOT_SERVING, UNKNOWN, SERVICE_UNKNOWN.

    Raises OSError, and GrpcFailed for an answer that is none. Bounded in time by the caller alone.
    """
    reader, writer = await asyncio.open_connection(
        *address, ssl=context, server_hostname=server_name if context is not None else None
    )
    try:
        return await _call(reader, writer, service, authority, "https" if context is not None else "http")
    except ProtocolError as error:
        raise GrpcFailed(f"no HTTP/2: {str(error) or type(error).__name__}") from None
    finally:
        writer.transport.abort()


async def _call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, service: str, authority: str, scheme: str
) -> str:
    h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    h2.initiate_connection()
    stream = h2.get_next_available_stream_id()
    h2.send_headers(
        stream,
        [
            (":method", "POST"),
            (":scheme", scheme),
            (":path", _PATH),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ],
    )
    h2.send_data(stream, _request(service), end_stream=True)
    told: dict[str, str] = {}
    message = b""
    while True:
        writer.write(h2.data_to_send())
        data = await reader.read(READ_BYTES)
        if not data:
            raise GrpcFailed("closed without an answer")
        for event in h2.receive_data(data):
            match event:
                case ResponseReceived() | TrailersReceived():
                    told |= {str(name): str(value) for name, value in event.headers or ()}
                case DataReceived():
                    message += event.data or b""
                    h2.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                    if len(message) > MESSAGE_BYTES_MAX:
                        raise GrpcFailed(f"a health answer of over {MESSAGE_BYTES_MAX} bytes")
                case StreamReset() | ConnectionTerminated():
                    raise GrpcFailed(f"the server ended the call (HTTP/2 error {event.error_code})")
                case StreamEnded():
                    return _status(told, message)


def _request(service: str) -> bytes:
    name = service.encode()
    body = _SERVICE_FIELD + _varint(len(name)) + name if name else b""
    return b"\0" + len(body).to_bytes(4) + body


def _status(told: dict[str, str], message: bytes) -> str:
    if told.get(":status") != "200":
        raise GrpcFailed(f"HTTP status {told.get(':status')}")
    code = told.get("grpc-status", GRPC_OK)
    if code == _NOT_FOUND:
        return "SERVICE_UNKNOWN"
    if code == _UNIMPLEMENTED:
        raise GrpcFailed("it has no health service (grpc.health.v1.Health)")
    if code != GRPC_OK:
        raise GrpcFailed(f"gRPC status {code}: {told.get('grpc-message', '')}")
    body = message[_FRAME_HEAD_BYTES:]
    number = body[1] if body[:1] == _STATUS_FIELD and len(body) > 1 else 0
    return _STATUSES[number] if number < len(_STATUSES) else f"status {number}"


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return encoded + bytes((number,))
