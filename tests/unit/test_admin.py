"""Who may look and who may act: the port for this host alone, the socket for its owner."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from ztna import admin, telemetry
from ztna.admin import serving
from ztna.config import Config, Endpoint
from ztna.errors import ConfigError, Refused, ZtnaError
from ztna.pages import seen
from ztna.pages.mesh import Mesh, mesh_of
from ztna.reasons import Reason
from ztna.runtime import Daemon

FREE = Endpoint("127.0.0.1", 0)


@asynccontextmanager
async def running(path: Path | None, name: str = "ztna-test") -> AsyncIterator[tuple[Daemon, str]]:
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon(name, Config(), tasks)
        daemon.status_sources["things"] = lambda: [{"name": "<b>thing</b>"}]
        daemon.actions["close-session"] = lambda subject: subject == "there"
        async with serving(daemon, FREE, str(path) if path else None):
            yield daemon, "http://{}:{}".format(*daemon.admin_address)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_the_page_shows_the_state_and_forbids_everything_else(client: aiohttp.ClientSession) -> None:
    async with running(None) as (daemon, url):
        daemon.readiness.awaiting("catalog", "<i>no leader</i>")
        async with client.get(f"{url}/") as answer:
            text = await answer.text()
            assert answer.status == 200 and answer.content_type == "text/html"
            assert "ztna-test</h1>" in text and "Waits for catalog: &lt;i&gt;no leader" in text
            assert "&lt;b&gt;thing" in text and "<b>" not in text and "<i>" not in text
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_names_that_peers_choose_are_text_on_the_page_and_in_its_events(
    client: aiohttp.ClientSession,
) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    async with running(None, "ztna-relay") as (daemon, url):
        session = {"session": "1", "service": evil, "agent": evil, "connector_id": evil}
        daemon.status_sources["sessions"] = lambda: [session]
        async with client.get(f"{url}/") as answer:
            text = await answer.text()
            assert "<img" not in text and text.count("<script") == 1 and "&lt;img src=x" in text
        async with client.get(f"{url}/events") as answer, asyncio.timeout(10):
            while not (line := await answer.content.readline()).startswith(b"data:"):
                pass
            cell = ["td", {"role": "cell", "data-label": "Service"}, evil]
            assert cell in msgspec.json.decode(line[5:])["sessions"][3][2][4][2]
        async with client.get(f"{url}/mesh") as answer:
            assert (await answer.json())["edges"][-1]["services"] == [evil]


async def test_a_mesh_is_put_together_beside_the_loop(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def put_together(statuses: Iterable[seen.Daemon]) -> Mesh:
        threads.append(threading.current_thread())
        return mesh_of(statuses)

    monkeypatch.setattr(admin, "mesh_of", put_together)
    async with running(None, "ztna-relay") as (_, url), client.get(f"{url}/mesh") as answer:
        assert [each["kind"] for each in (await answer.json())["nodes"]] == ["relay"]
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


async def test_what_was_refused_is_in_the_status(client: aiohttp.ClientSession) -> None:
    telemetry.refused("test.admin", Reason.NO_GRANT)
    async with running(None) as (_, url), client.get(f"{url}/status") as answer:
        assert (await answer.json())["counted"]["refused"]["test.admin no_grant"] >= 1


@pytest.mark.parametrize("path", ["/", "/status", "/events", "/mesh", "/page.js"])
async def test_a_name_that_leads_here_shows_nothing(client: aiohttp.ClientSession, path: str) -> None:
    async with running(None) as (_, url):
        for host, status in (("evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200)):
            async with client.get(url + path, headers={"Host": host}) as answer:
                assert answer.status == status, host


@pytest.mark.parametrize("path", ["/", "/status", "/events"])
async def test_another_page_in_the_browser_may_lead_here_and_not_ask(
    client: aiohttp.ClientSession, path: str
) -> None:
    async with running(None) as (_, url):
        # Of the same site is a page at another port of this host.
        asked = {
            (site, mode): 200 if mode == "navigate" else 403
            for site in ("cross-site", "same-site")
            for mode in ("no-cors", "cors", "navigate")
        }
        for (site, mode), status in (
            asked | {("same-origin", "cors"): 200, ("none", "navigate"): 200}
        ).items():
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
            async with client.get(url + path, headers=headers) as answer:
                assert answer.status == status, (site, mode)
        async with client.get(f"{url}/metrics", headers={"Sec-Fetch-Site": "cross-site"}) as answer:
            assert answer.status == 200


async def test_others_than_this_host_see_no_more_than_metrics_and_health(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_is_loopback", lambda remote: False)
    async with running(None) as (_, url):
        hidden = dict.fromkeys(("/", "/status", "/events", "/mesh"), 403)
        for path, status in (hidden | {"/metrics": 200, "/healthz": 200}).items():
            async with client.get(url + path) as answer:
                assert answer.status == status, path


async def test_who_asks_for_openmetrics_gets_it_with_exemplars(client: aiohttp.ClientSession) -> None:
    telemetry.FLOW_OPEN_SECONDS.observe(0.003, {"session": "00000000000000a1"})
    # As Prometheus asks.
    prometheus = (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    )
    prometheus += "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    async with running(None) as (daemon, url):
        daemon.readiness.warn("pool", "nearly full")
        daemon.measures.append(lambda: telemetry.LEASES_KNOWN.set(17))
        async with client.get(f"{url}/metrics", headers={"Accept": prometheus}) as answer:
            text = await answer.text()
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            assert text.endswith("# EOF\n")
            # However many flows the tests before this one opened in the process.
            assert re.search(r'le="0.005"} \d+\.0 # {session="00000000000000a1"} 0.003', text)
            assert "ztna_warnings 1.0" in text
            assert "ztna_agent_services 17.0" in text, "measured when asked"
        open_metrics = "application/openmetrics-text; version"
        for accepted in (
            "*/*",
            "text/html",
            f"{open_metrics}=x",
            f"{open_metrics}=1.x",
            f"{open_metrics}=2.\xe9",
        ):
            async with client.get(f"{url}/metrics", headers={"Accept": accepted}) as answer:
                text = await answer.text()
                assert answer.content_type == "text/plain"
                assert "# EOF" not in text and "# {" not in text, "the older format has no exemplars"


async def test_only_the_socket_takes_actions(client: aiohttp.ClientSession, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with running(path) as (_, url):
        async with client.post(f"{url}/close-session/there") as answer:
            assert answer.status == 403
        assert path.stat().st_mode & 0o777 == 0o600
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as owner:
            asked = {"close-session/there": 200, "close-session/not": 404, "other/there": 404}
            for what, status in asked.items():
                async with owner.post(f"http://socket/{what}") as answer:
                    assert answer.status == status
            async with owner.get("http://socket/status") as answer:
                assert (await answer.json())["things"] == [{"name": "<b>thing</b>"}]
    assert not path.exists()


async def test_what_a_probe_found_or_why_it_could_not_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, waiting = tmp_path / "admin.sock", asyncio.Event()
    monkeypatch.setattr(admin, "PROBES_AT_ONCE_MAX", 1)
    monkeypatch.setattr(admin, "PROBE_SECONDS", 0.2)

    async def probe(subject: str) -> object:
        if subject == "long":
            await waiting.wait()
        if subject == "refused":
            raise Refused(Reason.NO_GRANT, "billing")
        return [subject]

    async with running(path) as (daemon, url):
        daemon.probes["ping"] = probe
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as owner:

            async def ask(subject: str) -> tuple[int, object]:
                async with owner.post(f"http://socket/ping/{subject}") as answer:
                    return answer.status, await answer.json()

            assert await ask("web-app") == (200, ["web-app"])
            assert await ask("refused") == (400, {"error": "no_grant: billing"})
            assert await ask("long") == (504, {"error": "not done within 0.2 s"})
            monkeypatch.setattr(admin, "PROBE_SECONDS", 30.0)
            first = asyncio.create_task(ask("long"))
            while (refused := await ask("web-app"))[0] == 200:
                await asyncio.sleep(0)
            assert refused == (503, {"error": "1 probes are under way already"})
            waiting.set()
            assert await first == (200, ["long"])
        async with aiohttp.ClientSession() as other, other.post(f"{url}/ping/web-app") as answer:
            assert answer.status == 403


async def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with running(path):
        with pytest.raises(ConfigError, match="another daemon"):
            async with serving(Daemon("other", Config(), asyncio.TaskGroup()), FREE, str(path)):
                pass
        assert path.exists()
    path.write_text("not a socket")
    with pytest.raises(ConfigError, match="something else"):
        async with serving(Daemon("other", Config(), asyncio.TaskGroup()), FREE, str(path)):
            pass
    assert path.read_text() == "not a socket"


async def test_a_place_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    daemon = Daemon("other", Config(), asyncio.TaskGroup())
    with pytest.raises(ConfigError, match="nowhere"):
        async with serving(daemon, FREE, str(tmp_path / "nowhere" / "admin.sock")):
            pass
    with pytest.raises(ZtnaError, match=r"192\.0\.2\.1"):
        async with serving(daemon, Endpoint("192.0.2.1", 1), None):
            pass
