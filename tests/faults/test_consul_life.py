"""What happens to a mesh when its tokens are revoked, its logins end, or its Consul comes back empty."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.consul import KINDS, MANAGEMENT_TOKEN, REAL_KINDS, note_version
from tests.support.lab import Daemon, Lab, Running, http_get, lab, tcp_route, until
from tests.support.workload_identity import Signer, trust
from ztna.config import ConsulConfig, ConsulLoginConfig, Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND = Endpoint("127.0.0.1", 18080)
SERVICE = "web-app"
ROLES = ("dnsd", "connector", "agent")
BACK_SECONDS = 20.0
"""What is wrong is noticed within a query or a third of a TTL (5 s), and mended in a retry or two of 3 s at most."""
METHOD = "nomad-workloads"


def backend(made: Lab) -> Running:
    argv = ("-m", "tests.support.backends", "--http", str(BACKEND.port), "--label", "one")
    return made.python("backend", made.host("core"), *argv)


class Mesh:
    """One daemon of each role on one host, each with its own way to reach Consul."""

    def __init__(self, made: Lab, **consul: ConsulConfig) -> None:
        self.lab = made
        self.backend = backend(made)
        self.daemons: dict[str, Daemon] = {"dnsd": made.dnsd(consul=consul.get("dnsd"))}
        made.relay()
        route = tcp_route(SERVICE, BACKEND)
        self.daemons["connector"] = made.connector("alpha", [route], consul=consul.get("connector"))
        self.daemons["agent"] = made.agent("laptop-1", [SERVICE], consul=consul.get("agent"))
        for daemon in self.daemons.values():
            daemon.wait_ready()
        self.address = made.address(SERVICE)
        until("it is served", self.is_served)

    def is_served(self) -> bool:
        return http_get(self.lab.host("core"), f"http://{self.address}:8080/")[1] == "hello from one\n"

    def warning(self, role: str, of: str = "consul_token") -> str | None:
        """What /readyz says of the token, or of something else."""
        warnings: dict[str, str] = msgspec.json.decode(self.daemons[role].get("/readyz")[1])["warnings"]
        return warnings.get(of)

    def is_followed(self, state: str) -> bool:
        """Whether the catalog has the verdict on the backend: what a stale token would keep from it."""
        return self.lab.check_states(SERVICE) == [state]

    def flips(self) -> None:
        """Have the backend die and return, and see that each is known everywhere."""
        self.backend.stop()
        until("critical in the catalog", lambda: self.is_followed("critical"), BACK_SECONDS)
        until("gone from SRV", lambda: self.srv() == [], BACK_SECONDS)
        self.backend.start()
        until("passing in the catalog", lambda: self.is_followed("passing"), BACK_SECONDS)
        until("in SRV", self.srv, BACK_SECONDS)
        until("served again", self.is_served, BACK_SECONDS)

    def srv(self) -> list[str]:
        return self.lab.dig("core", f"{SERVICE}.ztna.local", "SRV")


def tokens(made: Lab) -> dict[str, str]:
    """Return the accessors of Consul's tokens and what they are for."""
    return {each["AccessorID"]: each["Description"] for each in made.consul_get("/v1/acl/tokens")}


def delete(made: Lab, path: str) -> None:
    header = f"X-Consul-Token: {MANAGEMENT_TOKEN}"
    made.host("core").run(
        "curl",
        "-sS",
        "--fail",
        "-X",
        "DELETE",
        "-H",
        header,
        f"http://{made.host('core').address}:8500{path}",
    )


def rewrite(file: Path, text: str) -> None:
    """Replace a file as who rotates secrets does."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text + "\n")
    os.replace(fresh, file)


@pytest.fixture(params=REAL_KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab with a Consul that denies what no policy allows."""
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param, tls=True)
        until("it has gone over to the new ACLs", lambda: tokens(made))
        yield made


def test_revoked_tokens_are_said_and_new_ones_in_their_files_taken_up(made: Lab) -> None:
    before = tokens(made)
    files = {role: made.directory / f"{role}.token" for role in ROLES}
    rules = {role: made.rules(role, [SERVICE] if role == "connector" else ()) for role in ROLES}
    for role, file in files.items():
        file.write_text(made.token_for(rules[role]))
    consul = {role: msgspec.structs.replace(made.consul, token_file=str(files[role])) for role in ROLES}
    mesh = Mesh(made, **consul)
    assert {role: mesh.warning(role) for role in ROLES} == dict.fromkeys(ROLES)

    for accessor in tokens(made).keys() - before.keys():
        delete(made, f"/v1/acl/token/{accessor}")
    for role, file in files.items():
        said = until(f"{role} says it", lambda role=role: mesh.warning(role), BACK_SECONDS + 25)
        assert "ACL not found" in said and f"write a valid one to {file}" in said
    assert mesh.is_served(), "who has a session goes on"
    until("what is wrong is named", lambda: "ACL not found" in str(mesh.warning("connector", "consul")))
    assert mesh.daemons["connector"].get("/readyz")[0] == 200, "and nobody takes it out of use for that"

    for role, file in files.items():
        rewrite(file, made.token_for(rules[role]))
    for role in ROLES:
        until(f"{role} is well", lambda role=role: mesh.warning(role) is None, BACK_SECONDS)
    until("nothing is wrong", lambda: mesh.warning("connector", "consul") is None, BACK_SECONDS)
    mesh.flips()


def test_workloads_log_in_by_tls_and_again_when_revoked_and_out_at_the_end(made: Lab) -> None:
    before = tokens(made)
    signer = Signer()
    rules: dict[str, Any] = {
        role: made.rules(role, [SERVICE] if role == "connector" else ()) for role in ROLES
    }
    trust(lambda kind, body: made.consul_put(f"/v1/acl/{kind}", body), METHOD, signer, **rules)
    consul = {}
    for role in ROLES:
        file = made.directory / f"{role}.jwt"
        file.write_text(signer.jwt(role))
        login = ConsulLoginConfig(method=METHOD, jwt_file=str(file))
        consul[role] = msgspec.structs.replace(made.consul, login=login)
    stranger = ("curl", "-sS", "--cacert", str(made.consul.ca), f"{made.consul.address}/v1/status/leader")
    assert made.host("core").try_run(*stranger).returncode != 0, "nobody comes in without a certificate"
    mesh = Mesh(made, **consul)
    first = tokens(made).keys() - before.keys()
    assert len(first) == len(ROLES)

    for accessor in first:
        delete(made, f"/v1/acl/token/{accessor}")
    until("each has logged in again", lambda: len(tokens(made).keys() - before.keys()) == len(ROLES), 45)
    mesh.flips()
    assert {role: mesh.warning(role) for role in ROLES} == dict.fromkeys(ROLES)

    for daemon in reversed(list(mesh.daemons.values())):
        assert daemon.stop() == 0
        assert daemon.events("not_logged_out") == []
    assert tokens(made) == before
    until("gone from the catalog", lambda: made.consul_get(f"/v1/catalog/service/{SERVICE}") == [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_consul_that_comes_back_empty_is_filled_again(request: pytest.FixtureRequest, kind: str) -> None:
    note_version(request, kind)
    with lab("core") as made:
        consul = made.start_consul(kind, acl=False)
        mesh = Mesh(made)
        consul.kill()
        until("the connector says it", lambda: mesh.warning("connector", "consul"), BACK_SECONDS)
        data = made.directory / "consul"
        if data.is_dir():
            shutil.rmtree(data)
        else:
            data.unlink(missing_ok=True)  # the embedded one writes it at its end
        consul.start()
        until("registered again", lambda: mesh.is_followed("passing"), BACK_SECONDS + 10)
        until("leased again", lambda: made.kv("ztna/vip/service/"), BACK_SECONDS + 10)
        again = until("named again", lambda: made.dig("core", f"{SERVICE}.ztna.local"), BACK_SECONDS)
        assert again == [mesh.address], "the same name, the same address"
        until("nothing is wrong", lambda: mesh.warning("connector", "consul") is None, BACK_SECONDS)
        mesh.flips()
