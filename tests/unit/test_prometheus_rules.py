"""The alerts that we ship: each fires on what it is for and stays silent on what is well, evaluated by promtool."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.console import require_tools
from ztna.telemetry import METRICS

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "ztna/host/prometheus/ztna-alerts.yaml"
RUNBOOK = ROOT / "docs/runbook.md"
BAD, GOOD = "bad:1", "good:1"
STARTED = "process_start_time_seconds"
EXPIRES = "ztna_certificate_expires_seconds"


@dataclass(frozen=True)
class Case:
    """Series of a daemon that is not well and of one that is; the alert is to fire for the first alone."""

    alert: str
    job: str
    bad: Mapping[str, str]
    good: Mapping[str, str]
    fires_with: Mapping[str, str] = field(default_factory=dict)
    at: str = "100m"
    is_of_instance: bool = True
    """Whether it is about one daemon, and not about all together."""


def buckets(name: str, *counts: tuple[str, str]) -> dict[str, str]:
    """Return the series of a histogram."""
    return {f'{name}_bucket{{le="{bound}"}}': values for bound, values in counts}


SLOW, QUICK = "0+0x120", "0+60x120"


def histogram(name: str, bound: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return one with everything over the bound, and one with everything below."""
    return (
        buckets(name, (bound, SLOW), ("30.0", QUICK), ("+Inf", QUICK)),
        buckets(name, (bound, QUICK), ("30.0", QUICK), ("+Inf", QUICK)),
    )


def gauge(name: str, bad: float, good: float, /, **labels: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return one that stays at each of the two values."""
    told = ",".join(f'{label}="{value}"' for label, value in labels.items())
    series = f"{name}{{{told}}}"
    return {series: f"{bad}+0x120"}, {series: f"{good}+0x120"}


NOW_SECONDS = 100 * 60
CASES = [
    Case("ZtnaDown", "ztna-relay", *gauge("up", 0, 1)),
    Case("ZtnaNotReady", "ztna-relay", *gauge("ztna_ready", 0, 1)),
    Case("ZtnaWarns", "ztna-relay", *gauge("ztna_warnings", 1, 0)),
    Case("ZtnaRestarts", "ztna-dnsd", {STARTED: "0+60x120"}, {STARTED: "5+0x120"}),
    Case(
        "ZtnaUnexpectedErrors",
        "ztna-agent",
        {"ztna_unexpected_errors_total": "0x95 1x25"},
        {"ztna_unexpected_errors_total": "7+0x120"},
    ),
    Case("ZtnaLoopLate", "ztna-relay", *histogram("ztna_event_loop_lag_seconds", "0.1")),
    Case(
        "ZtnaFilesNearlyUsedUp",
        "ztna-relay",
        {"process_open_fds": "900+0x120", "process_max_fds": "1000+0x120"},
        {"process_open_fds": "90+0x120", "process_max_fds": "1000+0x120"},
    ),
    Case(
        "ZtnaRefusalsSurge",
        "ztna-relay",
        {'ztna_refusals_total{where="relay",reason="no_grant"}': "0+6x80 480+600x40"},
        # Much, but no more than ever.
        {'ztna_refusals_total{where="relay",reason="no_grant"}': "0+600x120"},
        {"where": "relay", "reason": "no_grant"},
    ),
    Case(
        "ZtnaDropsSurge",
        "ztna-relay",
        {'ztna_drops_total{where="forwarder",why="link_rate"}': "0+9000x120"},
        {'ztna_drops_total{where="forwarder",why="link_rate"}': "0+900x120"},
        {"where": "forwarder", "why": "link_rate"},
    ),
    Case("ZtnaCertificateExpiring", "ztna-agent", *gauge("ztna_certificate_expiring", 1, 0)),
    Case(
        "ZtnaCertificateExpiresToday",
        "ztna-agent",
        {EXPIRES: f"{NOW_SECONDS + 80_000}+0x120", "ztna_certificate_expiring": "1+0x120"},
        {EXPIRES: f"{NOW_SECONDS + 90_000}+0x120", "ztna_certificate_expiring": "1+0x120"},
    ),
    # One that lives no longer than a day is no trouble while it is young.
    Case(
        "ZtnaCertificateExpiresToday",
        "ztna-agent",
        {EXPIRES: f"{NOW_SECONDS + 20_000}+0x120", "ztna_certificate_expiring": "1+0x120"},
        {EXPIRES: f"{NOW_SECONDS + 80_000}+0x120", "ztna_certificate_expiring": "0+0x120"},
    ),
    Case(
        "ZtnaCrlOutOfDateSoon",
        "ztna-relay",
        *gauge("ztna_crl_next_update_seconds", NOW_SECONDS + 9_000, NOW_SECONDS + 90_000),
    ),
    # Who has none says 0.
    Case(
        "ZtnaCrlOutOfDateSoon", "ztna-relay", *gauge("ztna_crl_next_update_seconds", NOW_SECONDS + 9_000, 0)
    ),
    Case("ZtnaCrlOutOfDate", "ztna-relay", *gauge("ztna_crl_next_update_seconds", 60, NOW_SECONDS + 90_000)),
    Case(
        "ZtnaCredentialsBroken",
        "ztna-relay",
        *gauge("ztna_credentials_broken", 1, 0, what="crl"),
        {"what": "crl"},
    ),
    Case(
        "ZtnaConsulUnreachable",
        "ztna-dnsd",
        {
            'ztna_consul_requests_total{outcome="failed"}': "0+2x120",
            'ztna_consul_requests_total{outcome="answered"}': "9+0x120",
        },
        {
            'ztna_consul_requests_total{outcome="failed"}': "0+2x120",
            'ztna_consul_requests_total{outcome="answered"}': "0+1x120",
        },
        {"outcome": "failed"},
    ),
    Case("ZtnaConsulSlow", "ztna-dnsd", *histogram("ztna_consul_request_seconds", "1.0")),
    Case(
        "ZtnaConsulRejects",
        "ztna-connector",
        {'ztna_consul_requests_total{outcome="rejected"}': "0+3x120"},
        {'ztna_consul_requests_total{outcome="rejected"}': "0+1x120"},
        {"outcome": "rejected"},
    ),
    Case("ZtnaNamesStale", "ztna-dnsd", *gauge("ztna_dns_served", 1, 2)),
    Case("ZtnaNamesNotServed", "ztna-dnsd", *gauge("ztna_dns_served", 0, 1)),
    Case("ZtnaNoKeeper", "ztna-dnsd", *gauge("ztna_keeper", 0, 0), is_of_instance=False),
    Case("ZtnaTwoKeepers", "ztna-dnsd", *gauge("ztna_keeper", 1, 1), is_of_instance=False),
    Case(
        "ZtnaPoolNearlyFull",
        "ztna-dnsd",
        {
            'ztna_pool_addresses{state="leased"}': "80+0x120",
            'ztna_pool_addresses{state="resting"}': "15+0x120",
            'ztna_pool_addresses{state="free"}': "5+0x120",
        },
        {
            'ztna_pool_addresses{state="leased"}': "80+0x120",
            'ztna_pool_addresses{state="resting"}': "5+0x120",
            'ztna_pool_addresses{state="free"}': "15+0x120",
        },
    ),
    Case("ZtnaServicesWithoutLease", "ztna-dnsd", *gauge("ztna_services_without_lease", 1, 0)),
    Case(
        "ZtnaUpstreamsFail",
        "ztna-dnsd",
        {
            'ztna_dns_forwarded_total{outcome="answered"}': "0+60x120",
            'ztna_dns_forwarded_total{outcome="failed"}': "0+10x120",
        },
        {
            'ztna_dns_forwarded_total{outcome="answered"}': "0+60x120",
            'ztna_dns_forwarded_total{outcome="failed"}': "0+1x120",
        },
    ),
    Case(
        "ZtnaWorkersEnd",
        "ztna-dnsd",
        {"ztna_dns_worker_ends_total": "0+1x120"},
        {"ztna_dns_worker_ends_total": "5+0x120"},
    ),
    Case("ZtnaRelayCatalogOld", "ztna-relay", *gauge("ztna_relay_catalog_age_seconds", -1, 70)),
    Case("ZtnaRelayCatalogOld", "ztna-relay", *gauge("ztna_relay_catalog_age_seconds", 200, 70)),
    Case("ZtnaForwarderFellBack", "ztna-relay", *gauge("ztna_forwarding_fell_back", 1, 0)),
    Case("ZtnaSessionsOpenSlowly", "ztna-relay", *histogram("ztna_relay_session_open_seconds", "1.0")),
    Case("ZtnaNoRelay", "ztna-agent", *gauge("ztna_relays", 0, 1, state="connected"), {"state": "connected"}),
    Case("ZtnaRelayAway", "ztna-agent", *gauge("ztna_relays", 1, 0, state="away"), {"state": "away"}),
    Case(
        "ZtnaFlowsFail",
        "ztna-agent",
        {"ztna_flows_failed_total": "0+12x120", "ztna_flow_open_seconds_count": "0+60x120"},
        {"ztna_flows_failed_total": "0+12x120", "ztna_flow_open_seconds_count": "0+600x120"},
    ),
    Case("ZtnaFlowsOpenSlowly", "ztna-agent", *histogram("ztna_flow_open_seconds", "2.5")),
    Case(
        "ZtnaFlowsForsaken",
        "ztna-agent",
        {'ztna_tcp_flows_total{outcome="forsaken"}': "0+2x120"},
        {
            'ztna_tcp_flows_total{outcome="resumed"}': "0+2x120",
            'ztna_tcp_flows_total{outcome="forsaken"}': "0x95 3x25",
        },
        {"outcome": "forsaken"},
    ),
    Case(
        "ZtnaServiceCritical",
        "ztna-connector",
        *gauge("ztna_connector_service_health", 0, 1, service="web-app"),
        {"service": "web-app"},
    ),
    Case(
        "ZtnaServicesRefused",
        "ztna-connector",
        *gauge("ztna_connector_services", 1, 0, state="refused"),
        {"state": "refused"},
    ),
    Case(
        "ZtnaServicesRefused",
        "ztna-connector",
        *gauge("ztna_connector_services", 1, 0, state="kept"),
        {"state": "kept"},
    ),
    Case(
        "ZtnaConsulRefuses",
        "ztna-connector",
        *gauge("ztna_consul_refused", 1, 0, what="register"),
        {"what": "register"},
    ),
    Case("ZtnaRouteFilesBroken", "ztna-connector", *gauge("ztna_route_files_broken", 1, 0)),
    Case(
        "ZtnaBackendsOld",
        "ztna-connector",
        *gauge("ztna_srv_backends_age_seconds", 400, 0, name="_db._tcp.example.net"),
        {"name": "_db._tcp.example.net"},
    ),
]


def rules() -> dict[str, dict[str, Any]]:
    """Return the alerts by name."""
    loaded = yaml.safe_load(RULES.read_text())
    return {rule["alert"]: rule for group in loaded["groups"] for rule in group["rules"]}


def promtool(*argv: str | Path, cwd: Path | None = None) -> None:
    """Run it; AssertionError with what it says when it is not content."""
    require_tools("promtool")
    done = subprocess.run(["promtool", *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def series(case: Case) -> list[dict[str, str]]:
    """Return what promtool is to take for scraped."""
    found = []
    for instance, told in ((BAD, case.bad), (GOOD, case.good)):
        for name, values in told.items():
            own = f'job="{case.job}",instance="{instance}"'
            head, _, labels = name.partition("{")
            labels = labels.rstrip("}")
            found.append({"series": f"{head}{{{own}{',' if labels else ''}{labels}}}", "values": values})
    return found


def told(text: str, labels: Mapping[str, str]) -> str:
    """Return an annotation as Prometheus fills it in."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)


def promtool_test(case: Case) -> dict[str, Any]:
    """Return the test that promtool is to run."""
    rule = rules()[case.alert]
    labels = {"job": case.job, "instance": BAD} if case.is_of_instance else {}
    labels |= case.fires_with
    expected = {
        "exp_labels": labels | rule["labels"],
        "exp_annotations": {name: told(text, labels) for name, text in rule["annotations"].items()},
    }
    return {
        "interval": "1m",
        "input_series": series(case),
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": case.alert, "exp_alerts": [expected]},
        ],
    }


def test_the_rules_are_sound() -> None:
    promtool("check", "rules", RULES)


def test_each_alert_fires_for_what_it_is_for_and_for_nothing_else(tmp_path: Path) -> None:
    # An alert by itself: promtool evaluates all rules that it is given, each minute of each test.
    for name, rule in rules().items():
        alone = {"groups": [{"name": name, "rules": [rule]}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(alone))
        tests = [promtool_test(case) for case in CASES if case.alert == name]
        told = {"rule_files": [f"{name}.yaml"], "tests": tests}
        (tmp_path / f"{name}.test.yaml").write_text(yaml.safe_dump(told))
    promtool("test", "rules", *sorted(tmp_path.glob("*.test.yaml")))


@pytest.mark.parametrize("keepers", [("1", "0")])
def test_one_keeper_is_as_it_should_be(tmp_path: Path, keepers: tuple[str, str]) -> None:
    quiet = {
        "interval": "1m",
        "input_series": [
            {"series": f'ztna_keeper{{instance="{n}"}}', "values": f"{value}+0x120"}
            for n, value in enumerate(keepers)
        ],
        "alert_rule_test": [
            {"eval_time": "100m", "alertname": name, "exp_alerts": []}
            for name in ("ZtnaNoKeeper", "ZtnaTwoKeepers")
        ],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [quiet]}))
    promtool("test", "rules", file)


def test_every_alert_is_tried() -> None:
    assert {case.alert for case in CASES} == set(rules())


def test_every_alert_says_how_bad_it_is_and_has_its_section_in_the_runbook() -> None:
    headings = re.findall(r"^### (Ztna\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == list(rules()), "one section an alert, in their order"
    for name, rule in rules().items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"runbook.md#{name.lower()}"


def test_the_rules_name_only_metrics_and_labels_that_there_are() -> None:
    for name, rule in rules().items():
        problems = strangers(rule["expr"])
        assert not problems, f"{name}: {problems}"


def strangers(expr: str) -> list[str]:
    """Return the metrics of an expression that are none of ours or Python's, and labels that theirs have not."""
    ours = {suffixed: each for each in METRICS.values() for suffixed in suffixes(each.name, each.kind)}
    found = []
    for metric, selector in re.findall(r"\b(ztna_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expr):
        if metric.startswith("ztna_") and metric not in ours:
            found.append(metric)
            continue
        known = set(ours[metric].labels) if metric in ours else set()
        used = re.findall(r"(\w+)(?:=~|!~|!=|=)", selector)
        found += [f"{metric}{{{label}}}" for label in used if label not in known | {"job", "instance"}]
    return found


def suffixes(name: str, kind: str) -> tuple[str, ...]:
    """Return the names of a metric's series."""
    return tuple(f"{name}_{each}" for each in ("bucket", "sum", "count")) if kind == "histogram" else (name,)


def test_a_stranger_is_found() -> None:
    assert strangers('rate(ztna_nothing_total[5m]) + ztna_ready{why="x",job="y"}') == [
        "ztna_nothing_total",
        "ztna_ready{why}",
    ]
