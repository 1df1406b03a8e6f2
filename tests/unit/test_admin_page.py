"""The admin page: every value is text, and nothing in it makes a browser ask for anything."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode

import pytest

from ztna import admin_page
from ztna.admin_page import HEADERS, page

EVIL = "<script>alert(1)</script><img src=//evil.example onerror=x>\"'&"


def test_records_are_tables_and_values_are_text() -> None:
    text = page("ztna-relay", {"sessions": [{"agent": EVIL, "open": True}, {"agent": "bob", "age_s": None}]})
    assert "<th>agent</th><th>open</th><th>age_s</th>" in text
    assert "<td>yes</td>" in text and "<td></td>" in text and "bob" in text
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text


def test_hostile_keys_titles_and_lists_are_text_too() -> None:
    text = page(EVIL, {EVIL: {EVIL: [EVIL, 1, False]}})
    assert "<script" not in text and "<img" not in text


def test_it_asks_for_nothing_and_its_style_is_the_one_allowed() -> None:
    text = page("t", {"a": {"b": {}, "c": []}, "d": "", "e": 7})
    assert not re.search(r"\b(src|href|action|url\()", text)
    (style,) = re.findall(r"<style>(.*?)</style>", text)
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = HEADERS["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")
    assert "none" in text


def test_large_tables_and_deep_values_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_page, "ROWS_MAX", 2)
    text = page("t", {"rows": [{"n": n} for n in range(9)], "list": list(range(9))})
    assert text.count("<td>") == 2 and "2 of 9" in text and "0, 1, ..." in text
    deep: object = "x"
    for _ in range(50):
        deep = {"in": deep}
    assert page("t", {"deep": deep}).count("<table>") == admin_page.DEPTH_MAX
