"""Elements: whatever a value is, it is text; and server and script allow the same."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from ztna.pages.markup import ATTRIBUTES, LINK, TAGS, el, html, wire

EVIL = "<script>alert(1)</script><img src=//evil.example onerror=x>\"'&"


def test_text_and_attributes_are_never_markup() -> None:
    text = html(el("p", EVIL, el("code", "a"), aria_label=EVIL, class_="x"))
    assert "<script" not in text and "<img" not in text
    assert text.startswith('<p aria-label="&lt;script&gt;') and text.endswith("&amp;<code>a</code></p>")
    assert text.count('"') == 4


def test_an_element_goes_over_the_wire_as_it_is() -> None:
    node = el("tr", el("td", EVIL, data_label="A", role=None), "more", id="row")
    assert wire(node) == ["tr", {"id": "row"}, ["td", {"data-label": "A"}, EVIL], "more"]


@pytest.mark.parametrize("tag", ["script", "img", "style", "iframe"])
def test_tags_that_do_things_are_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=tag):
        el(tag)


@pytest.mark.parametrize("attribute", ["onclick", "style", "src", "xlink:href"])
def test_attributes_that_do_things_are_refused(attribute: str) -> None:
    with pytest.raises(ValueError, match=attribute):
        el("p", **{attribute: "x"})


def test_links_stay_on_this_host() -> None:
    assert el("a", href="http://127.0.0.1:9431/").attributes == (("href", "http://127.0.0.1:9431/"),)
    for away in (
        "javascript:alert(1)",
        "https://evil.example/",
        "http://127.0.0.1.evil.example/",
        "//evil.example",
        "http://127.0.0.1:80@evil.example/",
    ):
        with pytest.raises(ValueError, match="away"):
            el("a", href=away)


def test_the_script_builds_from_the_same_lists() -> None:
    script = files("ztna.pages").joinpath("static/page.js").read_text()

    def listed(name: str) -> set[str]:
        (found,) = re.findall(rf"const {name} = (?:new Set\()?\[(.*?)\]", script, re.DOTALL)
        return set(re.findall(r'"([^"]+)"', found))

    assert listed("TAGS") == TAGS and listed("ATTRIBUTES") == ATTRIBUTES
    assert f"const LINK = /^{LINK.pattern.replace('/', chr(92) + '/')}$/;" in script


def test_the_script_makes_no_markup_of_text() -> None:
    script = files("ztna.pages").joinpath("static/page.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|DOMParser|new Function", script
    )
