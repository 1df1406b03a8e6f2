"""`ztna init host | laptop | prometheus`: what is written is accepted, nothing overwritten, the next steps are told."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ztna import config as configuration
from ztna.cli import init
from ztna.cli.check_config import check_config
from ztna.config import Config


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(init.init, [str(each) for each in arguments])


def read(file: Path) -> Config:
    return configuration.load(file, {}, {})


def test_a_host_gets_four_configurations_that_fit_together(tmp_path: Path) -> None:
    done = run("host", "--dir", tmp_path, "--relay", "r.example.net:443", "--relay-name", "edge")
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "agent.yaml", "connector.yaml", "dnsd.yaml", "relay.yaml",
    ]  # fmt: skip
    for file in tmp_path.iterdir():
        checked = CliRunner().invoke(check_config, [str(file), "--no-files"])
        assert checked.exit_code == 0 and file.stem in checked.output
    dnsd, relay = read(tmp_path / "dnsd.yaml").dnsd, read(tmp_path / "relay.yaml").relay
    connector, agent = read(tmp_path / "connector.yaml").connector, read(tmp_path / "agent.yaml").agent
    assert dnsd and relay and connector and agent
    assert agent.pool == dnsd.pool.cidr and agent.mode == "listen"
    assert (
        relay.listen.port == 443 and relay.name == connector.relays[0].name == agent.relays[0].name == "edge"
    )
    assert [(each.host, each.port) for each in relay.resolvers] == [(dnsd.listen.host, dnsd.listen.port)]
    for section in (relay, connector, agent):
        assert Path(section.tls.key).parent == Path(section.tls.ca).parent == tmp_path


def test_the_next_steps_name_grants_files_and_commands(tmp_path: Path) -> None:
    said = run("host", "--dir", tmp_path, "--connector-id", "alpha").output
    for line in (
        "ztna ca issue relay --relay edge-1",
        "ztna ca issue connector --connector web-app --connector-id alpha",
        "ztna ca issue agent --agent web-app",
        f"ztna check-config {tmp_path}/dnsd.yaml",
        "ztna dns install --server 127.0.0.1:5533",
        f"ztna-sidecar connector --config {tmp_path}/connector.yaml",
    ):
        assert f"\n     {line}\n" in said


def test_a_laptop_needs_a_relay_and_nothing_else(tmp_path: Path) -> None:
    done = run("laptop", "--dir", tmp_path, "--pool", "10.100.0.0/16")
    assert done.exit_code == 0, done.output
    config = read(tmp_path / "agent.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["agent.yaml"]
    assert config.agent
    assert (config.agent.names, config.agent.mode, str(config.agent.dns_listen)) == (
        "relay", "tun", "127.0.0.1:5533",
    )  # fmt: skip


def test_a_file_that_is_there_is_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text("mine")
    done = run("host", "--dir", tmp_path, "--daemon", "relay", "--daemon", "dnsd")
    assert done.exit_code == 0
    assert f"kept  {tmp_path}/relay.yaml, which was there" in done.output
    assert f"wrote {tmp_path}/dnsd.yaml" in done.output
    assert (tmp_path / "relay.yaml").read_text() == "mine"
    assert not (tmp_path / "agent.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--relay", "nonsense"], "--relay: expected host:port, got 'nonsense'"),
        (["--relay", "r.example.net:99999"], "would refuse its configuration"),
        (["--relay-name", "{"], "would refuse its configuration"),
        (["--pool", "ten"], "--pool"),
    ],
)
def test_what_a_daemon_would_refuse_is_not_written(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("host", "--dir", tmp_path, *arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["host", "laptop", "prometheus"])
def test_a_directory_that_cannot_be_is_named_and_root_would_not_help(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("")
    assert run(what, "--dir", tmp_path / "file").exit_code == 2, "a file is no directory: wrong usage"
    done = run(what, "--dir", tmp_path / "file" / "x")
    assert done.exit_code == 1
    said = str(done.exception)
    assert "cannot be written: Not a directory" in said and "name another --dir" in said
    assert "as root" not in said


@pytest.mark.parametrize(
    ("what", "user", "advice"),
    [
        ("host", 1000, "run it as root, or name another --dir"),
        ("host", 0, "Permission denied; name another --dir"),
        ("prometheus", 1000, "Permission denied; name another --dir"),
    ],
)
def test_who_lacks_rights_is_sent_to_root_only_where_root_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, user: int, advice: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    _refusing(monkeypatch, errno.EACCES)
    done = run(what, "--dir", tmp_path)
    assert done.exit_code == 1 and advice in str(done.exception)


def test_units_that_cannot_be_written_are_blamed_on_their_own_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "HIDDEN_FROM_UNITS", ())
    (tmp_path / "file").write_text("")
    done = run("laptop", "--dir", tmp_path / "etc", "--units", tmp_path / "file" / "x")
    assert done.exit_code == 1
    assert "name another --units" in str(done.exception) and "--dir" not in str(done.exception)


def test_a_full_disk_leaves_no_half_a_file_that_would_be_kept(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *_args, **_options: _Full(self))
        done = run("prometheus", "--dir", tmp_path)
    assert done.exit_code == 1 and "No space left" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
    assert run("prometheus", "--dir", tmp_path).output.count("wrote") == 3


def test_prometheus_gets_its_files_and_the_next_steps(tmp_path: Path) -> None:
    done = run("prometheus", "--dir", tmp_path / "monitoring")
    assert done.exit_code == 0, done.output
    assert f"promtool check config {tmp_path}/monitoring/prometheus.yml" in done.output
    assert run("prometheus", "--dir", tmp_path / "monitoring").output.count("kept") == 3


def _refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)


class _Full(io.StringIO):
    """A new file on a full disk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.touch()

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_units_start_this_installation_with_what_the_configuration_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "HIDDEN_FROM_UNITS", ())
    monkeypatch.setattr(init, "console_script", lambda name: f"/opt/ztna/bin/{name}")
    units = tmp_path / "units"
    pool = ("--pool", "10.100.0.0/16")
    done = run("host", "--dir", tmp_path / "etc", "--units", units, *pool, "--relay", "r.example.net:443")
    assert done.exit_code == 0, done.output
    connector = (units / "ztna-connector.service").read_text()
    assert (
        f"ExecStart=/opt/ztna/bin/ztna-sidecar connector --config {tmp_path}/etc/connector.yaml\n"
        in connector
    )
    assert f"LoadCredential=key:{tmp_path}/etc/connector.key\n" in connector
    assert "/etc/ztna" not in connector
    assert "CAP_NET_ADMIN" in (units / "ztna-agent.service.d/agent-anyip.conf").read_text()
    assert "CAP_NET_BIND_SERVICE" in (units / "ztna-relay.service.d/low-ports.conf").read_text()
    assert "systemctl enable --now ztna-dnsd ztna-relay ztna-connector ztna-agent" in done.output


def test_a_package_has_its_units_and_drop_ins_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ztna-agent.service").write_text("")
    monkeypatch.setattr(init, "PACKAGED_UNITS", tmp_path)
    said = run("laptop", "--dir", tmp_path / "etc", "--pool", "10.100.0.0/16").output
    assert (
        "install -Dm644 -t /etc/systemd/system/ztna-agent.service.d /usr/lib/ztna-mesh/drop-ins/agent-tun.conf"
        in said
    )
    assert "systemctl enable --now ztna-agent" in said


def test_programs_that_units_cannot_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "console_script", lambda name: f"/root/.local/bin/{name}")
    done = run("laptop", "--dir", tmp_path, "--units", tmp_path / "units")
    assert done.exit_code == 2
    assert "/root/.local/bin/ztna-sidecar is hidden from units" in done.output
    assert list(tmp_path.iterdir()) == []
