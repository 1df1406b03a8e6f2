"""Tokens by login: JWT auth methods of the oldest and the newest real Consul that deny everything else."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.support.consul import POLICIES, ConsulUnderTest
from tests.support.workload_identity import Signer, trust
from ztna.config import ConsulConfig, ConsulLoginConfig
from ztna.consul import tokens
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError, ConsulForbidden, ConsulUnavailable

WAIT_SECONDS = 20.0


class Workload:
    """A task with a JWT in its secrets, and a Consul that takes it."""

    def __init__(self, consul: ConsulUnderTest, folder: Path, unique: str) -> None:
        self.consul = consul
        self.signer = Signer()
        self.jwt_file = folder / "nomad_consul.jwt"
        rules = (POLICIES / "connector.hcl").read_text()
        trust(consul.write_acl, f"method-{unique}", self.signer, connector=rules)
        self.jwt_file.write_text(self.signer.jwt("connector"))
        login = ConsulLoginConfig(method=f"method-{unique}", jwt_file=str(self.jwt_file))
        self.config = ConsulConfig(address=consul.address, login=login)
        self._before = set(consul.tokens().values())

    def secrets(self) -> set[str]:
        """The tokens of its logins that Consul has."""
        return set(self.consul.tokens().values()) - self._before


@pytest.fixture
def workload(acl_consul: ConsulUnderTest, tmp_path: Path, unique: str) -> Workload:
    return Workload(acl_consul, tmp_path, unique)


async def test_a_workload_logs_in_and_out(workload: Workload) -> None:
    async with ConsulClient(workload.config) as client:
        assert workload.secrets() == set(), "not before it is needed"
        assert await client.agent_services() is not None
        assert await client.kv_get("ztna/schema") is None
        assert len(workload.secrets()) == 1
        with pytest.raises(ConsulForbidden, match="lacks the rule"):
            await client.kv_put("ztna/vip/keeper", b"")
    assert workload.secrets() == set()


async def test_a_revoked_login_is_made_again(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SETTLE_SECONDS", 0.0)
    said: list[str | None] = []
    async with ConsulClient(workload.config, said.append) as client:
        await client.agent_services()
        (first,) = workload.secrets()
        workload.consul.revoke(first)
        before = client.token_generation
        await client.agent_services()
        (second,) = workload.secrets()
        assert second != first
        assert client.token_generation == before + 1
    assert said == [], "it was mended before anybody had to know"
    assert workload.secrets() == set()


async def test_a_login_that_is_refused_is_said_and_made_as_soon_as_it_can_be(workload: Workload) -> None:
    said: list[str | None] = []
    async with ConsulClient(workload.config, said.append) as client:
        for jwt, wrong in (
            (workload.signer.jwt("connector", life_s=-600), "expired"),
            (workload.signer.jwt("another"), "Permission denied"),
            (Signer().jwt("connector"), "signature"),
        ):
            workload.jwt_file.write_text(jwt)

            async def refused(wrong: str = wrong) -> bool:
                with pytest.raises(ConsulError) as error:
                    await client.agent_services()
                assert isinstance(error.value, ConsulForbidden | ConsulUnavailable)
                return wrong in str(error.value)

            end = time.monotonic() + WAIT_SECONDS
            while not await refused():
                assert time.monotonic() < end, said
                await asyncio.sleep(0.05)
            assert said[-1] is not None and wrong in said[-1] and str(workload.jwt_file) in said[-1]
        workload.jwt_file.write_text(workload.signer.jwt("connector"))
        end = time.monotonic() + WAIT_SECONDS
        while said[-1] is not None:
            assert time.monotonic() < end, said
            await asyncio.sleep(0.05)
            try:
                await client.agent_services()
            except ConsulError:
                continue
    assert workload.secrets() == set()
