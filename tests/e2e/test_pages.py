"""The pages of a running mesh, in a real browser: complete, live without loading again, and closed to all else."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from tests.support.browser import LAUNCH, Watch, tell_violations
from tests.support.console import command, require_tools
from tests.support.consul import require_binary
from tests.support.lab import until
from ztna.admin import serving
from ztna.config import Config, Endpoint
from ztna.pages import live
from ztna.runtime import Daemon

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

END_SECONDS = 10.0
"""Far above what it takes, whatever else runs here; tests/unit/test_pages_live.py is stricter."""
WAIT_MILLISECONDS = 20_000
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SERVICES = ("db", "echo-service", "web-app")
DAEMONS = ("relay", "dnsd", "connector", "agent")
HIDDEN = """(hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@dataclass
class Up:
    """A `ztna up` that runs on a real Consul, and what it printed."""

    process: subprocess.Popen[bytes]
    text: str

    @property
    def page(self) -> str:
        return self._found(r"in a browser: (http://127\.0\.0\.1:\d+/)")

    @property
    def web_service(self) -> str:
        return self._found(r"curl (http://\S+:8080/)")

    @property
    def database(self) -> str:
        return self._found(r"POST (http://127\.0\.0\.1:\d+/db)/up")

    def _found(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        assert found is not None, self.text
        return found.group(1)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    require_tools("chromium", "curl")
    directory = tmp_path_factory.mktemp("up")
    (directory / "consul").symlink_to(require_binary("newest"))
    output = directory / "printed"
    with output.open("wb") as printed:
        process = subprocess.Popen(
            [command("ztna"), "up"],
            stdout=printed,
            stderr=printed,
            env=os.environ
            | {"TMPDIR": str(directory), "COLUMNS": "200", "PATH": f"{directory}:{os.environ['PATH']}"},
        )
    try:
        until("the commands to try", lambda: "Certificates, configurations" in output.read_text(), 60)
        yield Up(process, output.read_text())
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    require_tools("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(**LAUNCH)  # type: ignore[arg-type]
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    context = await browser.new_context(viewport=WIDE)  # type: ignore[arg-type]
    context.set_default_timeout(WAIT_MILLISECONDS)
    await context.add_init_script(tell_violations())
    yield context
    await context.close()


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Hold every page of a test to: no error, no broken policy, one origin."""
    watch = Watch()
    yield watch
    assert watch.errors == []
    assert len(watch.origins) == 1, watch.origins


async def opened(context: BrowserContext, watch: Watch, url: str) -> Page:
    """Open a page and wait until it is live."""
    page = await context.new_page()
    watch.over(page)
    await page.goto(url)
    await expect(page.locator("#live")).to_have_text("Live", timeout=WAIT_MILLISECONDS)
    return page


def curl(*arguments: str) -> bool:
    subprocess.run(["curl", "-sS", "--fail", *arguments], check=True, timeout=10, stdout=subprocess.DEVNULL)
    return True


def use(up: Up) -> None:
    """Have a session: the first may be refused while the relay has not heard of the service yet."""
    until("the web service answers", lambda: curl(up.web_service))


async def row(page: Page, table: str, name: str) -> str:
    """Return the text of a table's row."""
    rows = page.get_by_role("table", name=table).get_by_role("row")
    return await rows.filter(has_text=name).first.inner_text()


async def test_the_mesh_shows_services_with_their_addresses_and_paths(
    up: Up, context: BrowserContext, watch: Watch
) -> None:
    use(up)
    page = await opened(context, watch, up.page)
    await expect(page.get_by_role("heading", level=1)).to_have_text("Mesh")
    await expect(page.get_by_role("status")).to_contain_text("Everything is ready")
    for service in SERVICES:
        assert re.search(r"127\.100\.\d+\.\d+", await row(page, "Services", service)), service
    await expect(page.get_by_role("table", name="Paths")).to_contain_text("direct, TLS")
    picture = page.get_by_role(
        "img", name=re.compile("1 agent, 1 relay, 1 connector, 3 backends, 3 services")
    )
    await expect(picture).to_contain_text("ztna/agent")
    for name in DAEMONS:
        assert "ready" in await row(page, "Daemons", name)


async def test_it_changes_without_loading_again_when_a_backend_dies_and_recovers(
    up: Up, context: BrowserContext, watch: Watch
) -> None:
    curl("-X", "POST", f"{up.database}/down")
    page = await opened(context, watch, up.page)
    await page.evaluate("window.loadedOnce = true")
    services = page.get_by_role("table", name="Services")
    database = services.get_by_role("row").filter(has_text="db")
    drawn = page.locator("svg g.box", has=page.locator("title", has_text=re.compile("^db:")))
    await expect(database).to_contain_text("critical", timeout=WAIT_MILLISECONDS)
    await expect(drawn).to_have_class("box critical")
    curl("-X", "POST", f"{up.database}/up")
    await expect(database).to_contain_text("passing", timeout=WAIT_MILLISECONDS)
    await expect(drawn).to_have_class("box passing")
    await expect(page.locator("header")).to_contain_text("3 of 3")
    # What nobody sees takes no connection, and is up to date again when it is looked at.
    await page.evaluate(HIDDEN, True)
    assert await page.evaluate("stream") is None
    curl("-X", "POST", f"{up.database}/down")
    await page.evaluate(HIDDEN, False)
    await expect(database).to_contain_text("Connection refused", timeout=WAIT_MILLISECONDS)
    assert await page.evaluate("window.loadedOnce") is True


@pytest.mark.parametrize(
    ("daemon", "title", "tables"),
    [
        ("relay", "Relay demo", ("Sessions", "Connections", "Services by DNS")),
        ("dnsd", "dnsd, ztna.local", ("Services", "Leases")),
        ("connector", "Connector demo", ("Services", "Backends", "Relays", "Sessions")),
        ("agent", "Agent ztna/agent", ("Services", "Relays")),
    ],
)
async def test_each_daemon_has_its_page(
    up: Up, context: BrowserContext, watch: Watch, daemon: str, title: str, tables: tuple[str, ...]
) -> None:
    use(up)
    page = await opened(context, watch, await daemon_page(up, context, daemon))
    await expect(page.get_by_role("heading", level=1)).to_have_text(title)
    for table in tables:
        await expect(page.get_by_role("table", name=table, exact=True)).to_be_visible()
    # The raw state is folded, opens by keyboard, and is then as it is now.
    await page.locator("#raw summary").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#raw pre")).to_contain_text('"uptime_s"')
    await expect(page.locator("#raw pre")).to_be_visible()


async def daemon_page(up: Up, context: BrowserContext, daemon: str) -> str:
    """Return where a daemon's page is, as the page of the mesh links to it."""
    page = await context.new_page()
    await page.goto(up.page)
    row = page.get_by_role("table", name="Daemons").get_by_role("row").filter(has_text=daemon)
    address = await row.get_by_role("link").get_attribute("href")
    await page.close()
    assert address is not None
    return address


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
async def test_it_fits_both_schemes_and_narrow_screens(
    up: Up, browser: Browser, watch: Watch, tmp_path: Path, scheme: str, size: dict[str, int]
) -> None:
    context = await browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    try:
        page = await opened(context, watch, up.page)
        await page.screenshot(path=tmp_path / f"mesh-{scheme}-{size['width']}.png", full_page=True)
        assert await page.evaluate("document.documentElement.scrollWidth") <= size["width"], (
            "it scrolls sideways"
        )
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", background)[0])
        assert (red < 64) == (scheme == "dark"), background
        # What is said by colour is said in words too: each mark has a sign and text.
        for mark in await page.locator(".mark").all_inner_texts():
            assert re.fullmatch(r"[^\w\s]\s*\w.*", mark), mark
    finally:
        await context.close()


async def test_it_is_complete_without_a_script(up: Up, browser: Browser, watch: Watch) -> None:
    context = await browser.new_context(java_script_enabled=False)
    try:
        page = await context.new_page()
        watch.over(page)
        await page.goto(up.page)
        for service in SERVICES:
            assert "127.100." in await row(page, "Services", service)
        await expect(page.locator("#live")).to_contain_text("load again")
    finally:
        await context.close()


async def test_names_that_peers_choose_are_only_ever_text(context: BrowserContext) -> None:
    """A hostile service and agent name, on the page that is loaded and in what is set in place afterwards."""
    shown = {"session": "1", "service": "web-app", "agent": "somebody", "connector_id": "alpha"}
    watch = Watch()
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("ztna-relay", Config(), tasks)
        daemon.status_sources["sessions"] = lambda: [shown]
        async with serving(daemon, Endpoint("127.0.0.1", 0), None):
            page = await context.new_page()
            watch.over(page)
            url = "http://{}:{}/".format(*daemon.admin_address)
            await page.goto(url)
            await page.wait_for_selector("#live[data-state=live]")
            shown |= {"service": EVIL, "agent": EVIL, "connector_id": EVIL}
            for _ in ("set in place", "loaded"):
                await page.wait_for_function("text => document.body.innerText.includes(text)", arg=EVIL)
                assert await page.locator("img, main script, body > script").count() == 0
                await page.goto(url)
            # And markup from text is refused even to a script of ours.
            refused = (
                "() => { try { document.body.innerHTML = '<p>x</p>'; return false } catch { return true } }"
            )
            before = list(watch.errors)
            assert await page.evaluate(refused) is True
            assert before == []


async def test_a_page_that_is_open_comes_back_with_its_daemon(context: BrowserContext) -> None:
    page, port = await context.new_page(), 0
    for name in ("ztna-first", "ztna-second"):
        async with asyncio.TaskGroup() as tasks:
            daemon = Daemon(name, Config(), tasks)
            async with serving(daemon, Endpoint("127.0.0.1", port), None):
                if not port:
                    port = daemon.admin_address[1]
                    await page.goto(f"http://127.0.0.1:{port}/")
                await expect(page.get_by_role("heading", level=1)).to_have_text(
                    name, timeout=WAIT_MILLISECONDS
                )
                await expect(page.locator("#live")).to_have_text("Live", timeout=WAIT_MILLISECONDS)
        await expect(page.locator("#live")).to_contain_text("No answer since", timeout=WAIT_MILLISECONDS)


async def test_one_page_too_many_says_so_and_is_live_when_loaded_after_another_was_closed(
    context: BrowserContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LISTENERS_MAX", 1)
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("ztna-full", Config(), tasks)
        async with serving(daemon, Endpoint("127.0.0.1", 0), None):
            first, second = await context.new_page(), await context.new_page()
            url = "http://{}:{}/".format(*daemon.admin_address)
            await first.goto(url)
            await expect(first.locator("#live")).to_have_text("Live", timeout=WAIT_MILLISECONDS)
            await second.goto(url)
            await expect(second.locator("#live")).to_have_text(
                "Not live: too many pages are open. Close one and load this one again."
            )
            await first.close()
            async with asyncio.timeout(WAIT_MILLISECONDS / 1000):
                while await second.locator("#live").inner_text() != "Live":
                    await second.reload()
                    await second.wait_for_selector("#live[data-state]")


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (403, "application/json", "no longer lets this browser ask"),
        (404, "text/plain", "has no such page"),
        (500, "text/plain", "something else answers here now (status 500)"),
        (200, "text/html", "something else answers here now (status 200)"),
    ],
)
async def test_a_refused_stream_is_told_by_what_it_was_answered(
    context: BrowserContext, status: int, kind: str, said: str
) -> None:
    """Another program has the port by the time that the browser comes back."""
    page = await context.new_page()
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("ztna-gone", Config(), tasks)
        async with serving(daemon, Endpoint("127.0.0.1", 0), None):
            host, port = daemon.admin_address
            await page.goto(f"http://{host}:{port}/")
            await expect(page.locator("#live")).to_have_text("Live", timeout=WAIT_MILLISECONDS)

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status, content_type=kind, text="no")

    app = web.Application()
    app.router.add_get("/events", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        await expect(page.locator("#live")).to_contain_text(said, timeout=WAIT_MILLISECONDS)
        await expect(page.get_by_role("heading", level=1)).to_have_text("ztna-gone")
    finally:
        await runner.cleanup()


async def test_daemons_and_the_mesh_end_in_time_with_pages_open(up: Up, context: BrowserContext) -> None:
    """The last of the file: SIGTERM to the agent, then Ctrl-C, with an event stream of each open."""
    agent = await context.new_page()
    await agent.goto(await daemon_page(up, context, "agent"))
    mesh = await context.new_page()
    await mesh.goto(up.page)
    for page in (agent, mesh):
        await expect(page.locator("#live")).to_have_text("Live", timeout=WAIT_MILLISECONDS)
    pid = int(re.findall(r"pid (\d+)", await agent.locator("header").inner_text())[0])
    os.kill(pid, signal.SIGTERM)
    until("the agent has ended", lambda: not is_running(pid), END_SECONDS)
    await expect(agent.locator("#live")).to_contain_text("No answer since", timeout=WAIT_MILLISECONDS)
    await expect(mesh.get_by_role("status")).to_contain_text(
        "agent does not answer", timeout=WAIT_MILLISECONDS
    )
    await expect(mesh.get_by_role("status")).to_contain_text("agent has ended")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(END_SECONDS) == 0
    await expect(mesh.locator("#live")).to_contain_text("No answer since", timeout=WAIT_MILLISECONDS)


def is_running(pid: int) -> bool:
    try:
        return (
            "(zombie)"
            not in Path(f"/proc/{pid}/status").read_text().partition("State:")[2].partition("\n")[0]
        )
    except FileNotFoundError:
        return False
