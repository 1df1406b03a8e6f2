"""Decide what an agent may ask of DNS through its relay: names of services that its certificate grants, and no others.

    <service>.<zone>, *.<service>.<zone>, _<service>._tcp|_udp.<zone>    where the service is granted
    _services._dns-sd._udp.<zone>                                        with the granted services only
    reverse names                                                        where they lead to a granted service
    <zone> (SOA, NS), _fresh.<zone>                                      everybody

What is not there and what is not granted are refused alike. Pure; relay.asking asks. Source: design.md 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ztna.dns import Code, HostData, Message, Record, Type, decode, encode_response, is_reverse
from ztna.errors import BadName, ProtocolError
from ztna.names import ServiceName, Zone
from ztna.wire.control import DNS_RESPONSE_BYTES_MAX

_TRUNCATED = 0x02
"""TC in the third byte of a header (RFC 1035, 4.1.1)."""
_BROWSE = ("_services", "_dns-sd", "_udp")
_TYPES = frozenset(
    {Type.A, Type.AAAA, Type.TXT, Type.SRV, Type.PTR, Type.SOA, Type.NS, Type.HTTPS, Type.CNAME, Type.HINFO}
)
_OPCODE_QUERY = 0
_CLASS_IN = 1

MayUse = Callable[[ServiceName], bool]


class Asked(msgspec.Struct, frozen=True):
    """A question that may be asked; `filtered` says that its answer has to be gone through."""

    query: Message
    name: str
    kind: Type
    filtered: bool


def judge(data: bytes, zone: Zone, may_use: MayUse) -> Asked | bytes:
    """Return the question of a query, or the answer to one that is not asked. Raises ProtocolError for no query."""
    query = decode(data)
    if query.is_response or len(query.questions) != 1:
        raise ProtocolError("not a DNS query with one question")
    (question,) = query.questions
    if query.opcode != _OPCODE_QUERY or question.class_ != _CLASS_IN or question.type not in _TYPES:
        return encode_response(query, Code.NOTIMP)
    labels = tuple(question.name.split(".")) if question.name else ()
    depth = len(tuple(str(zone).split(".")))
    reverse = is_reverse(question.name)
    if not reverse and not _may_ask(labels, depth, zone, may_use):
        return encode_response(query, Code.REFUSED)
    filtered = reverse or labels[:-depth] == _BROWSE
    return Asked(query, question.name, Type(question.type), filtered)


def answer(asked: Asked, found: Message, zone: Zone, may_use: MayUse) -> bytes:
    """Return the response to a question as DNS answered it, without what the agent may not see."""
    if not asked.filtered:
        return encode_response(asked.query, found.code, found.answers, found.authority, stale=found.stale)
    seen = [each for each in found.answers if _may_see(each, zone, may_use)]
    if not seen:
        is_list = not is_reverse(asked.name)
        # Which addresses there are is nobody's business: one that leads nowhere is refused like another's.
        return encode_response(asked.query, Code.NOERROR if is_list else Code.REFUSED)
    response = encode_response(asked.query, found.code, seen, found.authority, stale=found.stale)
    if found.truncated or len(response) > DNS_RESPONSE_BYTES_MAX:
        return _truncated(asked, found, seen)
    return response


def _truncated(asked: Asked, found: Message, seen: Sequence[Record]) -> bytes:
    """Return what fits of a list, marked as less than there is: thousands of services fit no message."""
    while True:
        response = encode_response(asked.query, found.code, seen, stale=found.stale)
        if len(response) <= DNS_RESPONSE_BYTES_MAX:
            return response[:2] + bytes((response[2] | _TRUNCATED,)) + response[3:]
        seen = seen[: len(seen) * 3 // 4]


def _may_ask(labels: Sequence[str], depth: int, zone: Zone, may_use: MayUse) -> bool:
    if ".".join(labels[-depth:]) != str(zone):
        return False
    relative = tuple(labels[:-depth])
    match relative:
        case () | ("_fresh",):
            return True
        case ("_services", "_dns-sd", "_udp"):
            return True
        case (*_, str(name), "_tcp" | "_udp") if name.startswith("_"):
            return _is_granted(name[1:], may_use)
    return _is_granted(relative[-1], may_use)


def _may_see(record: Record, zone: Zone, may_use: MayUse) -> bool:
    if not isinstance(record.data, HostData):
        return False
    labels = record.data.host.removesuffix(f".{zone}").split(".")
    name = labels[-2] if labels[-1] in ("_tcp", "_udp") and len(labels) > 1 else labels[-1]
    return record.data.host.endswith(f".{zone}") and _is_granted(name.removeprefix("_"), may_use)


def _is_granted(name: str, may_use: MayUse) -> bool:
    try:
        return may_use(ServiceName(name))
    except BadName:
        return False
