"""Sections of a configuration as msgspec types, and what can be done with any of them.

Reads a YAML or JSON file, lays text of the environment and of flags over it, builds the types with
errors that name the key's path, writes them back, and describes them as a commented example. Knows no
key of ours: ztna.config has those.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from ztna.errors import ConfigError
from ztna.jsontypes import decode_hook, shortened
from ztna.wire.control import Address

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML that was built without libyaml: a thousand routes take seconds and 30 MB more
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

ENVIRONMENT_PREFIX = "ZTNA_"
DNS_NAME_CHARACTERS_MAX = 253
CONFIG_BYTES_MAX = 4 * 1024 * 1024
HIDDEN = "***"
UNIX_PREFIX = "unix:"
SRV_PREFIX = "srv://"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=False):
    """A section: unknown keys are errors. What is secret in it is not in its repr."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({plain(self, secrets=False)})"


class Endpoint(msgspec.Struct, frozen=True, order=True):
    """`host:port` in a file; the host may be a name where a daemon dials it."""

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether it is a socket on this host."""
        return self.host.startswith("/")

    @property
    def srv_name(self) -> str | None:
        """The name whose SRV records say where it is, if they do."""
        return self.host.removeprefix(SRV_PREFIX) if self.host.startswith(SRV_PREFIX) else None

    def __str__(self) -> str:
        if self.is_unix:
            return f"{UNIX_PREFIX}{self.host}"
        if self.srv_name is not None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Server(Endpoint, frozen=True, order=True):
    """`host:port`, or `unix:/path` of a socket on this host: then the host is the path, and the port 0."""


class Backend(Endpoint, frozen=True, order=True):
    """`host:port`, or `srv://name` whose SRV records say where: then that is the host, and the port 0."""


S = TypeVar("S", bound=Section)


def about(text: str, example: object = None) -> msgspec.Meta:
    """Describe a key for the example file; what has no default needs an example value."""
    return msgspec.Meta(description=text, examples=[example])


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file (JSON is YAML). Raises ConfigError naming the file, and the line when it has one."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: over {CONFIG_BYTES_MAX} bytes, which is no configuration")
    try:
        raw = yaml.load(data, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {shortened(' '.join(str(error).split()))}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(raw).__name__}")
    return raw


def environment_path(root: type[Section], variable: str) -> tuple[str, ...]:
    """Return the path that `ZTNA_<SECTION>_<KEY>` names, empty when it is about no section of the root.

    Raises ConfigError when the section has no such key.
    """
    if not variable.startswith(ENVIRONMENT_PREFIX):
        return ()
    rest = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
    keys = next(_splits(rest, root), None)
    if keys is not None:
        return keys
    for key, field in _fields(root).items():
        if rest.startswith(key + "_"):
            known = ", ".join(_fields(_bare(field.type)))
            raise ConfigError(f"{variable}: no such key in {key}; it has {known}")
    return ()


def flag_path(root: type[Section], dotted: str) -> tuple[str, ...]:
    """Return the path that `relay.listen` names. Raises ConfigError when there is none."""
    keys = tuple(dotted.split("."))
    type_: Any = root
    for depth, key in enumerate(keys):
        if not _is_section(type_) or key not in _fields(type_):
            raise _unknown_key(".".join(keys[: depth + 1]), key, type_)
        type_ = _bare(_fields(type_)[key].type)
    return keys


def override(root: type[Section], raw: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    """Put one text value over what the file said, in place; lists are `a,b` or YAML in brackets."""
    type_: Any = root
    here: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise ConfigError(f"{'.'.join(keys[: depth + 1])}: expected keys and values, got {_seen(here)}")
        type_ = _bare(_fields(type_)[key].type)
    here[keys[-1]] = _from_text(text, _fields(type_)[keys[-1]].type)


def build(root: type[S], raw: dict[str, Any]) -> S:
    """Make the types of what was read. Raises ConfigError naming the path and what was expected."""
    try:
        return msgspec.convert(_shaped(raw, root, ""), root, dec_hook=decode_hook)
    except msgspec.ValidationError as error:
        raise _told(str(error), raw) from None


def plain(value: Any, *, secrets: bool) -> Any:
    """Return a configuration as YAML has it: mappings, lists, numbers and text."""
    if isinstance(value, Section):
        return {
            key: HIDDEN
            if key in _SECRET_KEYS and getattr(value, key) is not None and not secrets
            else plain(getattr(value, key), secrets=secrets)
            for key in _fields(type(value))
        }
    if isinstance(value, tuple):
        return [plain(entry, secrets=secrets) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry, secrets=secrets) for key, entry in value.items()}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def described(field: msgspec.structs.FieldInfo, indent: str = "") -> Iterator[str]:
    """Yield the lines of one key: what it is for, then it and its value, as a comment when it is unset."""
    type_ = _bare(field.type)
    optional = field.default is None and _is_section(type_)
    # A daemon's own section is what the file is about; one further in is left out until somebody wants it.
    required = field.required or (optional and not indent)
    yield f"{indent}# {_description(field)}{' (required)' if required else ''}"
    if optional and not required:
        yield f"{indent}# {field.name}:"
        for inner in msgspec.structs.fields(type_):
            yield from (f"{indent}# {line}" for line in described(inner, "  "))
    elif _is_section(type_):
        yield f"{indent}{field.name}:"
        for inner in msgspec.structs.fields(type_):
            yield from described(inner, indent + "  ")
    elif get_origin(type_) is tuple and _is_section(get_args(type_)[0]) and field.default is not None:
        yield f"{indent}{field.name}:"
        lines = [
            line
            for inner in msgspec.structs.fields(get_args(type_)[0])
            for line in described(inner, indent + "    ")
        ]
        # A list's dash stands in the indentation of its first key; that key's comment goes before it.
        first = next(number for number, line in enumerate(lines) if not line.lstrip().startswith("#"))
        lines[first] = f"{indent}  - {lines[first].lstrip()}"
        yield from lines
    elif field.required or field.default is not None:
        value = _example_value(field) if field.required else field.default
        yield f"{indent}{field.name}: {_flow(value)}"
    else:
        yield f"{indent}# {field.name}: {_flow(_example_value(field))}"


class _Loader(_SafeLoader):
    """Refuses a key that is given twice; YAML's own loaders silently take the last (YAML 1.2, 3.2.1.3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _splits(rest: str, type_: type[Section]) -> Iterator[tuple[str, ...]]:
    """Yield each path inside a section that `a_b_c` can mean."""
    for key, field in _fields(type_).items():
        inner = _bare(field.type)
        if rest == key:
            yield (key,)
        elif rest.startswith(key + "_") and _is_section(inner):
            yield from ((key, *deeper) for deeper in _splits(rest[len(key) + 1 :], inner))


def _from_text(text: str, annotation: Any) -> Any:
    """Read a value from the environment or a flag as its type wants it."""
    type_ = _bare(annotation)
    if text == "" and NoneType in get_args(_unannotated(annotation)):
        return None
    if get_origin(type_) is tuple and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(type_) is tuple or _is_section(type_):
        try:
            return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError:
            return text
    if type_ in (int, float, bool):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError:
            return text
    return text


def _shaped(value: Any, annotation: Any, path: str) -> Any:
    """Check keys and turn `host:port` into fields; msgspec checks the rest."""
    type_ = _bare(annotation)
    if value is None and NoneType in get_args(_unannotated(annotation)):
        return None
    if type_ is Server and isinstance(value, str) and value.startswith(UNIX_PREFIX + "/"):
        return {"host": value.removeprefix(UNIX_PREFIX), "port": 0}
    if type_ is Backend and isinstance(value, str) and value.startswith(SRV_PREFIX):
        return {"host": SRV_PREFIX + _srv_name(value.removeprefix(SRV_PREFIX), path), "port": 0}
    if type_ in _ENDPOINT_KEYS:
        return _endpoint(value, _ENDPOINT_KEYS[type_], path)
    if _is_section(type_):
        return _shaped_section(value, type_, path)
    if get_origin(type_) is Literal and value not in get_args(type_):
        raise ConfigError(f"{path}: expected one of {', '.join(get_args(type_))}, got {_seen(value)}")
    if get_origin(type_) is tuple and isinstance(value, list):
        item = get_args(type_)[0]
        return [_shaped(entry, item, f"{path}[{number}]") for number, entry in enumerate(value)]
    return value


def _shaped_section(value: Any, type_: type[Section], path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values, got {_seen(value)}")
    fields = _fields(type_)
    for key in value:
        if key not in fields:
            raise _unknown_key(_joined(path, str(key)), str(key), type_)
    for key, field in fields.items():
        if field.required and key not in value:
            raise ConfigError(f"{_joined(path, key)}: missing; {_description(field)}")
    return {key: _shaped(entry, fields[key].type, _joined(path, key)) for key, entry in value.items()}


def _endpoint(value: Any, host_key: str, path: str) -> dict[str, Any]:
    match = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"{path}: expected host:port, got {_seen(value)}")
    return {host_key: match["v6"] or match["host"], "port": int(match["port"])}


def _srv_name(name: str, path: str) -> str:
    bare = name.removesuffix(".").lower()
    if len(bare) > DNS_NAME_CHARACTERS_MAX or not _SRV_NAME.fullmatch(bare):
        raise ConfigError(
            f"{path}: expected srv:// and a name such as _web._tcp.example.net, got {_seen(name)}"
        )
    return bare


def _told(text: str, raw: Any) -> ConfigError:
    """Put msgspec's complaint into our words: path first, then what was expected and what was there."""
    match = re.fullmatch(r"(?P<said>.*?)(?: - at `\$\.?(?P<path>.*)`)?", text, re.DOTALL)
    said, path = (match["said"], match["path"] or "") if match else (text, "")
    said = re.sub(r"^Expected", "expected", re.sub(r", got `\w+`$", "", said).replace("`", ""))
    value: Any = raw
    for key, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        value = value[int(number)] if number else value[key]
    got = "" if path.rpartition(".")[2] in _SECRET_KEYS else f", got {_seen(value)}"
    return ConfigError(f"{path}: {said}{got}")


def _unknown_key(path: str, key: str, type_: Any) -> ConfigError:
    known = list(_fields(type_)) if _is_section(type_) else []
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}" if known else ""
    return ConfigError(f"{path}: unknown key{hint}")


def _flow(value: Any) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(plain(value, secrets=True), default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _seen(value: Any) -> str:
    return shortened(repr(value))


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _fields(type_: type[Section]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(type_)}


def _unannotated(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _bare(annotation: Any) -> Any:
    """Return the type without its Meta and without `| None`."""
    type_ = _unannotated(annotation)
    if get_origin(type_) in (Union, UnionType):
        return next(_unannotated(arm) for arm in get_args(type_) if arm is not NoneType)
    return type_


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Section)


def _metas(field: msgspec.structs.FieldInfo) -> list[msgspec.Meta]:
    return [meta for meta in get_args(field.type)[1:] if isinstance(meta, msgspec.Meta)]


def _description(field: msgspec.structs.FieldInfo) -> str:
    return next((meta.description for meta in _metas(field) if meta.description), "")


def _example_value(field: msgspec.structs.FieldInfo) -> Any:
    return next((meta.examples[0] for meta in _metas(field) if meta.examples), None)


_ENDPOINT = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_SRV_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_][a-z0-9_-]{0,62})*")
_ENDPOINT_KEYS = {Endpoint: "host", Server: "host", Backend: "host", Address: "ip"}
_SECRET_KEYS = frozenset({"token"})
