"""Chains that a relay takes for what they prove and no more: filled up with others' certificates, bound to names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.support.certificates import Presented, forge
from tests.support.hostile import Close, HostileClient
from tests.support.relay import SERVICE, RunningRelay, refusals, running_relay
from ztna.ca import replace_file
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.wire import control

WAIT_SECONDS = 20.0
PAYROLL = ServiceName("payroll")
EARLY = control.encode(control.Hello()) + control.encode(
    control.Register(
        ConnectorId("connector-1"), tuple(control.Offering(service) for service in (SERVICE, PAYROLL))
    )
)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    async with running_relay(tmp_path) as running:
        yield running


async def registers(mesh: RunningRelay, presented: Presented) -> frozenset[ServiceName] | Close:
    """Show a chain, register both services, and return those that count, or how the relay closed."""
    before = refusals(Reason.NO_GRANT)
    async with HostileClient(mesh.address, "ztna-v2", presented, streams={0: EARLY}) as client:
        async with asyncio.timeout(WAIT_SECONDS):
            while not client.closed.done():
                served = mesh.relay.sessions.services
                if len(served) + refusals(Reason.NO_GRANT) - before == 2:
                    return served
                await asyncio.sleep(0.01)
        return client.closed.result()


def connector_for(*services: ServiceName) -> list[str]:
    return [*(f"connector.{service}.ztna" for service in services), "id.connector-1.ztna"]


@pytest.mark.parametrize("filler", ["another's leaf", "everybody's leaf", "a rogue chain"])
async def test_what_others_are_granted_is_nothing_to_who_shows_their_certificates(
    mesh: RunningRelay, filler: str
) -> None:
    pki = mesh.pki
    own = pki.signed(dns=connector_for(PAYROLL))
    others = {
        "another's leaf": pki.signed(dns=connector_for(SERVICE)).chain[:1],
        "everybody's leaf": pki.signed(dns=["connector.*.ztna", "id.connector-1.ztna"]).chain[:1],
        "a rogue chain": pki.signed(pki.rogue, dns=connector_for(SERVICE)).chain,
    }[filler]
    leaf, *rest = own.chain
    assert await registers(mesh, Presented((leaf, *others, *rest), own.key)) == {PAYROLL}


async def test_a_ca_that_is_bound_to_names_grants_no_others(mesh: RunningRelay) -> None:
    """A root of another department, beside ours, that may only sign for one connector (RFC 5280 4.2.1.10)."""
    bounds = x509.NameConstraints(
        [x509.DNSName(f"connector.{PAYROLL}.ztna"), x509.DNSName("id.connector-1.ztna")], None
    )
    root = forge(None, ca=True, cn="department", eku=(), constraints=bounds)
    await _trust_also(mesh, root[0])

    def shown(*services: ServiceName) -> Presented:
        leaf, key = forge(root, dns=connector_for(*services))
        return Presented((leaf,), key)

    code, _, phrase = await registers(mesh, shown(SERVICE, PAYROLL))  # type: ignore[misc]
    assert (code, phrase.partition(":")[0]) == (0x130, Reason.UNTRUSTED)
    assert not mesh.relay.sessions.peers
    assert await registers(mesh, shown(PAYROLL)) == {PAYROLL}


async def _trust_also(mesh: RunningRelay, root: x509.Certificate) -> None:
    pem = root.public_bytes(serialization.Encoding.PEM)
    replace_file(mesh.pki.ca_file, mesh.pki.authority.ca_pem + pem)
    async with asyncio.timeout(WAIT_SECONDS):
        while mesh.relay.server.credentials.material.ca.count(b"BEGIN") < 2:
            await asyncio.sleep(0.02)
