from __future__ import annotations

import pytest

from sidecar.connector.checks import Check, parse
from ztna.config import CheckConfig, Endpoint
from ztna.errors import ConfigError
from ztna.leases import Protocol

BACKEND = Endpoint("web.internal", 8080)


def parsed(protocol: Protocol = "tcp", **config: object) -> Check:
    return parse(CheckConfig(**config), protocol, BACKEND, "checks[0]")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "protocol", "used"),
    [("auto", "tcp", "tcp"), ("auto", "udp", "udp"), ("http", "tcp", "http"), ("none", "udp", "none")],
)
def test_asks_as_the_protocol_unless_told(kind: str, protocol: Protocol, used: str) -> None:
    assert parsed(protocol, kind=kind).kind == used


def test_asks_the_backend_or_another_port_of_its_host() -> None:
    assert parsed().target == BACKEND
    check = parsed(kind="http", port=9090, path="/up", tls=True)
    assert check.url == "https://web.internal:9090/up"
    assert parsed(kind="http").url == "http://web.internal:8080/"


def test_statuses_are_numbers_and_ranges() -> None:
    check = parsed(kind="http", status=("204", "400-403"))
    assert [status for status in range(100, 600) if check.takes(status)] == [204, 400, 401, 402, 403]
    assert parsed(kind="http").takes(299) and not parsed(kind="http").takes(302)


def test_headers_patterns_and_payloads_are_ready() -> None:
    check = parsed(kind="http", headers=("Host: a.example", "X-Empty:"), body="read[iy]")
    assert check.headers == (("Host", "a.example"), ("X-Empty", ""))
    assert check.body is not None and check.body.search(b"is ready")
    check = parsed(send="hex:00ff", expect="pong")
    assert (check.send, check.expect) == (b"\x00\xff", b"pong")


def test_headers_of_an_answer_are_looked_for_by_name_in_any_case() -> None:
    check = parsed(kind="http", expect_headers=("content-type: ^application/json", "X-Role: primary|solo"))
    content = ("Content-Type", "application/json; charset=utf-8")
    assert check.misses([content, ("x-role", "replica"), ("X-Role", "primary")]) is None
    assert check.misses([content, ("X-Role", "replica"), ("X-Role", "old")]) == (
        "X-Role does not match 'primary|solo': the answer has 'replica, old'"
    )
    assert check.misses([("X-Role", "solo")]) == (
        "content-type does not match '^application/json': the answer has none"
    )
    assert parsed(kind="http").misses([]) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"kind": "http", "status": ("2xx",)},
            r"status: expected statuses such as 204 and 200-299, got '2xx'",
        ),
        ({"kind": "http", "status": ("299-200",)}, "status: expected"),
        ({"kind": "http", "headers": ("Host",)}, "headers: expected Name: value"),
        ({"kind": "http", "headers": ("Bad name: x",)}, "headers: expected Name: value"),
        ({"kind": "http", "headers": ("X: a\r\nY: b",)}, "headers: expected Name: value"),
        ({"kind": "http", "expect_headers": ("Server",)}, "expect_headers: expected Name: value"),
        (
            {"kind": "http", "expect_headers": ("Server: (",)},
            r"expect_headers: expected a regular expression, got '\('",
        ),
        ({"kind": "tcp", "expect_headers": ("Server: x",)}, "expect_headers: only a check of kind http has"),
        ({"kind": "http", "body": "("}, r"body: expected a regular expression, got '\('"),
        ({"kind": "http", "path": "up"}, "path: expected one that begins with /"),
        ({"kind": "http", "ca": "ca.pem"}, "ca: set tls too"),
        ({"kind": "udp", "path": "/up"}, "path: only a check of kind http has one"),
        ({"kind": "icmp", "send": "x"}, "send: only a check of kind tcp or udp has one"),
        ({"send": "hex:0"}, "send: expected hexadecimal digits"),
        ({"expect": "x" * 1201}, "expect: expected at most 1200 bytes"),
        ({"kind": "script"}, "command: expected what to run"),
        ({"failures_before_warning": 3}, "failures_before_warning: expected no more than"),
    ],
)
def test_says_what_cannot_be_asked(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"checks\[0\]\.{said}"):
        parsed(**config)


def test_a_programs_own_word_counts_at_once() -> None:
    check = parsed(kind="ttl", ttl_s=5.0, failures_before_critical=3, success_before_passing=3)
    assert (check.kind, check.config.ttl_s) == ("ttl", 5.0)
    assert (check.config.failures_before_critical, check.config.success_before_passing) == (1, 1)
    with pytest.raises(ConfigError, match=r"ttl_s: only a check of kind ttl has one"):
        parsed(ttl_s=5.0)
