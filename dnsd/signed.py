"""Queries that need a second look: signed ones and transfers. Everything else is dnsd.answer's alone.

Who signs with a key of ours may ask from anywhere, and transfer; unsigned transfers are for those on a list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from dnsd import transfer
from dnsd.transfer import Publication, Request
from ztna import tsig
from ztna.dns import HEADER_BYTES, Code
from ztna.errors import ProtocolError
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS, TRANSFERS, logger
from ztna.tsig import Exchange, Key

WARN_SECONDS = 1.0
"""Refusals are counted all, and logged at most once in this time."""

_log = logger(__name__)


class SecondLook:
    """Answers signed queries and transfers."""

    def __init__(
        self,
        keys: Mapping[str, Key] | None = None,
        allow: Sequence[IPv4Network] = (),
        publication: Publication | None = None,
    ) -> None:
        """`allow` may transfer without a signature."""
        self.keys = keys or {}
        self._allow = tuple(allow)
        self._publication = publication or Publication()
        self._bad_signature = REFUSALS.labels("dnsd.tsig", Reason.UNTRUSTED.value)
        self._warned_at = -WARN_SECONDS
        self._no_transfer = TRANSFERS.labels("refused")

    def wants(self, data: bytes) -> bool:
        """Return whether `answers` is for this query; most are not, and this is quick to say so."""
        return (tsig.may_be_signed(data) or transfer.may_be(data)) and _is_query(data)

    def is_transfer(self, data: bytes) -> bool:
        """Return whether `answers` may transfer a zone to who asks this."""
        return transfer.may_be(data) and _is_query(data)

    def answers(
        self,
        data: bytes,
        packed: bytes,
        plainly: Callable[[bytes, int, bool], bytes | None],
        *,
        over_tcp: bool,
    ) -> Iterator[bytes]:
        """Return the answers to one query from the address `packed`: none, one, or a transfer's many.

        `plainly(query, reserve, is_signed)` answers what is no transfer, leaving `reserve` bytes for a signature.
        """
        try:
            received = tsig.receive(data, self.keys, time.time())
            request = transfer.read(received.body) if transfer.may_be(received.body) else None
        except ProtocolError:
            yield from _one(plainly(data, 0, False))
            return
        if received.refusal:
            self._bad_signature.inc()
            self._warn("signature_refused", peer=IPv4Address(packed), error=received.error.name)
            yield received.refusal
            return
        exchange = received.exchange
        if request is not None:
            answers = self._transfer(request, packed, exchange, over_tcp=over_tcp)
        else:
            reserve = tsig.signature_bytes(exchange.key) if exchange else 0
            answers = _one(plainly(received.body, reserve, exchange is not None))
        for answer in answers:
            yield exchange.sign(answer, time.time()) if exchange else answer

    def _warn(self, event: str, **fields: object) -> None:
        """Log one of many: whoever sends these chooses how many there are."""
        now = time.monotonic()
        if now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            _log.warning(event, **fields)

    def _transfer(
        self, request: Request, packed: bytes, exchange: Exchange | None, *, over_tcp: bool
    ) -> Iterator[bytes]:
        kind = "axfr" if request.serial is None else "ixfr"
        address = IPv4Address(packed)
        if exchange is None and not any(address in network for network in self._allow):
            found: Iterator[bytes] | Code = Code.REFUSED
        else:
            found = self._publication.answer(request, over_tcp=over_tcp)
        if isinstance(found, Code):
            self._no_transfer.inc()
            self._warn("transfer_refused", peer=address, zone=".".join(request.apex), error=found.name)
            yield transfer.refuse(request, found)
            return
        if over_tcp:
            TRANSFERS.labels(kind).inc()
            _log.info("transfer", peer=address, zone=".".join(request.apex), kind=kind, since=request.serial)
        yield from found


def _is_query(data: bytes) -> bool:
    return len(data) >= HEADER_BYTES and not data[2] & 0x80


def _one(answer: bytes | None) -> Iterator[bytes]:
    if answer is not None:
        yield answer
