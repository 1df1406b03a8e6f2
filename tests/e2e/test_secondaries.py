"""dnsd as the hidden primary of a real Knot, NSD and BIND, and relays that ask with a signature."""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, until
from ztna.config import Endpoint, NotifyConfig, TransferConfig, TsigKeyConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

KEY = "transfer.ztna"
DNS_PORT, KNOT_PORT, NSD_PORT, BIND_PORT, NOTIFY_PORT = 5533, 5301, 5302, 5303, 5534
SECONDARIES = {"knot": KNOT_PORT, "nsd": NSD_PORT, "bind": BIND_PORT}
LEASE_SECONDS = 2.0
"""From the name at dnsd to the name at all secondaries: the best of three, as a busy machine adds its own."""
HANG_SECONDS = 30.0
REVERSE_ZONE = "100.127.in-addr.arpa"
PAGE = Path(__file__).resolve().parents[2] / "docs/secondaries.md"


def need(program: str) -> str:
    """Return a server's path; without Debian's package of it skip, or fail where CI must have it."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed")
    return path


def page(language: str, folder: Path, secret: str) -> str:
    """Return the page's configuration of a server, with this lab's addresses, folder and key."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    ours = {
        "SECRET": secret,
        "/var/lib/knot": str(folder),
        "192.0.2.53@53": f"127.0.0.1@{KNOT_PORT}",
        "192.0.2.10": "127.0.0.1",
        "100.10.in-addr.arpa": REVERSE_ZONE,
    }
    for theirs, here in ours.items():
        text = text.replace(theirs, here)
    return text


def knot_conf(folder: Path, secret: str) -> str:
    log = "log:\n  - target: stderr\n    any: info\n"
    return log + page("knot", folder, secret).replace("server:\n", f"server:\n    rundir: {folder}\n")


def nsd_conf(folder: Path, secret: str) -> str:
    """NSD's own settings are of this lab; what concerns dnsd is the page's."""
    own = f"""\
server:
    ip-address: 127.0.0.1@{NSD_PORT}
    server-count: 1
    username: ""
    zonesdir: {folder}
    database: ""
    pidfile: {folder}/nsd.pid
    xfrdfile: {folder}/xfrd.state
    xfrdir: {folder}
    zonelistfile: {folder}/zone.list
    verbosity: 2
    xfrd-reload-timeout: 0
remote-control:
    control-enable: no
"""
    return own + page("nsd", folder, secret)


def bind_conf(folder: Path, secret: str) -> str:
    """BIND's own settings are of this lab; what concerns dnsd is the page's."""
    own = f"""\
options {{
    directory "{folder}";
    pid-file "{folder}/named.pid";
    session-keyfile "{folder}/session.key";
    listen-on port {BIND_PORT} {{ 127.0.0.1; }};
    listen-on-v6 {{ none; }};
    recursion no;
    dnssec-validation no;
}};
controls {{ }};
"""
    return own + page("bind", folder, secret)


class Served:
    """One dnsd, its secondaries, and the key they share."""

    def __init__(self, made: Lab, workers: int) -> None:
        self.lab = made
        self.core = made.host("core")
        self.secret = base64.b64encode(secrets.token_bytes(32)).decode()
        file = made.directory / "dns.key"
        file.write_text(self.secret)
        file.chmod(0o600)
        self.key = TsigKeyConfig(name=KEY, secret_file=str(file))
        told = [Endpoint("127.0.0.1", port) for port in SECONDARIES.values()]
        told.append(Endpoint(made.host("remote").address, NOTIFY_PORT))
        self.dnsd: Daemon = made.dnsd(
            listen=Endpoint("0.0.0.0", DNS_PORT),
            workers=workers,
            keys=(self.key,),
            transfer=TransferConfig(notify=tuple(NotifyConfig(address=address, key=KEY) for address in told)),
        ).wait_ready()
        for name, text, argv in (
            ("knot", knot_conf, [need("knotd"), "-c"]),
            ("nsd", nsd_conf, [need("nsd"), "-d", "-c"]),
            ("bind", bind_conf, [need("named"), "-g", "-c"]),
        ):
            folder = made.directory / name
            folder.mkdir()
            conf = folder / f"{name}.conf"
            conf.write_text(text(folder, self.secret))
            made.spawn(name, self.core, *argv, str(conf))
        for name, port in SECONDARIES.items():
            until(f"{name} has the zone", lambda port=port: self.ask("ztna.local", "SOA", port=port))

    def ask(self, *question: str, port: int = DNS_PORT) -> list[str]:
        return sorted(self.lab.dig("core", *question, port=port))

    def dig(self, *arguments: str, signed: bool = False, tcp: bool = False) -> str:
        """Return the whole output of dig, which is also asked to check signatures."""
        argv = ["dig", "@127.0.0.1", "-p", str(DNS_PORT), "+time=2", "+tries=1", *arguments]
        if signed:
            argv += ["-y", f"hmac-sha256:{KEY}:{self.secret}"]
        return self.core.try_run(*argv).stdout


@pytest.fixture(scope="module", params=[("newest", 1), ("embedded", 2)], ids=["alone", "two workers"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    consul, workers = request.param
    with lab("core", "remote") as made:
        made.start_consul(consul)
        yield Served(made, workers)


@pytest.mark.timeout(120)
def test_a_lease_appears_on_all_secondaries_within_two_seconds(served: Served) -> None:
    took = []
    for number in range(3):
        name = f"late-{number}"
        with served.lab.registered(name):
            address = served.lab.address(name)
            begun = time.monotonic()
            for secondary, port in SECONDARIES.items():
                until(
                    f"{secondary} knows {name}",
                    lambda port=port, name=name, address=address: (
                        served.ask(f"{name}.ztna.local", port=port) == [address]
                    ),
                    HANG_SECONDS,
                )
            took.append(time.monotonic() - begun)
            for question in (
                (f"{name}.ztna.local", "SRV"),
                (f"{name}.ztna.local", "TXT"),
                (f"_{name}._tcp.ztna.local", "SRV"),
                ("elsewhere.connector.ztna.local", "A"),
                ("-x", address),
            ):
                at_primary = served.ask(*question)
                assert at_primary
                for port in SECONDARIES.values():
                    until(
                        f"{question} at {port} is {at_primary}",
                        lambda port=port, question=question, told=at_primary: (
                            served.ask(*question, port=port) == told
                        ),
                        HANG_SECONDS,
                    )
    assert min(took) < LEASE_SECONDS, took
    for port in SECONDARIES.values():
        until(
            "the service that went has no SRV any more",
            lambda port=port: not served.ask("late-0.ztna.local", "SRV", port=port),
            HANG_SECONDS,
        )


def test_they_came_by_increments_after_the_first_whole_zone(served: Served) -> None:
    with served.lab.registered("one-more"):
        served.lab.address("one-more")
        for secondary, port in SECONDARIES.items():
            until(f"{secondary} knows it", lambda port=port: served.ask("one-more.ztna.local", port=port))
    assert served.dnsd.metric("ztna_dns_transfers_total", kind="ixfr") >= len(SECONDARIES)
    assert served.dnsd.metric("ztna_dns_notifies_total", outcome="told") >= len(SECONDARIES)
    notified = served.dnsd.status()["secondaries"]["notified"]
    for port in SECONDARIES.values():
        assert "ztna.local" in notified[f"127.0.0.1:{port}"]


def test_freshness_is_transferred(served: Served) -> None:
    for port in SECONDARIES.values():
        (text,) = served.ask("_fresh.ztna.local", "TXT", port=port)
        assert abs(time.time() - int(text.strip('"'))) < 120


def test_dig_transfers_with_the_key_and_nobody_without(served: Served) -> None:
    told = served.dig("ztna.local", "AXFR", signed=True)
    assert "_fresh.ztna.local." in told and told.count("SOA") == 2 and "Couldn't verify" not in told

    def is_up_to_date() -> bool:
        """What came since, a service that went for one, would be told."""
        told = served.dig("ztna.local", "AXFR", signed=True)
        serial = told.split("hostmaster.ztna.local.")[1].split()[0]
        return served.dig(f"ixfr={serial}", "ztna.local", signed=True).count("SOA") == 1

    until("nothing since is one SOA", is_up_to_date, HANG_SECONDS)
    assert "Transfer failed" in served.dig("ztna.local", "AXFR")
    wrong = f"hmac-sha256:{KEY}:{base64.b64encode(b'x' * 32).decode()}"
    assert "BADSIG" in served.dig("ztna.local", "SOA", "-y", wrong)
    assert "BADKEY" in served.dig("ztna.local", "SOA", "-y", f"hmac-sha256:other:{served.secret}")
    assert "status: NOERROR" in (answer := served.dig("ztna.local", "SOA", signed=True)) and "TSIG" in answer


@pytest.mark.timeout(120)
def test_a_relay_elsewhere_asks_with_the_key_and_is_told_of_changes(served: Served) -> None:
    """Its resolver is not on loopback: who holds no key is refused there, and so is a relay without one."""
    core, remote = served.core, served.lab.host("remote")
    resolvers = (Endpoint(core.address, DNS_PORT),)
    without = served.lab.relay("keyless", "remote", resolvers=resolvers, listen=Endpoint(remote.address, 4533),
                               forwarder=Endpoint(remote.address, 4534))  # fmt: skip
    assert without.process is not None and without.process.wait(20) == 2
    assert "relay.dns_key" in without.output()
    assert "REFUSED" in "".join(
        remote.try_run("dig", f"@{core.address}", "-p", str(DNS_PORT), "ztna.local").stdout
    )
    listen = Endpoint(remote.address, NOTIFY_PORT)
    relay = served.lab.relay(
        "signing", "remote", resolvers=resolvers, dns_key=served.key, notify_listen=listen
    )
    relay.wait_ready()
    assert relay.status()["srv"]["fresh_age_s"] < 120
    served.lab.python("backend", core, "-m", "http.server", "18080", "--bind", "127.0.0.1")
    until("the backend serves", lambda: http_get(core, "http://127.0.0.1:18080/")[0] == 200)
    connector = served.lab.connector(
        "alpha",
        [tcp_route("far-app", Endpoint("127.0.0.1", 18080))],
        relays=(served.lab.target("signing", "remote"),),
    )
    connector.wait_ready()

    def connectors() -> list[object]:
        found: list[object] = relay.status()["srv"]["services"]["far-app"]["connectors"]
        return found

    until("the relay knows the connector", connectors)
    until("the relay was told", lambda: relay.status()["srv"]["notified"])
    before = relay.status()["srv"]["notified"]
    # A second instance in the catalog: without being told the relay would ask when 3 of the 5 s of TTL are over.
    definition = {
        "Name": "far-app",
        "ID": "far-app@beta",
        "Tags": ["ztna"],
        "Address": core.address,
        "Port": 4435,
        "Meta": {"ztna-connector": "beta", "ztna-ports": "tcp:8080"},
    }
    served.lab.consul_put("/v1/agent/service/register", definition)
    until("dnsd answers with both", lambda: len(served.ask("far-app.ztna.local", "SRV")) == 2)
    until("the relay knows both", lambda: len(connectors()) == 2, HANG_SECONDS)
    until("the relay was told again", lambda: relay.status()["srv"]["notified"] > before)
