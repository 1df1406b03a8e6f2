"""ztna-dnsd with several workers: nothing is answered otherwise, and who ends is started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from dnslib import DNSRecord

import dnsd.workers
from dnsd.answer import Answers
from dnsd.cookies import COOKIE_BYTES
from dnsd.server import Server
from dnsd.services import describe
from dnsd.snapshot import encode, entries
from dnsd.zone import Settings
from tests.support.consul import ConsulUnderTest, free_ports
from tests.support.dns import POOL, instance, lease, query, told, with_opt, zone
from tests.support.dns_serving import LOOPBACK, serving
from tests.unit.test_dnsd_daemon import consul as consul
from tests.unit.test_dnsd_daemon import has, register, running, settings, until
from ztna import config as configuration
from ztna.config import ConsulConfig, Endpoint, NotifyConfig, PoolConfig, TransferConfig, TsigKeyConfig
from ztna.dns import Code, SoaData, Type, decode
from ztna.names import Zone
from ztna.runtime import Daemon
from ztna.telemetry import REGISTRY

WORKERS = 2
NOBODY = ConsulConfig(address="http://127.0.0.1:1", timeout_s=0.5)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def pids(daemon: Daemon) -> list[int]:
    """The processes that answer."""
    status: Any = daemon.status_sources["dns"]()
    return [worker["pid"] for worker in status["workers"] if worker.get("listening")]


def names_file(folder: Path, age_s: float = 0.0) -> str:
    """What dnsd knows of `web` from before."""
    now = time.time()
    file = folder / "names"
    services = {"web": describe("web", (instance("web"),))}
    lines = entries(services, {"web": lease("127.100.0.2")})
    file.write_bytes(encode(Zone("ztna.local"), 1, now - age_s, lines))
    file.chmod(0o600)
    return str(file)


async def ask(port: int, data: bytes, *, seconds: float = 30.0) -> bytes:
    """Ask from a port of its own: the kernel chooses the worker by it."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        sock.send(data)
        async with asyncio.timeout(seconds):
            return await loop.sock_recv(sock, 4096)


async def ask_tcp(port: int, *queries: bytes) -> list[bytes]:
    """Ask all on one connection; return as many answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(struct.pack("!H", len(data)) + data for data in queries))
    answers = []
    async with asyncio.timeout(30):
        for _ in queries:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            answers.append(await reader.readexactly(length))
    writer.close()
    return answers


async def test_every_worker_answers_what_the_catalog_says_and_all_are_summed(consul: ConsulUnderTest) -> None:
    async with running(consul.config(), workers=WORKERS) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        assert len(set(pids(here.daemon))) == WORKERS and os.getpid() not in pids(here.daemon)
        await register(consul, "web")
        await until("served", lambda: has(here, "web"))
        before = metric("ztna_dns_queries_total", transport="udp")

        async def answered() -> bool:
            answers = [DNSRecord.parse(await ask(here.port, query("web.ztna.local"))) for _ in range(20)]
            return all(told(each)[:1] > ["A 127.100."] for each in answers)

        # The worker that did not answer first may hear of the name a moment later.
        await until("by all", answered)

        def everybody() -> bool:
            status: Any = here.daemon.status_sources["dns"]()
            return all(worker.get("udp_received") for worker in status["workers"])

        await until("both were asked and said so", everybody)
        await until("counted", lambda: metric("ztna_dns_queries_total", transport="udp") >= before + 20)
        assert metric("ztna_dns_workers") == WORKERS
        assert metric("ztna_dns_worker_resident_bytes") > 0
    assert metric("ztna_dns_worker_resident_bytes") == 0


async def test_a_worker_that_is_killed_or_stands_still_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with running(NOBODY, workers=WORKERS, snapshot=names_file(tmp_path)) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        monkeypatch.setattr(dnsd.workers, "SILENT_SECONDS", 8.0)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            before, ends = pids(here.daemon), metric("ztna_dns_worker_ends_total")
            os.kill(before[0], number)
            await until("it is missed", lambda before=before: pids(here.daemon) != before)
            if number == signal.SIGKILL:
                assert here.daemon.readiness.ready
                told = here.daemon.readiness.report()["warnings"]["workers"]
                assert told.startswith("1 of 2 answer; worker 1: it ended; exit status -9")
            # The others have all of the port meanwhile.
            for _ in range(10):
                assert (await ask(here.port, query("web.ztna.local")))[3] & 15 == Code.NOERROR
            await until("two again", lambda: len(pids(here.daemon)) == WORKERS)
            assert before[1] in pids(here.daemon) and before[0] not in pids(here.daemon)
            assert metric("ztna_dns_worker_ends_total") == ends + 1
            assert "workers" not in here.daemon.readiness.report()["warnings"]
        for _ in range(20):
            assert (await ask(here.port, query("web.ztna.local")))[3] & 15 == Code.NOERROR


async def test_without_any_worker_dnsd_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(NOBODY, workers=WORKERS, snapshot=names_file(tmp_path)) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        monkeypatch.setattr(dnsd.workers, "RESTART_SECONDS_MIN", 600.0)
        monkeypatch.setattr(dnsd.workers, "SETTLED_SECONDS", 0.0)
        for pid in pids(here.daemon):
            os.kill(pid, signal.SIGKILL)
        await until("nobody", lambda: not pids(here.daemon))
        await until("told", lambda: "0 of 2" in here.daemon.readiness.report()["awaiting"].get("workers", ""))


async def test_names_from_disk_are_stale_and_end_by_all_workers(tmp_path: Path) -> None:
    ends_at = time.time() + 8.0
    async with running(
        NOBODY, workers=WORKERS, snapshot=names_file(tmp_path, 3600.0 - 8.0), stale_max_s=3600.0
    ) as here:
        await until("listening", lambda: len(pids(here.daemon)) == WORKERS)
        answer: Any = await here.ask("web.ztna.local", Type.A)
        if time.time() < ends_at - 1:
            assert (answer.code, answer.edns.options, answer.answers[0].ttl_s) == (0, ((15, b"\0\3"),), 5)

        async def ended() -> bool:
            answers: list[Any] = [await here.ask("web.ztna.local", Type.A) for _ in range(16)]
            return all((each.code, each.edns.options) == (2, ((15, b"\0\x16"),)) for each in answers)

        await until("all say SERVFAIL", ended)
        assert time.time() > ends_at - 1


async def test_another_pool_is_known_to_every_worker_after_a_reload(tmp_path: Path) -> None:
    async with running(NOBODY, workers=WORKERS, snapshot=names_file(tmp_path)) as here:
        await until("listening", lambda: len(pids(here.daemon)) == WORKERS)

        async def codes() -> set[int]:
            return {
                (await ask(here.port, query("2.3.101.127.in-addr.arpa", "PTR")))[3] & 15 for _ in range(16)
            }

        assert await codes() == {Code.REFUSED}
        pool = PoolConfig(cidr=IPv4Network("127.101.0.0/16"))
        here.daemon.reread = lambda: settings(NOBODY, here.port, workers=WORKERS, pool=pool)
        for callback in here.daemon.on_reload:
            callback()

        async def all_know() -> bool:
            return await codes() == {Code.NXDOMAIN}

        await until("all know the reverse zone", all_know)
        assert (await ask(here.port, query("web.ztna.local")))[3] & 15 == Code.NOERROR


async def test_transfers_and_signed_queries(consul: ConsulUnderTest, tmp_path: Path) -> None:
    """dnsd itself goes on with a connection that asks for a transfer; what came before and after is answered."""
    key = tmp_path / "key"
    key.write_text("c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0")
    key.chmod(0o600)
    chosen = {
        "keys": (TsigKeyConfig(name="k", secret_file=str(key)),),
        "transfer": TransferConfig(allow=LOOPBACK),
        "allow": (IPv4Network("192.0.2.0/24"),),
    }
    async with running(consul.config(), workers=WORKERS, **chosen) as here:
        await register(consul, "web")
        await until("ready", lambda: here.daemon.readiness.ready)

        async def dig(*words: str) -> str:
            argv = ["dig", "@127.0.0.1", "-p", str(here.port), "+tries=1", "+time=10", *words]
            process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
            return (await process.communicate())[0].decode()

        sign = ("-y", f"hmac-sha256:k:{key.read_text()}")

        async def whole() -> bool:
            return "127.100." in await dig("ztna.local", "AXFR", *sign)

        await until("its lease is transferred, after which nothing changes", whole)
        before = metric("ztna_dns_transfers_total", kind="axfr")
        for _ in range(8):
            said = await dig("ztna.local", "AXFR", *sign)
            assert said.count("SOA") == 2 and "Couldn't verify" not in said
            assert "_fresh" in await dig("ztna.local", "AXFR")
        assert metric("ztna_dns_transfers_total", kind="axfr") == before + 16
        serial = said.split("hostmaster.ztna.local.")[1].split()[0]
        for _ in range(4):
            assert (await dig(f"ixfr={serial}", "ztna.local", *sign)).count("SOA") == 1
            assert (await dig(f"ixfr={serial}", "+notcp", "ztna.local", *sign)).count("SOA") == 1
            assert "status: NOERROR" in await dig("web.ztna.local", *sign)
            assert "status: REFUSED" in await dig("web.ztna.local")
            assert "BADKEY" in await dig("web.ztna.local", "-y", f"hmac-sha256:other:{key.read_text()}")
        soa, axfr = query("ztna.local", "SOA"), query("ztna.local", "AXFR")
        answers = await ask_tcp(here.port, soa, axfr, soa)
        assert [answer[3] & 15 for answer in answers] == [Code.REFUSED, Code.NOERROR, Code.REFUSED]


async def test_nobody_is_told_of_a_change_that_a_worker_would_deny(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secondary that is told asks for the serial at once, and whichever worker it asks must know it."""
    monkeypatch.setattr(dnsd.workers, "FOLLOW_SECONDS", 60.0)
    loop = asyncio.get_running_loop()
    heard = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as secondary:
        secondary.bind(("127.0.0.1", 0))

        def hear() -> None:
            data, source = secondary.recvfrom(4096)
            heard.append(data)
            secondary.sendto(data[:2] + bytes((data[2] | 0x80,)) + data[3:], source)

        loop.add_reader(secondary, hear)
        notify = (NotifyConfig(address=Endpoint(*secondary.getsockname())),)
        async with running(consul.config(), workers=WORKERS, transfer=TransferConfig(notify=notify)) as here:

            def serials() -> list[int]:
                """Of the zone, and of what each worker answers."""
                status: Any = here.daemon.status_sources["dns"]()
                return [status["serial"], *(worker["serial"] for worker in status["workers"])]

            await until("ready", lambda: here.daemon.readiness.ready)
            await until("told of both zones", lambda: len(set(heard_zones(heard))) == 2)
            await until("a second is over", lambda: time.time() > serials()[0] + 1)
            stopped = pids(here.daemon)[0]
            os.kill(stopped, signal.SIGSTOP)
            try:
                before, count = serials()[0], len(heard)
                await register(consul, "web")
                await until("the other knows", lambda: before < serials()[0] == serials()[2])
                assert len(heard) == count
            finally:
                os.kill(stopped, signal.SIGCONT)
            await until("told", lambda: len(heard) > count)
            for _ in range(16):
                soa = decode(await ask(here.port, query("ztna.local", "SOA"))).answers[0].data
                assert isinstance(soa, SoaData) and soa.serial > before
        loop.remove_reader(secondary)


def heard_zones(messages: list[bytes]) -> list[str]:
    return [decode(each).questions[0].name for each in messages]


async def test_cookies_of_one_worker_are_good_at_the_other_and_the_limit_is_shared(tmp_path: Path) -> None:
    per_second = 20
    chosen = {"rate_limit": float(per_second), "rate_limit_loopback": True}
    async with running(NOBODY, workers=WORKERS, snapshot=names_file(tmp_path), **chosen) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        asked = with_opt(query("web.ztna.local"), options=struct.pack("!HH", 10, 8) + b"8 bytes.")
        answer = await ask(here.port, asked)
        cookie = answer[(at := answer.index(b"8 bytes.")) : at + COOKIE_BYTES]
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(16)]
            for sock in socks:
                sock.settimeout(30)
                sock.connect(("127.0.0.1", here.port))
                for _ in range(40):
                    sock.send(query("web.ztna.local"))
            # Who shows a cookie is answered by any worker, and then all that was sent before it was looked at.
            shown = with_opt(query("web.ztna.local"), options=struct.pack("!HH", 10, 24) + cookie)
            for sock in socks:
                sock.send(shown[:2] + shown[2:])
            full = 0
            for sock in socks:
                while len(data := await asyncio.to_thread(sock.recv, 4096)) < len(answer):
                    full += not data[2] & 2
        allowed = per_second * (2 + time.monotonic() - begun)
        assert 0 < full <= allowed + 2, f"{full} answers, of at most {allowed:.0f}"


async def test_names_outside_go_to_the_upstream_by_every_worker() -> None:
    example = zone({}, {"www": lease("203.0.113.1")}, Settings(Zone("example.com"), POOL, 5, 10))
    with serving({"upstream": Server(LOOPBACK, Answers(example))}) as ports:
        upstreams = (Endpoint("127.0.0.1", ports["upstream"]),)
        async with running(NOBODY, workers=WORKERS, upstreams=upstreams) as here:
            await until("listening", lambda: len(pids(here.daemon)) == WORKERS)
            for _ in range(8):
                answer: Any = await here.ask("www.example.com", Type.A)
                assert answer.answers[0].data == IPv4Address("203.0.113.1")
                assert (await here.ask("web.ztna.local", Type.A)).code == Code.SERVFAIL  # type: ignore[attr-defined]
            (by_tcp,) = await ask_tcp(here.port, query("www.example.com"))
            assert by_tcp[3] & 15 == Code.NOERROR


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """ztna-dnsd with two workers, its port, and its log."""
    (port,) = free_ports(1)
    file, log = tmp_path / "dnsd.yaml", tmp_path / "log"
    config = settings(NOBODY, port, workers=WORKERS, snapshot=names_file(tmp_path))
    file.write_text(configuration.dump(config, secrets=True))
    with log.open("wb") as output:
        running = subprocess.Popen([sys.executable, "-m", "dnsd", "--config", str(file)], stderr=output)
    yield running, port, log
    running.kill()
    running.wait()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def are_gone(found: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() for pid in found)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_workers_end_with_dnsd_and_hear_no_signals_themselves(
    process: tuple[subprocess.Popen[bytes], int, Path], end: signal.Signals
) -> None:
    running, port, log = process
    await until("two listen", lambda: log.read_bytes().count(b'"worker_listening"') == WORKERS)
    found = children(running.pid)
    assert len(found) == WORKERS
    for pid in found:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    for _ in range(8):
        assert (await ask(port, query("web.ztna.local")))[3] & 15 == Code.NOERROR
    assert children(running.pid) == found
    os.kill(found[0], signal.SIGSTOP)
    begun = time.monotonic()
    running.send_signal(end)
    assert await asyncio.to_thread(running.wait, 20) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    await until("the workers are gone", lambda: are_gone(found))
    assert time.monotonic() - begun < 20
    assert b"Traceback" not in log.read_bytes() and b"worker_ended" not in log.read_bytes()
