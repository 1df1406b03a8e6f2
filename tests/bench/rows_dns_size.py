"""dnsd's CPU time per query with 100, 10,000 and 100,000 names: the size of the table must not show.

The names come from dnsd's own file of the last names, so that no Consul has to hold 100,000 services; they are
answered just as fresh ones are, only with a shorter TTL.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from dnsd.services import describe
from dnsd.snapshot import encode, entries
from tests.bench.harness import Contender, Measure, Row, free_port, need, running, wait_until
from tests.bench.rows_dns import answers_at, queried
from ztna import config as configuration
from ztna.catalog import Instance
from ztna.cli.processes import console_script
from ztna.config import Config, ConsulConfig, DnsdConfig, Endpoint, PoolConfig
from ztna.leases import Lease, Port
from ztna.names import Zone

SIZES = (100, 10_000, 100_000)
POOL = IPv4Network("10.0.0.0/8")
DOMAIN = Zone("ztna.local")
ONCE_SECONDS = 120


def row(directory: Path) -> Row:
    """Return the row; everything is written under `directory`."""
    folder = directory / "dns-size"
    folder.mkdir()
    return Row(
        "dnsd: CPU per query by number of names, one worker",
        "10,000 and 100,000 names within 10 % of 100 (CPU us per query)",
        [Contender(f"{size:,} names", partial(dnsd_with, folder, size)) for size in SIZES],
    )


@contextlib.contextmanager
def dnsd_with(folder: Path, size: int) -> Iterator[Measure]:
    """ztna-dnsd that knows so many names from its file, and has no Consul to ask."""
    with dnsd_from_file(folder, size) as (pid, port, queries):
        # Every name once, as an answer is put together when it is first asked for.
        once = [need("dnsperf", "dnsperf"), "-s", "127.0.0.1", "-p", str(port), "-d", str(queries), "-n", "1"]
        subprocess.run(once, capture_output=True, check=True, timeout=ONCE_SECONDS)
        yield queried(pid, port, queries)


@contextlib.contextmanager
def dnsd_from_file(folder: Path, size: int, **settings: object) -> Iterator[tuple[int, int, Path]]:
    """Yield the pid and port of a ztna-dnsd with so many names, and a file that asks for each once."""
    names = [f"service-{number:06}" for number in range(size)]
    kept = folder / f"names-{size}"
    kept.write_bytes(_names_file(names))
    queries = folder / f"queries-{size}"
    queries.write_text("".join(f"{name}.{DOMAIN} A\n" for name in names))
    port = free_port()
    section = DnsdConfig(
        listen=Endpoint("127.0.0.1", port),
        admin=Endpoint("127.0.0.1", free_port()),
        pool=PoolConfig(cidr=POOL),
        snapshot=str(kept),
        **settings,  # type: ignore[arg-type]
    )
    # Where nobody listens, now or later: a Consul started meanwhile would have other names.
    consul = ConsulConfig(address="http://127.0.0.1:1")
    file = folder / f"dnsd-{size}.yaml"
    file.write_text(configuration.dump(Config(consul=consul, dnsd=section)))
    argv = [console_script("ztna-dnsd"), "--config", str(file)]
    with running(argv, folder / f"dnsd-{size}.log") as pid:
        wait_until(f"{size} names", lambda: answers_at(port, f"{names[-1]}.{DOMAIN}"))
        yield pid, port, queries


def _names_file(names: list[str]) -> bytes:
    now = time.time()
    services, leases = {}, {}
    for number, name in enumerate(names):
        instance = Instance(
            service=name,
            instance_id=f"{name}@c",
            node="n",
            address="192.0.2.1",
            port=4435,
            tags=("ztna",),
            meta={"ztna-connector": "c", "ztna-ports": "tcp:8080"},
        )
        services[name] = describe(name, (instance,))
        leases[name] = Lease(IPv4Address(int(POOL[1]) + number), int(now * 1000), (Port("tcp", 8080),))
    return encode(DOMAIN, 1, now, entries(services, leases))
