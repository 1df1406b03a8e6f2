"""ztna.config: where values come from, what each mistake is told as, and the examples."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from ztna.config import DAEMON_SECTIONS, Config, ConsulConfig, Endpoint, dump, example, load
from ztna.errors import ConfigError
from ztna.sections import Server
from ztna.wire.control import Address

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TLS = "tls: {certificate: a, key: b, ca: c}"
RELAY = f"relay: {{name: r, {TLS}, %s}}"
ROUTE = "{service: web, backend: '127.0.0.1:80', port: 80, %s}"
CONNECTOR = f"connector: {{id: c, {TLS}, relays: [{{address: 'a:1', name: r}}], routes: [%s]}}"


def read(tmp_path: Path, text: str, name: str = "c.yaml") -> Config:
    file = tmp_path / name
    file.write_text(text)
    return load(file, {}, {})


@pytest.mark.parametrize("section", DAEMON_SECTIONS)
def test_the_example_files_are_those_of_the_types(section: str) -> None:
    file = EXAMPLES / f"{section}.yaml"
    assert file.read_text() == example(section), (
        f"write it again: python -c 'from ztna.config import example; print(example({section!r}), end=\"\")' > {file}"
    )


@pytest.mark.parametrize("section", DAEMON_SECTIONS)
def test_an_example_can_be_used_and_names_no_other_daemon(section: str, tmp_path: Path) -> None:
    config = read(tmp_path, example(section))
    assert [name for name in DAEMON_SECTIONS if getattr(config, name) is not None] == [section]


def test_the_relays_example_knows_no_consul() -> None:
    assert "consul" not in example("relay")


@pytest.mark.parametrize("section", DAEMON_SECTIONS)
def test_what_is_dumped_is_read_again(section: str, tmp_path: Path) -> None:
    config = read(tmp_path, example(section))
    assert read(tmp_path, dump(config)) == config


def test_secrets_are_dumped_only_on_demand() -> None:
    config = Config(consul=ConsulConfig(token="hunter2"))
    assert "hunter2" not in dump(config) + repr(config)
    assert "hunter2" in dump(config, secrets=True)


def test_json_and_nothing_are_configurations_too(tmp_path: Path) -> None:
    assert read(tmp_path, '{"domain": "Mesh.Example."}', "c.json").domain == "mesh.example"
    assert read(tmp_path, "") == Config() == load(None, {}, {})


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("dnsd: {listen: '127.0.0.1:1', admin: '127.0.0.1:1', ttl_s: 1}")
    environ = {"ZTNA_DNSD_LISTEN": "127.0.0.1:2", "ZTNA_DNSD_ADMIN": "127.0.0.1:2"}
    dnsd = load(file, environ, {"dnsd.listen": "[::1]:3"}).dnsd
    assert dnsd is not None
    assert (dnsd.listen, dnsd.admin) == (Endpoint("::1", 3), Endpoint("127.0.0.1", 2))
    assert (dnsd.ttl_s, dnsd.negative_ttl_s) == (1, 10)


def test_every_kind_of_value_can_come_from_the_environment() -> None:
    environ = {
        "ZTNA_DOMAIN": "mesh.example",
        "ZTNA_CONSUL_TOKEN_FILE": "/t",
        "ZTNA_CONSUL_CA": "",
        "ZTNA_LOG": "{level: debug}",
        "ZTNA_RELAY_NAME": "123",
        "ZTNA_RELAY_TLS_CERTIFICATE": "a",
        "ZTNA_RELAY_TLS_KEY": "b",
        "ZTNA_RELAY_TLS_CA": "c",
        "ZTNA_RELAY_DNS_INSECURE": "true",
        "ZTNA_RELAY_RESOLVERS": "127.0.0.1:53, [::1]:53",
        "ZTNA_RELAY_SRV_HOLD_S": "1e3",
        "ZTNA_RELAY_SESSIONS_TOTAL": "7",
        "HOME": "/",
        "ZTNA_SOMETHING_ELSE": "x",
    }
    config = load(None, environ, {"dnsd.pool.reserved": "[10.0.0.0/24]"}, "relay")
    relay = config.relay
    assert relay is not None
    assert (config.domain, config.consul.token_file, config.consul.ca) == ("mesh.example", "/t", None)
    assert (config.log.level, relay.name, relay.tls.key, relay.dns_insecure) == ("debug", "123", "b", True)
    assert relay.resolvers == (Server("127.0.0.1", 53), Server("::1", 53))
    assert (relay.srv_hold_s, relay.sessions_total) == (1000.0, 7)
    assert config.dnsd is not None
    assert config.dnsd.pool.reserved == (IPv4Network("10.0.0.0/24"),)


def test_another_daemons_environment_makes_no_section_of_it(tmp_path: Path) -> None:
    assert load(None, {"ZTNA_AGENT_MODE": "anyip"}, {}, "dnsd").agent is None


def test_a_lists_of_sections_is_given_as_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CONNECTOR % "")
    connector = load(file, {}, {"connector.routes": "[" + ROUTE % "protocol: udp" + "]"}).connector
    assert connector is not None
    assert [(route.service, route.protocol) for route in connector.routes] == [("web", "udp")]


def test_an_advertised_address_is_numeric(tmp_path: Path) -> None:
    good = (CONNECTOR % "").replace("routes", "link_advertise: '192.0.2.1:4435', routes")
    connector = read(tmp_path, good).connector
    assert connector is not None
    assert connector.link_advertise == Address("192.0.2.1", 4435)
    with pytest.raises(ConfigError, match=r"^connector\.link_advertise: address 'example\.net'"):
        read(tmp_path, good.replace("192.0.2.1", "example.net"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("relay: 5", "relay: expected keys and values, got 5"),
        ("relay: {}", "relay.name: missing; Its name"),
        ("relay: {name: r, tls: {certificate: a}}", "relay.tls.key: missing"),
        (RELAY % "listn: 'a:1'", "relay.listn: unknown key; did you mean listen?"),
        (RELAY % "zzz: 1", "relay.zzz: unknown key; expected one of name, tls"),
        (RELAY % "5: 1", "relay.5: unknown key"),
        ("relays: {}", "relays: unknown key; did you mean relay?"),
        (RELAY % "listen: 4433", "relay.listen: expected host:port, got 4433"),
        (RELAY % "listen: ':4433'", "relay.listen: expected host:port, got ':4433'"),
        (RELAY % "listen: 'a:65536'", "relay.listen: expected host:port, got 'a:65536'"),
        (RELAY % "listen: '::1:53'", "relay.listen: expected host:port"),
        (RELAY % "resolvers: ['a:1', b]", "relay.resolvers[1]: expected host:port, got 'b'"),
        (
            RELAY % "resolvers: ['unix:relative']",
            "relay.resolvers[0]: expected host:port, got 'unix:relative'",
        ),
        (RELAY % "listen: unix:/run/x", "relay.listen: expected host:port, got 'unix:/run/x'"),
        (RELAY % "resolvers: a", "relay.resolvers: expected array, got 'a'"),
        (RELAY % "srv_hold_s: 0", "relay.srv_hold_s: expected float > 0.0, got 0"),
        (RELAY % "retry: 1", "relay.retry: expected bool, got 1"),
        (RELAY % "sessions_total: 1.5", "relay.sessions_total: expected int, got 1.5"),
        (
            CONNECTOR % (ROUTE % "port: 0").replace("port: 80, ", ""),
            "connector.routes[0].port: expected int >= 1",
        ),
        (CONNECTOR % ROUTE.replace("web", "Web") % "", "connector.routes[0].service: service name 'Web'"),
        (
            CONNECTOR % (ROUTE % "protocol: sctp"),
            "connector.routes[0].protocol: expected one of tcp, udp, icmp",
        ),
        ("dnsd: {pool: {cidr: 10.0.0.1/8}}", "dnsd.pool.cidr: 10.0.0.1/8 has host bits set"),
        ("domain: a_b", "domain: zone 'a_b'"),
        ("domain: 5", "domain: expected text, got int"),
        ("log: {level: loud}", "log.level: expected one of debug, info, warning, error, got 'loud'"),
        ("log: {}\nlog: {}", ", line 2, column 1: log is given twice"),
        ("log: {level: info, level: debug}", "level is given twice"),
        ("a: [}", ", line 1, column 5:"),
        ("- a", ": expected keys and values, got list"),
        ("? [a]\n: b", "unhashable"),
        ("a: \x07", "control characters are not allowed"),
        ("[" * 5000, "c.yaml, line 1, column 1001: exceeded maximum nesting depth"),
        ("a: 2024-13-01", "month must be in 1..12"),
    ],
)
def test_each_mistake_names_its_path(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("where", "flags"),
    [
        ("relay.name", {"relay.name": "Edge-1"}),
        ("connector.relays[0].name", {"connector.relays": "[{address: 'a:1', name: relay.edge.ztna}]"}),
        ("agent.relays[0].name", {"agent.relays": "[{address: 'a:1', name: edge--1}]"}),
        ("relay.others[1]", {"relay.name": "edge-1", "relay.others": "[edge-2, Edge-3]"}),
        ("dnsd.relays[0].name", {"dnsd.relays": "[{address: '192.0.2.1:1', name: 'edge_1'}]"}),
    ],
)
def test_a_relays_name_is_what_its_certificate_can_carry(where: str, flags: dict[str, str]) -> None:
    tls = {f"{role}.tls": "{certificate: c, key: k, ca: a}" for role in ("relay", "connector", "agent")}
    own = {key: text for key, text in tls.items() if where.startswith(key.partition(".")[0])}
    with pytest.raises(ConfigError) as caught:
        load(None, {}, own | {"connector.id": "c"} | flags if "connector" in where else own | flags)
    assert str(caught.value).startswith(f"{where}: relay name ")
    assert "expected the <name> of relay.<name>.ztna in its certificate" in str(caught.value)


def test_a_bad_secret_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "consul: {token: [hunter2]}")
    assert str(caught.value) == "consul.token: expected str | null"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml", {}, {})
    (tmp_path / "big.yaml").write_bytes(b"#" * (4 * 1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="over 4194304 bytes"):
        load(tmp_path / "big.yaml", {}, {})


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({"ZTNA_RELAY_LISTN": "a:1"}, {}, "ZTNA_RELAY_LISTN: no such key in relay; it has name, tls"),
        ({"ZTNA_DNSD_TTL_S": "7x"}, {}, "dnsd.ttl_s: expected int, got '7x'"),
        ({"ZTNA_DNSD_POOL": "["}, {}, "dnsd.pool: expected keys and values, got '['"),
        ({}, {"relay.listn": "a:1"}, "relay.listn: unknown key; did you mean listen?"),
        ({}, {"relay.listen.host": "a"}, "relay.listen.host: unknown key"),
        ({}, {"relay.name.x": "a"}, "relay.name.x: unknown key"),
        ({}, {"dnsd.keeper": "yes"}, "dnsd.keeper: expected bool, got 'yes'"),
    ],
)
def test_mistakes_in_environment_and_flags(environ: dict[str, str], flags: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environ, flags, "dnsd")
    assert said in str(caught.value)


def test_a_flag_cannot_go_through_what_is_no_section(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("dnsd: 5")
    with pytest.raises(ConfigError, match="dnsd: expected keys and values, got 5"):
        load(file, {}, {"dnsd.ttl_s": "1"})


def test_a_resolver_may_be_a_unix_socket(tmp_path: Path) -> None:
    config = read(tmp_path, RELAY % "resolvers: ['unix:/run/ztna/dns.sock', '127.0.0.1:53']")
    assert config.relay is not None
    unix, loopback = config.relay.resolvers
    assert (unix.is_unix, loopback.is_unix) == (True, False)
    assert str(unix) == "unix:/run/ztna/dns.sock"
