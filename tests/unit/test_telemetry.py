"""ztna.telemetry: what a line of log looks like, and the counters."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from ztna import log_lines, telemetry
from ztna.config import LogConfig
from ztna.jsontypes import Secret
from ztna.reasons import Reason


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


log = telemetry.logger("ztna.test")


def written(config: LogConfig, stream: io.StringIO | None = None) -> io.StringIO:
    out = stream if stream is not None else io.StringIO()
    log_lines.configure(config, out)
    return out


def test_json_lines_when_it_is_no_terminal() -> None:
    out = written(LogConfig())
    log.info("session_opened", peer="a b", n=1, ratio=0.5, ok=True, none=None, reason=Reason.NO_GRANT)
    log.warning("odd", ip=IPv4Address("10.0.0.1"), secret=Secret(b"hunter2"), text="two\nlines")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert list(first)[:4] == ["time", "level", "logger", "event"]
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "logger": "ztna.test", "event": "session_opened", "peer": "a b", "n": 1, "ratio": 0.5,
        "ok": True, "none": None, "reason": "no_grant",
    }  # fmt: skip
    assert (second["ip"], second["secret"], second["text"]) == ("10.0.0.1", "***", "two\nlines")


def test_a_field_cannot_replace_the_lines_own() -> None:
    out = written(LogConfig())
    log.info("event", level="x", logger="y", time="z")
    assert json.loads(out.getvalue())["level"] == "info"


def test_human_lines_on_a_terminal_stay_on_one_line() -> None:
    out = written(LogConfig(), Terminal())
    log.info("opened", peer="alice", detail='say "hi"', attack="\x1b[2J\nfake", empty="")
    (line,) = out.getvalue().splitlines()
    assert line.endswith(
        'INFO    opened peer=alice detail="say \\"hi\\"" attack="\\u001b[2J\\nfake" empty=""'
    )
    log.error("bad")
    assert out.getvalue().splitlines()[1].startswith("\x1b[31m")


def test_human_without_a_terminal_has_no_colours() -> None:
    out = written(LogConfig(format="human"))
    log.error("bad\nevent")
    assert "\x1b" not in out.getvalue()
    assert '"bad\\nevent"' in out.getvalue()


def test_json_on_a_terminal_when_told() -> None:
    out = written(LogConfig(format="json"), Terminal())
    log.error("bad")
    assert json.loads(out.getvalue())["event"] == "bad"


def test_the_level_is_ours_and_libraries_only_warn() -> None:
    out = written(LogConfig(level="debug", format="human"))
    log.debug("shown")
    logging.getLogger("aiohttp.access").info("hidden")
    logging.getLogger("aioquic").warning("a library's %s", "warning")
    assert "shown" in out.getvalue()
    assert "hidden" not in out.getvalue()
    assert "a library's warning" in out.getvalue()
    out = written(LogConfig(level="error", format="human"))
    log.warning("hidden")
    assert out.getvalue() == ""


@pytest.mark.parametrize("format_", ["human", "json"])
def test_an_unforeseen_error_has_its_traceback(format_: str) -> None:
    out = written(LogConfig(format=format_))  # type: ignore[arg-type]
    try:
        raise ValueError("boom")
    except ValueError as error:
        log.exception("unexpected", error, where="here")
    assert "Traceback" in out.getvalue()
    assert "boom" in out.getvalue()
    if format_ == "json":
        assert "ValueError: boom" in json.loads(out.getvalue())["traceback"]


def test_a_terminal_obeys_no_errors_text() -> None:
    out = written(LogConfig(format="human"))
    try:
        raise ValueError("\x1b]0;title\x07")
    except ValueError as error:
        log.exception("unexpected", error)
    lines = out.getvalue().splitlines()
    assert lines[1].startswith("Traceback") and "\x1b" not in out.getvalue() and "]0;title" in lines[-1]


def test_refusals_and_drops_are_counted() -> None:
    def value(name: str, **labels: str) -> float:
        return telemetry.REGISTRY.get_sample_value(name, labels) or 0.0

    telemetry.refused("test", Reason.NO_GRANT)
    telemetry.refused("test", Reason.NO_GRANT)
    telemetry.dropped("test", "malformed", 3)
    assert value("ztna_refusals_total", where="test", reason="no_grant") == 2
    assert value("ztna_drops_total", where="test", why="malformed") == 3


def test_a_daemon_shows_what_it_sets_and_no_noughts_of_others() -> None:
    def shown(daemon: str) -> set[str]:
        return {family.name for family in telemetry.Page(daemon).collect()}

    assert {"ztna_dns_served", "ztna_ready", "process_open_fds"} <= shown("ztna-dnsd")
    assert not {"ztna_dns_served", "ztna_keeper", "ztna_relay_live"} & shown("ztna-sidecar agent")
    assert "ztna_flows" in shown("ztna-sidecar agent")
    assert "ztna_relay_catalog_age_seconds" in shown("ztna-relay")
    assert shown("something else") >= shown("ztna-dnsd") | shown("ztna-relay")


def test_the_registry_has_nothing_that_is_not_on_the_list() -> None:
    ours = {family.name for family in telemetry.REGISTRY.collect() if not family.name.startswith("process_")}
    assert ours == set(telemetry.METRICS)


def test_what_a_hot_path_counts_is_told_when_somebody_asks() -> None:
    def told() -> float:
        labels = {"carrier": "packet", "direction": "sent"}
        return telemetry.REGISTRY.get_sample_value("ztna_link_bytes_total", labels) or 0.0

    before = told()
    telemetry.LINK_TALLIES["packet", "sent"].count += 5
    assert told() == before
    for _ in range(2):
        list(telemetry.Page("ztna-sidecar agent").collect())
    assert told() == before + 5


@pytest.mark.parametrize("each", telemetry.METRICS.values(), ids=lambda each: each.name)
def test_every_metric_says_what_it_is(each: telemetry.Documented) -> None:
    assert each.help.endswith("."), "a sentence"
    assert each.daemons
    assert set(each.daemons) <= set(telemetry.EVERY)
    assert (each.kind == "counter") == each.name.endswith("_total")
    assert (each.kind == "histogram") <= each.name.endswith("_seconds"), "the unit is in the name"
    for label, bound in each.labels.items():
        assert bound[0].isdigit() or bound.startswith(("about ", "at most ", "as many as ")), (
            f"{label}: bounded?"
        )
