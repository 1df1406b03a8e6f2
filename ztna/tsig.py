"""Transaction signatures for DNS messages (RFC 8945): who holds the key wrote this message, just now.

Pure: bytes and Unix seconds in, bytes out; hostile bytes give a value or ProtocolError. Knows no record but
TSIG, and no algorithm that RFC 8945 6 advises against (MD5, SHA-1) or cuts short.

    name of the key | TSIG (250) | ANY (255) | TTL 0 | length |
    name of the algorithm | time 48 | fudge 16 | MAC size 16 | MAC | original id 16 | error 16 | other size 16 | other
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from enum import IntEnum

import msgspec

from ztna.errors import ProtocolError

FUDGE_SECONDS = 300
"""How far two clocks may be apart (RFC 8945 10)."""

HEADER_BYTES = 12
NAME_BYTES_MAX = 255
LABEL_BYTES_MAX = 63
RECORDS_MAX = 4096
SECRET_BYTES_MIN = 16

ALGORITHMS = {"hmac-sha256": hashlib.sha256, "hmac-sha384": hashlib.sha384, "hmac-sha512": hashlib.sha512}

_TYPE, _CLASS_ANY = 250, 255
_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_TAIL = struct.Struct("!HHH")
_HEAD = struct.pack("!HHI", _TYPE, _CLASS_ANY, 0)
_QR, _OPCODE, _RD, _NOTAUTH = 0x8000, 0x7800, 0x0100, 9

Labels = tuple[bytes, ...]


class Error(IntEnum):
    """What is wrong with a signature (RFC 8945 3); the code of the answer is then NOTAUTH."""

    NONE = 0
    BADSIG = 16
    BADKEY = 17
    BADTIME = 18
    BADTRUNC = 22


class Key(msgspec.Struct, frozen=True):
    """A shared secret; both sides call it by the same name and use it with the same algorithm."""

    name: str
    algorithm: str
    secret: bytes

    def __repr__(self) -> str:
        return f"Key({self.name!r}, {self.algorithm!r}, ***)"


class _Tsig(msgspec.Struct, frozen=True):
    """The TSIG record of one message."""

    key: Labels
    algorithm: Labels
    time: int
    fudge: int
    mac: bytes
    original_id: int
    error: int
    other: bytes


class Exchange:
    """One signed question and its answers, which are each signed over what went before (RFC 8945 5.3)."""

    def __init__(self, key: Key, mac: bytes) -> None:
        """`mac` is the question's."""
        self.key = key
        self._mac = mac
        self._answers = 0

    def sign(self, message: bytes, now: float) -> bytes:
        """Return the next answer with its signature; the caller leaves `signature_bytes(key)` room for it."""
        data, self._mac = _signed(message, self.key, int(now), self._mac, timers_only=self._answers > 0)
        self._answers += 1
        return data

    def verify(self, data: bytes, now: float) -> bytes:
        """Return the next answer without its signature. Raises ProtocolError when it does not hold."""
        body, tsig, _ = _split(data)
        if tsig is None:
            raise ProtocolError("an answer that is not signed")
        error = _fault(body, tsig, self.key, int(now), self._mac, timers_only=self._answers > 0)
        if error is not Error.NONE:
            told = f"; it says {_error_name(tsig.error)}" if tsig.error else ""
            raise ProtocolError(f"an answer whose signature does not hold: {error.name}{told}")
        if tsig.error:
            raise ProtocolError(f"the server refused our signature: {_error_name(tsig.error)}")
        self._mac = tsig.mac
        self._answers += 1
        return body


class Received(msgspec.Struct, frozen=True):
    """A message without its signature.

    `exchange` signs the answers; None when the message was not signed. `refusal` is the answer to give instead
    of any other when the signature did not hold, and `error` says what was wrong.
    """

    body: bytes
    exchange: Exchange | None = None
    error: Error = Error.NONE
    refusal: bytes = b""


def may_be_signed(data: bytes) -> bool:
    """Return whether a look at the signature is worth it: False is certain."""
    return _HEAD in data


def begin(query: bytes, key: Key, now: float) -> tuple[bytes, Exchange]:
    """Return the query with its signature, and what verifies its answers."""
    data, mac = _signed(query, key, int(now), b"", timers_only=False)
    return data, Exchange(key, mac)


def receive(data: bytes, keys: Mapping[str, Key], now: float) -> Received:
    """Check a query's signature; `keys` are by lower-case name. Raises ProtocolError for what is no message."""
    body, tsig, questions_end = _split(data)
    if tsig is None:
        return Received(body)
    key = keys.get(_text(tsig.key))
    if key is None or _text(tsig.algorithm) != key.algorithm:
        error = Error.BADKEY
    else:
        error = _fault(body, tsig, key, int(now), b"", timers_only=False)
        if error is Error.NONE:
            return Received(body, Exchange(key, tsig.mac))
    return Received(body, None, error, _refusal(body[:questions_end], tsig, key, error, int(now)))


def signature_bytes(key: Key) -> int:
    """Return how many bytes a signature with this key adds to a message."""
    digest = ALGORITHMS[key.algorithm]().digest_size
    names = len(_wire(_labels(key.name))) + len(_wire(_labels(key.algorithm)))
    return names + _RECORD.size + 10 + digest + _TAIL.size


# The MAC


def _fault(body: bytes, tsig: _Tsig, key: Key, now: int, prior: bytes, *, timers_only: bool) -> Error:
    """RFC 8945 5.2: the key, then the MAC, then the time."""
    if _text(tsig.key) != key.name.lower() or _text(tsig.algorithm) != key.algorithm:
        return Error.BADKEY
    expected = _mac(body, tsig, key, prior, timers_only=timers_only)
    if not hmac.compare_digest(expected, tsig.mac):
        # 5.2.2.1: a MAC cut short may be refused by policy; ours takes whole ones only.
        is_cut = len(expected) // 2 <= len(tsig.mac) < len(expected) and expected.startswith(tsig.mac)
        return Error.BADTRUNC if is_cut else Error.BADSIG
    return Error.NONE if abs(now - tsig.time) <= tsig.fudge else Error.BADTIME


def _mac(body: bytes, tsig: _Tsig, key: Key, prior: bytes, *, timers_only: bool) -> bytes:
    """RFC 8945 4.3: the MAC before, the message under its original id, the record's variables."""
    digest = hmac.new(key.secret, digestmod=ALGORITHMS[key.algorithm])
    if prior:
        digest.update(len(prior).to_bytes(2) + prior)
    digest.update(tsig.original_id.to_bytes(2) + body[2:])
    times = tsig.time.to_bytes(6) + tsig.fudge.to_bytes(2)
    if timers_only:
        digest.update(times)
    else:
        other = struct.pack("!HH", tsig.error, len(tsig.other)) + tsig.other
        digest.update(
            _wire(tsig.key) + struct.pack("!HI", _CLASS_ANY, 0) + _wire(tsig.algorithm) + times + other
        )
    return digest.digest()


def _signed(
    message: bytes, key: Key, now: int, prior: bytes, *, timers_only: bool, error: int = 0, other: bytes = b""
) -> tuple[bytes, bytes]:
    """Return the message with its TSIG record, and the MAC."""
    original_id = int.from_bytes(message[:2])
    unsigned = _Tsig(
        _labels(key.name), _labels(key.algorithm), now, FUDGE_SECONDS, b"", original_id, error, other
    )
    mac = _mac(message, unsigned, key, prior, timers_only=timers_only)
    return _appended(message, msgspec.structs.replace(unsigned, mac=mac)), mac


def _refusal(question: bytes, tsig: _Tsig, key: Key | None, error: Error, now: int) -> bytes:
    """RFC 8945 5.3.2: the answer is signed only where the key is known to be the asker's."""
    flags = int.from_bytes(question[2:4])
    counts = struct.pack("!HHHH", *_HEADER.unpack_from(question)[2:3], 0, 0, 0)
    code = (_QR | flags & (_OPCODE | _RD) | _NOTAUTH).to_bytes(2)
    answer = question[:2] + code + counts + question[HEADER_BYTES:]
    if key is not None and error is Error.BADTIME:
        # 5.2.3: the asker's own time, so that it can verify this, and ours beside it.
        return _signed(
            answer, key, tsig.time, tsig.mac, timers_only=False, error=error, other=now.to_bytes(6)
        )[0]
    return _appended(answer, msgspec.structs.replace(tsig, mac=b"", error=error, other=b""))


def _appended(message: bytes, tsig: _Tsig) -> bytes:
    data = b"".join(
        (
            _wire(tsig.algorithm),
            tsig.time.to_bytes(6),
            tsig.fudge.to_bytes(2),
            len(tsig.mac).to_bytes(2),
            tsig.mac,
            _TAIL.pack(tsig.original_id, tsig.error, len(tsig.other)),
            tsig.other,
        )
    )
    additional = (int.from_bytes(message[10:12]) + 1).to_bytes(2)
    record = _wire(tsig.key) + _HEAD + len(data).to_bytes(2) + data
    return message[:10] + additional + message[HEADER_BYTES:] + record


# Reading


def _split(data: bytes) -> tuple[bytes, _Tsig | None, int]:
    """Return the message without its TSIG record, the record, and where the questions end."""
    if len(data) < HEADER_BYTES:
        raise ProtocolError("too short for a DNS message")
    _, _, questions, answers, authority, additional = _HEADER.unpack_from(data)
    records = answers + authority + additional
    if questions + records > RECORDS_MAX:
        raise ProtocolError(f"DNS message with more than {RECORDS_MAX} records")
    position = HEADER_BYTES
    for _ in range(questions):
        position = _pass_name(data, position) + 4
    questions_end = start = position
    kind = 0
    for _ in range(records):
        start, position = position, _pass_name(data, position)
        if position + _RECORD.size > len(data):
            raise ProtocolError("DNS record runs past the end of its message")
        before, (kind, _, _, length) = kind, _RECORD.unpack_from(data, position)
        if before == _TYPE:
            raise ProtocolError("a TSIG record that is not the last one")
        position += _RECORD.size + length
    if position != len(data):
        raise ProtocolError("a DNS message whose length disagrees with its records")
    if kind != _TYPE:
        return data, None, questions_end
    if not additional:
        raise ProtocolError("a TSIG record out of place")
    body = data[:10] + (additional - 1).to_bytes(2) + data[HEADER_BYTES:start]
    return body, _read(data, start), questions_end


def _read(data: bytes, position: int) -> _Tsig:
    key, position = _read_name(data, position)
    if data[position : position + len(_HEAD)] != _HEAD:
        raise ProtocolError("a TSIG record of another class, or with a TTL")
    algorithm, position = _read_name(data, position + _RECORD.size)
    rest = data[position:]
    mac_end = 10 + int.from_bytes(rest[8:10])
    if len(rest) < mac_end + _TAIL.size:
        raise ProtocolError("a TSIG record cut short")
    original_id, error, other_length = _TAIL.unpack_from(rest, mac_end)
    other = rest[mac_end + _TAIL.size :]
    if len(other) != other_length:
        raise ProtocolError("a TSIG record whose length disagrees with its data")
    time, fudge = int.from_bytes(rest[:6]), int.from_bytes(rest[6:8])
    return _Tsig(key, algorithm, time, fudge, rest[10:mac_end], original_id, error, other)


def _pass_name(data: bytes, position: int) -> int:
    """Return the place after a name that nobody reads."""
    while position < len(data):
        length = data[position]
        if length == 0:
            return position + 1
        if length >= 0xC0:
            return position + 2
        position += 1 + length
    raise ProtocolError("DNS name runs past the end of its message")


def _read_name(data: bytes, position: int) -> tuple[Labels, int]:
    """Read a name, lower case, and return the place after it; pointers go backwards only (RFC 1035 4.1.4)."""
    labels: list[bytes] = []
    end, lowest, size = 0, position, 1
    while True:
        length = data[position] if position < len(data) else LABEL_BYTES_MAX + 1
        if length >= 0xC0:
            target = int.from_bytes(data[position : position + 2]) & 0x3FFF
            if target >= lowest:
                raise ProtocolError("DNS name with a compression pointer that leads nowhere")
            end = end or position + 2
            position = lowest = target
            continue
        size += length + 1
        if length > LABEL_BYTES_MAX or size > NAME_BYTES_MAX + 1:
            raise ProtocolError("DNS name with an overlong or cut label")
        position += 1
        if length == 0:
            return tuple(labels), end or position
        labels.append(data[position : position + length].lower())
        position += length


def _labels(name: str) -> Labels:
    return tuple(label.encode() for label in name.lower().rstrip(".").split("."))


def _wire(labels: Labels) -> bytes:
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def _text(labels: Labels) -> str:
    # What no name of a key has stays as it is: it is simply not found.
    return b".".join(labels).decode("latin-1")


def _error_name(error: int) -> str:
    return Error(error).name if error in set(Error) else f"code {error}"
