"""docs/protocol.md has every message, frame, datagram, status and reason that the codecs have, and no other."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest

from ztna.reasons import Reason
from ztna.wire import control, datagram, forwarder, stream

PAGE = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()


def section(heading: str) -> str:
    """Return what stands under a heading of the page."""
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of each table row under a heading."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def fields(message: type[msgspec.Struct]) -> set[str]:
    """Return the names that a message has on the wire."""
    return {field.encode_name for field in msgspec.structs.fields(message)}


def told(cell: str) -> set[str]:
    """Return the names in code of a cell."""
    return set(re.findall(r"`([a-z_0-9]+)`", cell))


def statuses(text: str, heading: str) -> dict[int, str]:
    """Return the numbers and names that stand after `heading:`."""
    line = text.partition(f"\n{heading}: ")[2].partition(". ")[0].partition(".\n")[0]
    return {int(number, 16): name for number, name in re.findall(r"`([0-9A-F]{2})` ([A-Z_0-9]+)", line)}


def members(enum: type[IntEnum]) -> dict[int, str]:
    """Return the numbers and names of an enum."""
    return {member.value: member.name for member in enum}


def test_every_control_message_stands_there_with_its_fields() -> None:
    messages = {
        message.__struct_config__.tag: message
        for message in (*get_args(control.AnyMessage), *get_args(control.LifeMessage))
    }
    found = {row[0].strip("`"): row[2] for row in rows("Control stream") if row[0].startswith("`")}
    assert found.keys() == messages.keys()
    for name, message in messages.items():
        assert told(found[name]) == fields(message), name


def test_every_feature_is_a_message_of_the_page() -> None:
    found = {row[0].strip("`") for row in rows("Control stream")}
    assert found >= control.FEATURES | {"hello"}


@pytest.mark.parametrize(
    ("heading", "module", "numbers"),
    [
        ("Datagrams", datagram, {*datagram._READERS, datagram.SERVICE_PACKET}),
        ("Stream carrier", stream, {*stream._READERS, stream.DATA}),
    ],
    ids=["datagrams", "frames"],
)
def test_every_type_stands_there_with_its_number(heading: str, module: ModuleType, numbers: set[int]) -> None:
    found = [match for row in rows(heading) if (match := re.fullmatch(r"`([0-9A-F]{2})` ([A-Z_]+)", row[0]))]
    assert {int(match[1], 16) for match in found} == numbers
    assert {match[2]: int(match[1], 16) for match in found} == {
        match[2]: vars(module)[match[2]] for match in found
    }


def test_frames_of_json_stand_there_with_their_fields() -> None:
    found = {row[0].partition(" ")[2]: row[1] for row in rows("Stream carrier")}
    for name, frame in (
        ("OPEN", stream.OpenFrame),
        ("RESUME", stream.ResumeFrame),
        ("PACKETS", stream.PacketsFrame),
    ):
        assert told(found[name]) == fields(frame), name


def test_every_forwarder_packet_stands_there_with_its_first_bytes() -> None:
    found = {
        row[0]: bytes.fromhex(match[1])
        for row in rows("Forwarder")
        if (match := re.match(r"`([0-9A-F ]+)`", row[1]))
    }
    names = ("BIND", "CHALLENGE", "BOUND", "PROBE", "PROBE_ANSWER")
    assert found == {name: getattr(forwarder, name) for name in names}
    assert set(found.values()) == set(forwarder._READERS)
    dial_in = re.search(r"DIAL_IN: `([0-9A-F ]+)`", section("Forwarder"))
    assert dial_in is not None and bytes.fromhex(dial_in[1]) == forwarder.DIAL_IN


def test_every_status_and_reason_stands_there() -> None:
    assert statuses(section("Datagrams"), "NACK") == members(datagram.NackStatus)
    assert statuses(section("Stream carrier"), "OPENED") == members(stream.OpenStatus)
    assert told(section("Reasons")) == set(Reason)


def test_the_examples_are_what_the_codec_makes() -> None:
    made = {
        "QAD of 203.0.113.5:54321": datagram.Qad("203.0.113.5", 54321),
        "ACK for `test-service`": datagram.Ack(b"test-service"),
    }
    found = {row[0]: row[1].strip("`") for row in rows("Datagrams") if row[0] in made}
    assert found == {name: datagram.encode(each).hex() for name, each in made.items()}
