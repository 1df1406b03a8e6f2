from __future__ import annotations

from sidecar.connector.proxy_protocol import Caller, header, own_header

FOUR = Caller(("127.0.0.1", 40_000), ("10.100.0.2", 80), "ann", "web", "f1")


def test_v1_is_a_line() -> None:
    assert header("v1", FOUR) == b"PROXY TCP4 127.0.0.1 10.100.0.2 40000 80\r\n"


def test_v2_has_addresses_and_names() -> None:
    assert header("v2", FOUR) == bytes.fromhex(
        "0d0a0d0a000d0a515549540a 21 11 001d"
        "7f000001 0a640002 9c40 0050"
        "02 0003 776562"
        "05 0002 6631"
        "e0 0003 616e6e"
    )


def test_both_addresses_are_of_one_family() -> None:
    mixed = Caller(("::1", 40_000), ("10.100.0.2", 80), "ann", "web", "f1")
    assert header("v1", mixed) == b"PROXY TCP6 ::1 ::ffff:a64:2 40000 80\r\n"
    made = header("v2", mixed)
    assert made[13] == 0x21
    assert made[16:48] == bytes(15) + b"\x01" + bytes(10) + b"\xff\xff\x0a\x64\x00\x02"
    assert int.from_bytes(made[14:16], "big") == len(made) - 16


def test_checks_speak_for_themselves() -> None:
    assert own_header("v1") == b"PROXY UNKNOWN\r\n"
    assert own_header("v2") == bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0000")
