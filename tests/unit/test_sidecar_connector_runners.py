from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sidecar.connector.checks import Check, parse
from sidecar.connector.health import CheckKey
from sidecar.connector.runners import Capabilities, capabilities, definition, why_not
from ztna.catalog import Probe
from ztna.config import CheckConfig, Endpoint
from ztna.leases import Port, Protocol

OLDEST, NEWEST = Capabilities("node-1", (1, 8, 7)), Capabilities("node-1", (1, 19, 2), runs_scripts=True)
BACKEND = Endpoint("127.0.0.1", 8080)
KEY = CheckKey(Port("tcp", 80), BACKEND)


def check(backend: Endpoint = BACKEND, protocol: Protocol = "tcp", **keys: Any) -> Check:
    return parse(CheckConfig(**({"runner": "consul"} | keys)), protocol, backend, "here")


def test_what_consul_says_of_its_agent() -> None:
    told = {"Config": {"NodeName": "node-1", "Version": "1.19.2+ent"}, "DebugConfig": {}}
    assert capabilities(told) == Capabilities("node-1", (1, 19, 2))
    told["DebugConfig"] = {"EnableRemoteScriptChecks": True}
    assert capabilities(told).runs_scripts
    told["Config"]["Version"] = "1.19.2+ztna.embedded"
    assert capabilities(told).is_embedded
    for wrong in ({}, {"Config": None}, {"Config": {"NodeName": "n", "Version": 1}}):
        with pytest.raises((ValueError, TypeError)):
            capabilities(wrong)
    with pytest.raises(ValueError, match="'dev' is none"):
        capabilities({"Config": {"NodeName": "n", "Version": "dev"}})


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "tcp"},
        {"kind": "http", "path": "/health", "headers": ("X-A: b",)},
        {"kind": "http", "tls": True, "tls_skip_verify": True},
        {"kind": "grpc", "grpc_service": "web", "tls": True},
    ],
    ids=lambda keys: str(keys["kind"]),
)
def test_what_every_consul_runs(keys: dict[str, Any]) -> None:
    assert why_not(check(**keys), OLDEST) is None
    assert why_not(check(**keys), NEWEST) is None


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"kind": "udp"}, "1.8.7 has no check of kind udp"),
        ({"kind": "tcp", "failures_before_warning": 1}, "1.8.7 knows no failures_before_warning"),
        ({"kind": "http", "tls": True, "tls_name": "web"}, "1.8.7 takes no tls_name"),
        ({"kind": "script", "command": ("/bin/true",)}, "enable_script_checks is off"),
    ],
    ids=lambda value: str(value.get("kind")) if isinstance(value, dict) else "",
)
def test_what_only_newer_ones_run(keys: dict[str, Any], why: str) -> None:
    assert why_not(check(**keys), NEWEST) is None
    said = why_not(check(**keys), OLDEST)
    assert said is not None and why in said


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"kind": "icmp"}, "no check of kind icmp"),
        ({"kind": "none"}, "no check of kind none"),
        ({"kind": "ttl"}, "no check of kind ttl"),
        ({"kind": "tcp", "send": "ping"}, "sends and expects nothing"),
        ({"kind": "udp", "expect": "pong"}, "sends and expects nothing"),
        ({"kind": "http", "body": "ready"}, "looks at no body"),
        ({"kind": "http", "expect_headers": ("Server: x",)}, "no header of the answer"),
        ({"kind": "http", "status": ("204",)}, "takes 200 to 299 alone"),
        ({"kind": "http", "tls": True, "ca": "/ca.pem"}, "its own authorities"),
        ({"kind": "grpc", "tls": True, "tls_name": "web"}, "takes no tls_name"),
        ({"kind": "tcp", "interval_s": 0.5}, "once a second at most"),
    ],
)
def test_what_no_consul_runs(keys: dict[str, Any], why: str) -> None:
    said = why_not(check(**keys), NEWEST)
    assert said is not None and why in said


def test_where_else_the_sidecar_runs_it() -> None:
    embedded = Capabilities("node-1", (1, 19, 2), is_embedded=True)
    assert "no checks but TTL" in str(why_not(check(), embedded))
    assert "several backends" in str(why_not(check(), NEWEST, is_only_backend=False))
    by_name = check(Endpoint("web.internal", 8080), kind="script", command=("/bin/true",))
    assert "would not look up" in str(why_not(by_name, NEWEST))


def test_a_check_becomes_a_probe_with_its_thresholds() -> None:
    asked = check(
        kind="http",
        path="/health",
        method="HEAD",
        headers=("X-A: b",),
        interval_s=3.0,
        timeout_s=1.5,
        success_before_passing=2,
        failures_before_critical=4,
        failures_before_warning=3,
        tls=True,
        tls_name="web",
        tls_skip_verify=True,
    )
    made = definition(asked, KEY, "ztna:web@c1", "warning", 600.0)
    assert made.check_id.startswith("ztna:web@c1:tcp:80:0:")
    assert (made.name, made.status, made.deregister_after_s) == ("http 127.0.0.1:8080", "warning", 600.0)
    assert made.probe == Probe(
        kind="http",
        target="https://127.0.0.1:8080/health",
        interval_s=3.0,
        timeout_s=1.5,
        success_before_passing=2,
        failures_before_critical=4,
        failures_before_warning=3,
        tls=True,
        tls_name="web",
        tls_skip_verify=True,
        method="HEAD",
        headers=(("X-A", "b"),),
    )


def test_another_probe_has_another_id_and_the_same_the_same() -> None:
    ids = {definition(check(kind=kind), KEY, "own", "passing", 60.0).check_id for kind in ("tcp", "grpc")}
    again = {definition(check(kind=kind), KEY, "own", "critical", 61.0).check_id for kind in ("tcp", "grpc")}
    assert len(ids) == 2
    assert ids == again


def test_targets_of_the_other_kinds() -> None:
    def target(**keys: Any) -> tuple[str, tuple[str, ...]]:
        probe = definition(check(**keys), KEY, "own", "passing", 60.0).probe
        return probe.target, probe.command

    assert target(kind="tcp", port=81) == ("127.0.0.1:81", ())
    assert target(kind="grpc") == ("127.0.0.1:8080", ())
    assert target(kind="grpc", grpc_service="web") == ("127.0.0.1:8080/web", ())
    assert target(kind="script", command=("/bin/check", "-v"))[1] == (
        "env",
        "ZTNA_BACKEND=127.0.0.1:8080",
        "ZTNA_BACKEND_IP=127.0.0.1",
        "/bin/check",
        "-v",
    )
    assert msgspec.structs.asdict(definition(check(protocol="udp"), KEY, "own", "passing", 60.0).probe)[
        "kind"
    ] == ("udp")
