"""The page as a whole asks for nothing but its own files, and is readable before any script runs."""

from __future__ import annotations

import re

import msgspec
import pytest

from tests.support import statuses
from ztna.pages import document, seen
from ztna.pages.views import view

EVIL = "<script>alert(1)</script>"


def test_it_shows_everything_without_a_script_and_asks_for_its_own_files_only() -> None:
    text = document.document(view(seen.read(statuses.relay())), '{"a": 1}', "12:00:00 UTC")
    assert "Relay north</h1>" in text and "<svg" in text and "7.8 kB" in text and "As of 12:00:00 UTC" in text
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["/page.svg", "/page.css", "/page.js"]
    assert "<style" not in text and " style=" not in text and not re.search(r"<script[^>]*>[^<]", text)


def test_names_titles_and_raw_state_are_text() -> None:
    told = view(seen.read(statuses.relay(relay={"name": EVIL})))
    text = document.document(told, EVIL, EVIL)
    assert text.count("<script") == 1 and "&lt;script&gt;" in text


def test_the_raw_state_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "RAW_CHARACTERS_MAX", 4)
    text = document.document(view(seen.read(statuses.relay())), "abcdef", "now")
    assert "<pre>abcd\n... /status has all of it</pre>" in text


def test_nothing_but_its_own_files_is_allowed() -> None:
    policy = dict(
        each.strip().split(" ", 1) for each in document.HEADERS["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["trusted-types"] == "'none'"
    sources = {
        name: value for name, value in policy.items() if name.endswith("-src") and name != "default-src"
    }
    assert set(sources) == {"style-src", "script-src", "connect-src", "img-src"} and set(
        sources.values()
    ) == {"'self'"}


def test_an_event_is_one_line_of_json_whatever_names_are() -> None:
    sections = document.encoded(view(seen.read(statuses.relay(relay={"name": "a\nb\r\n\ndata: x"}))).sections)
    name, data, *rest = (
        document.event({"head": sections["head"], "srv": sections["srv"]}).decode().split("\n")
    )
    assert name == "event: sections" and rest == ["", ""]
    told = msgspec.json.decode(data.removeprefix("data: "))
    assert list(told) == ["head", "srv"] and told["head"][0] == "header"
