"""Each key of a configuration from the msgspec types: type, default, bounds, and what it is for."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import msgspec.inspect
import msgspec.structs
import yaml

from tests.reference import markdown
from ztna.config import Config
from ztna.names import ConnectorId, RelayName, ServiceName, Zone
from ztna.sections import Backend, Endpoint, Section, Server, plain
from ztna.wire.control import Address

INTRODUCTION = """One YAML or JSON file a daemon, with its own section beside `domain`, `consul` and `log`; a
relay has no `consul`. What an environment variable says beats the file (`ZTNA_<SECTION>_<KEY>`, as in
`ZTNA_RELAY_LISTEN` or `ZTNA_CONSUL_LOGIN_METHOD`), and a flag beats both (`--set relay.listen=0.0.0.0:443`). An
unknown key, a wrong type and a value out of bounds are refused with the path of the key; `ztna check-config
FILE` says so beforehand, and `--show` prints every key with the value it has.

Whole files with every key: [agent](../examples/agent.yaml), [connector](../examples/connector.yaml),
[dnsd](../examples/dnsd.yaml), [relay](../examples/relay.yaml). Files of `connector.routes_dir` have the one
key `routes`, as in `connector`."""

WORDS: dict[type, str] = {
    Endpoint: "host:port",
    Server: "host:port or unix:/path",
    Backend: "host:port or srv://NAME",
    Address: "IP:port",
    ServiceName: "service name",
    ConnectorId: "connector id",
    RelayName: "relay name",
    Zone: "domain name",
    IPv4Address: "IPv4 address",
    IPv4Network: "IPv4 network",
    IPv6Network: "IPv6 network",
    msgspec.inspect.StrType: "text",
    msgspec.inspect.IntType: "integer",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.BoolType: "true or false",
}


def page() -> str:
    """Return the page."""
    found: dict[type[Section], list[str]] = {}
    _collect(Config, "", found)
    headings = {type_: ", ".join(map(markdown.code, paths)) for type_, paths in found.items()}
    parts: list[str] = []
    for type_ in found:
        if type_ is not Config:
            parts += [f"## {headings[type_]}", markdown.text(markdown.sentence(type_.__doc__))]
        rows = [_row(field, headings) for field in msgspec.inspect.type_info(type_).fields]  # type: ignore[attr-defined]
        parts.append(markdown.table(("Key", "Type", "Default", "Meaning"), rows))
    return markdown.page(
        "Configuration", "`ztna/config.py` and `ztna/routes_config.py`", INTRODUCTION, *parts
    )


def _collect(type_: type[Section], path: str, found: dict[type[Section], list[str]]) -> None:
    """Note each section with every path that leads to it, in the order of a file."""
    found.setdefault(type_, []).append(path)
    for field in msgspec.structs.fields(type_):
        inner, is_list = _section_of(msgspec.inspect.type_info(field.type))
        if inner is not None:
            _collect(inner, f"{path}.{field.name}".lstrip(".") + ("[]" if is_list else ""), found)


def _section_of(type_: Any) -> tuple[type[Section] | None, bool]:
    """Return the section that a key holds, if it does, and whether it holds a list of them."""
    _, type_ = _bare(type_)
    is_list = isinstance(type_, msgspec.inspect.VarTupleType)
    if is_list:
        _, type_ = _bare(type_.item_type)
    if isinstance(type_, msgspec.inspect.StructType) and issubclass(type_.cls, Section):
        return type_.cls, is_list
    return None, is_list


def _row(field: msgspec.inspect.Field, headings: dict[type[Section], str]) -> tuple[str, str, str, str]:
    description = field.type.extra_json_schema["description"]  # type: ignore[attr-defined]
    return markdown.code(field.name), _type(field.type, headings), _default(field), description


def _type(type_: Any, headings: dict[type[Section], str]) -> str:
    _, type_ = _bare(type_)
    if isinstance(type_, msgspec.inspect.VarTupleType):
        return f"list of {_type(type_.item_type, headings)}"
    if isinstance(type_, msgspec.inspect.LiteralType):
        return ", ".join(map(markdown.code, type_.values))
    section, _ = _section_of(type_)
    if section is not None:
        return f"[section](#{markdown.anchor(headings[section])})"
    return WORDS[getattr(type_, "cls", type(type_))] + _bounds(type_)


def _bounds(type_: Any) -> str:
    lowest, above, highest = (getattr(type_, name, None) for name in ("ge", "gt", "le"))
    if lowest is not None and highest is not None:
        return f", {lowest:,} to {highest:,}"
    if above is not None and highest is not None:
        return f", over {above:,} to {highest:,}"
    assert lowest is None and highest is None, "a bound that this page has no words for"
    return ""


def _default(field: msgspec.inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default in (None, ()):
        return "none" if field.default is None else "empty"
    if isinstance(field.default, Section) or (
        isinstance(field.default, tuple) and isinstance(field.default[0], Section)
    ):
        return "its defaults"
    return markdown.code(
        yaml.safe_dump(plain(field.default, secrets=False), default_flow_style=True, width=1000).split("\n")[
            0
        ]
    )


def _bare(type_: Any) -> tuple[bool, Any]:
    """Return whether a key may be unset, and its type without Meta and None."""
    if isinstance(type_, msgspec.inspect.Metadata):
        type_ = type_.type
    if isinstance(type_, msgspec.inspect.UnionType):
        (inner,) = (arm for arm in type_.types if not isinstance(arm, msgspec.inspect.NoneType))
        return True, _bare(inner)[1]
    return False, type_
