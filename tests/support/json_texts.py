"""Texts of JSON values for hypothesis: whatever is one, what only looks like one, and objects with either put in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

DIGITS_MAX = 1_500
"""More than any number of ours has, and within the smallest frame with JSON (ztna.wire.stream.JSON_BYTES_MAX)."""
NESTED_MAX = 200
"""Within what a decoder's stack bears."""
NO_STACK_BEARS = 1_000
_HERE = "another value"


def json_object(fields: Mapping[str, str]) -> str:
    """Return the object of names and values that are JSON already."""
    return "{" + ",".join(f"{name}:{value}" for name, value in fields.items()) + "}"


_NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(json.dumps),
    st.sampled_from((2**63, 2**64, -(2**63) - 1, 10**400)).map(str),
    st.integers(1, DIGITS_MAX).map(lambda digits: "-" + "9" * digits),
    st.from_regex(r"-?[1-9][0-9]{0,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,6})?", fullmatch=True),
)
_STRINGS = st.builds(
    json.dumps, st.text(st.characters(exclude_categories=("Cs",)), max_size=20), ensure_ascii=st.booleans()
)
_NESTS = st.builds(
    lambda depth, pair, inner: pair[0] * depth + inner + pair[1] * depth,
    st.integers(1, NESTED_MAX),
    st.sampled_from((("[", "]"), ('{"\u00e9":', "}"))),
    _NUMBERS | _STRINGS,
)
ANYTHING = st.recursive(
    st.sampled_from(("null", "true", "false")) | _NUMBERS | _STRINGS | _NESTS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{','.join(each)}]")
        | st.dictionaries(_STRINGS, inner, max_size=3).map(json_object)
    ),
    max_leaves=6,
)
"""Any JSON value: also numbers that no integer or float of ours holds, all of Unicode, and deep nests."""
NO_JSON = st.one_of(
    st.sampled_from(("NaN", "Infinity", "-Infinity", "-", "01", "1.", "1e", '"\\x"', '"\udcff"', '"\ud800"')),
    st.text(st.characters(categories=("Cs",)), min_size=1, max_size=3).map(json.dumps),
    st.builds(
        lambda depth, opening: opening * depth, st.integers(1, DIGITS_MAX), st.sampled_from(("[", '{"":'))
    ),
    st.integers(NO_STACK_BEARS, DIGITS_MAX).map(lambda depth: "[" * depth + "]" * depth),
)
"""What Python's own json would write or take, and is none: no number, halves of pairs, nests without an end."""
OF_THE_NEXT_RELEASE = st.dictionaries(
    st.from_regex(r"new_[a-z]{1,8}", fullmatch=True).map(json.dumps), ANYTHING, max_size=3
)
"""Fields that nobody has yet."""


def with_fields(body: bytes, new: Mapping[str, str]) -> bytes:
    """Add fields to an object."""
    return body.removesuffix(b"}") + b"".join(b"," + _encoded(f"{name}:{new[name]}") for name in new) + b"}"


def with_a_value_replaced(body: bytes, value: str, data: st.DataObject) -> bytes:
    """Put the value in the place of one that hypothesis chooses, however deep in the object that is."""
    raw = json.loads(body)
    inside, key = data.draw(st.sampled_from(list(_places(raw))))
    inside[key] = _HERE
    return _encoded(json.dumps(raw).replace(json.dumps(_HERE), value))


def _places(raw: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every object or array in a value, with each of its names or numbers."""
    if isinstance(raw, dict | list):
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield raw, key
            yield from _places(value)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
