"""The documents as a site: every page is in it, every link and anchor leads somewhere, nobody else is asked."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect, sync_playwright

from tests.support.browser import CHROMIUM, LAUNCH, Watch
from tests.support.console import require_tools
from tests.support.pages import ROOT

pytestmark = pytest.mark.slow

CONFIG = ROOT / "docs/site/mkdocs.yml"
LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""", re.I
)
LOADED_BY_STYLES = re.compile(r"""(?:url\(|@import\s*)["']?((?:https?:)?//[^"')\s]+)""")


def build(config: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Build the site; strictly, as the configuration says."""
    argv = [sys.executable, "-m", "mkdocs", "build", f"--config-file={config}", f"--site-dir={directory}"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; what leads nowhere fails it."""
    directory = tmp_path_factory.mktemp("site") / "site"
    done = build(CONFIG, directory)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_page_is_in_the_navigation_and_was_built(site: Path) -> None:
    named = re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load(CONFIG.read_text())["nav"]))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(named) == pages | {"source/CHANGELOG.md"}
    assert not [name for name in named if not (site / name).with_suffix(".html").is_file()]


def test_the_first_page_leads_to_every_other() -> None:
    first = (ROOT / "docs/index.md").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in first} == set()


def test_opening_a_page_asks_nobody_else(site: Path) -> None:
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert pages and styles
    asked = [url for page in pages for url in LOADED.findall(page.read_text())]
    asked += [url for style in styles for url in LOADED_BY_STYLES.findall(style.read_text())]
    assert asked == []


def test_what_would_ask_somebody_else_is_seen() -> None:
    page = '<a href="https://a.example/"><script src=//b.example/x.js></script><link rel="stylesheet" href="https://c.example/">'
    assert LOADED.findall(page) == ["//b.example/x.js", "https://c.example/"]
    assert LOADED_BY_STYLES.findall('@import "https://d.example"; x { y: url(//e.example) }') == [
        "https://d.example",
        "//e.example",
    ]


def test_links_out_of_the_documents_lead_to_copies(site: Path) -> None:
    assert 'href="source/nomad/connector.nomad.hcl"' in (site / "nomad.html").read_text()
    assert (site / "source/nomad/connector.nomad.hcl").read_bytes() == (
        ROOT / "nomad/connector.nomad.hcl"
    ).read_bytes()
    assert 'href="../backends.html"' in (site / "source/CHANGELOG.html").read_text()


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The site at an address of its own."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_browser_finds_a_reason_by_search_and_asks_nobody_else(served: str) -> None:
    require_tools(CHROMIUM)
    watch = Watch()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**LAUNCH)
        page = browser.new_page()
        watch.over(page)
        for path in ("tutorial.html", "reference/configuration.html", "index.html"):
            page.goto(f"{served}/{path}")
            expect(page.locator("h1")).to_be_visible()
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially("stale_epoch")
        found = page.locator(".md-search-result__item").first
        expect(found).to_contain_text("stale_epoch", timeout=30_000)
        found.locator("a").first.click()
        expect(page.locator("article")).to_contain_text("stale_epoch")
        browser.close()
    assert watch.origins == {served} and watch.errors == []


def test_what_can_be_searched_has_every_section(site: Path) -> None:
    index = (site / "search/search_index.json").read_text()
    assert "ztna leases pin" in index and "names.html#when-consul-is-away" in index


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "site").mkdir(parents=True)
    config = yaml.safe_load(CONFIG.read_text()) | {"nav": ["index.md"], "hooks": []}
    (docs / "site/mkdocs.yml").write_text(yaml.safe_dump(config))
    for text, complaint in (
        ("[x](nowhere.md)", "not found"),
        ("[x](#nowhere)", "no such anchor"),
        ("[x](/index.md)", "absolute"),
    ):
        (docs / "index.md").write_text(f"# Title\n\n{text}\n")
        done = build(docs / "site/mkdocs.yml", tmp_path / "site")
        assert done.returncode != 0 and complaint in done.stderr, f"{text}: {done.stderr}"
