"""The connector's registrations, on the embedded Consul and on real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

from sidecar.connector.health import Verdict
from sidecar.connector.leasebook import LeaseBook
from sidecar.connector.registrar import Desired, Registrant
from sidecar.connector.registration import CALLS_AT_ONCE, Registrar
from sidecar.connector.routes import RouteTable
from tests.support.consul import ConsulUnderTest
from ztna.catalog import CheckDefinition, Instance, Registration, TaggedAddress
from ztna.config import ConsulConfig, Endpoint, RouteConfig
from ztna.consul.client import ConsulClient
from ztna.jsontypes import to_json
from ztna.leases import Lease, service_key
from ztna.names import ConnectorId, ServiceName
from ztna.wire.control import Address

WAIT_SECONDS = 20.0
ANTI_ENTROPY_SECONDS = 60.0
LINK = Address("127.0.0.1", 4435)
LEASE = Lease(IPv4Address("10.100.0.2"), 7)

SERVICES_OF_FLIPS = 50
FLIPS: tuple[Verdict, ...] = ("passing", "critical", "warning", "passing", "critical")

Found = TypeVar("Found")


class Connector:
    """A registrar with verdicts and leases that the test sets."""

    def __init__(self, client: ConsulClient, connector_id: str, *services: str) -> None:
        routes = [
            RouteConfig(service=ServiceName(each), backend=Endpoint("127.0.0.1", 1), port=80, weight=2)
            for each in services
        ]
        self.table = RouteTable(routes)
        self.verdicts: dict[str, Verdict] = dict.fromkeys(services, "critical")
        self.leases: dict[str, Lease] = {}
        self.since = asyncio.get_running_loop().time()
        self.asked = 0
        """How often it was asked how one of its services stands."""
        self.registrar = Registrar(
            client,
            Registrant(ConnectorId(connector_id), LINK, 5.0, 60.0),
            lambda: self.table.services.keys(),
            self.desired,
        )

    def desired(self, service: ServiceName) -> Desired:
        self.asked += 1
        routes = self.table.services[service]
        return Desired(
            routes,
            routes.weight,
            self.verdicts[service],
            self.since,
            f"it is {self.verdicts[service]}",
            self.leases.get(service),
        )

    def turn(self, service: str, verdict: Verdict) -> None:
        self.verdicts[service] = verdict
        self.registrar.verdict_changed(ServiceName(service))


@asynccontextmanager
async def running(connector: Connector) -> AsyncIterator[Connector]:
    task = asyncio.create_task(connector.registrar.run())
    try:
        yield connector
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(
    read: Callable[[], Awaitable[Found]], holds: Callable[[Found], bool], within_s: float = WAIT_SECONDS
) -> Found:
    """Read until it holds: Consul's catalog follows its agent by itself, in its own time."""
    found = await read()
    try:
        async with asyncio.timeout(within_s):
            while not holds(found):
                await asyncio.sleep(0.02)
                found = await read()
    except TimeoutError:
        raise AssertionError(f"still {found!r} after {within_s} s") from None
    return found


def status_of(found: tuple[Instance, ...]) -> list[str]:
    return [each.status for each in found]


async def test_registers_reports_and_leaves(consul: ConsulUnderTest, unique: str) -> None:
    web = f"web-{unique}"
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c1", web)

        async def instances() -> tuple[Instance, ...]:
            return await client.service_instances(web)

        async with running(connector):
            async with asyncio.timeout(WAIT_SECONDS):
                await connector.registrar.complete.wait()
            (instance,) = await until(instances, lambda found: status_of(found) == ["critical"])
            assert instance.instance_id == f"{web}@c1"
            assert (instance.address, instance.port, instance.tags) == ("127.0.0.1", 4435, ("ztna",))
            assert instance.meta == {"ztna-connector": "c1", "ztna-ports": "tcp:80"}
            assert instance.weight == 0 and instance.weight_passing == 2
            connector.turn(web, "passing")
            await until(instances, lambda found: status_of(found) == ["passing"], within_s=2.0)
            connector.turn(web, "critical")
            await until(instances, lambda found: status_of(found) == ["critical"], within_s=2.0)
            connector.leases[web] = LEASE
            connector.registrar.lease_changed()
            await until(
                instances,
                lambda found: found[0].tagged_addresses.get("virtual") == TaggedAddress("10.100.0.2", 80),
            )
            assert status_of(await instances()) == ["critical"]
        await connector.registrar.leave()
        await until(instances, lambda found: found == ())


async def test_registers_again_what_is_lost_and_removes_what_it_left(
    consul: ConsulUnderTest, unique: str
) -> None:
    web, old, other = f"web-{unique}", f"old-{unique}", f"other-{unique}"
    async with ConsulClient(consul.config()) as client:
        for service, connector_id in ((old, "c2"), (other, "c3")):
            await client.register_service(
                Registration(
                    service=service,
                    instance_id=f"{service}@{connector_id}",
                    address="127.0.0.1",
                    port=1,
                    meta={"ztna-connector": connector_id},
                )
            )
        connector = Connector(client, "c2", web)
        connector.verdicts[web] = "passing"

        async def known() -> set[str]:
            return {each for each in await client.agent_services() if unique in each}

        async with running(connector):
            await until(known, lambda found: found == {f"{web}@c2", f"{other}@c3"})
            # As after a reaping, or in a Consul that was wiped: the next report finds the check unknown.
            await client.deregister_service(f"{web}@c2")
            await until(known, lambda found: f"{web}@c2" in found)

            async def status() -> list[str]:
                return status_of(await client.service_instances(web))

            await until(status, lambda found: found == ["passing"])
        await connector.registrar.leave()
        assert await known() == {f"{other}@c3"}
        await client.deregister_service(f"{other}@c3")


async def test_a_check_that_is_lost_alone_is_registered_again(consul: ConsulUnderTest, unique: str) -> None:
    web = f"web-{unique}"
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c8", web)
        connector.verdicts[web] = "passing"

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["passing"])
            # As Consul's agent has it when somebody took the check away and left the service.
            instance = Registration(
                service=web,
                instance_id=f"{web}@c8",
                address=LINK.ip,
                port=LINK.port,
                meta={"ztna-connector": "c8", "ztna-ports": "tcp:80"},
                weight_passing=2,
                weight_warning=2,
            )
            await client.register_service(instance)

            async def checks() -> set[str]:
                return {each for each in await client.agent_checks() if unique in each}

            await until(checks, lambda found: found == set())
            await until(checks, lambda found: found == {f"ztna:{web}@c8"})
            await until(status, lambda found: found == ["passing"])
        await connector.registrar.leave()


async def test_what_consul_is_put_into_maintenance_for(consul: ConsulUnderTest, unique: str) -> None:
    web = f"web-{unique}"
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c9", web)
        connector.verdicts[web] = "passing"

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["passing"])
        own = f"{web}@c9"
        assert await client.maintain_service(own, "stopping, {it says}")
        await until(status, lambda found: found == ["critical"])
        assert (await client.agent_checks())[f"_service_maintenance:{own}"] == "critical"
        assert await client.maintain_service(own, "twice")
        assert not await client.update_check(f"_service_maintenance:{own}", "passing")
        assert await client.maintain_service(own, None)
        await until(status, lambda found: found == ["passing"])
        assert await client.maintain_service(own, "and again")
        await connector.registrar.leave()
        assert not await client.maintain_service(own, "too late")
        assert not [each for each in await client.agent_checks() if unique in each]


async def test_maintenance_by_an_operator_outlives_other_changes(
    consul: ConsulUnderTest, unique: str
) -> None:
    web = f"web-{unique}"
    own = f"{web}@c11"
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c11", web)
        connector.verdicts[web] = "passing"

        async def instances() -> tuple[Instance, ...]:
            return await client.service_instances(web)

        async with running(connector):
            await until(instances, lambda found: status_of(found) == ["passing"])
            assert await client.maintain_service(own, "kernel update")
            await until(instances, lambda found: status_of(found) == ["critical"])
            connector.leases[web] = LEASE
            connector.registrar.lease_changed()
            await until(instances, lambda found: "virtual" in found[0].tagged_addresses)
            assert (await client.agent_checks())[f"_service_maintenance:{own}"] == "critical"
            assert status_of(await instances()) == ["critical"]
            await client.maintain_service(own, None)
            await until(instances, lambda found: status_of(found) == ["passing"])
        await connector.registrar.leave()


class Watched(ConsulClient):
    """A client that notes how an instance stands whenever it is about to be taken away."""

    instance_id: str
    stood: list[tuple[str, str]]

    async def deregister_service(self, service_id: str) -> bool:
        if service_id == self.instance_id:
            checks = await self.agent_checks()
            name = service_id.partition("@")[0]

            async def status() -> list[str]:
                return status_of(await self.service_instances(name))

            (catalog,) = await until(status, lambda found: found == ["critical"])
            self.stood.append((checks.get(f"_service_maintenance:{service_id}", "none"), catalog))
        return await super().deregister_service(service_id)


async def test_who_leaves_is_in_maintenance_first(consul: ConsulUnderTest, unique: str) -> None:
    """What passes by its own check is found critical by everybody before it is taken away."""
    web = f"web-{unique}"
    async with Watched(consul.config()) as client:
        client.instance_id, client.stood = f"{web}@c12", []
        connector = Connector(client, "c12", web)
        connector.verdicts[web] = "passing"

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["passing"])
        await connector.registrar.leave()
        assert client.stood == [("critical", "critical")]
        await until(status, lambda found: found == [])


async def test_what_somebody_changes_is_put_right_within_a_minute(
    consul: ConsulUnderTest, unique: str
) -> None:
    """Its check is left alone, so no report fails: it compares what Consul has with what it should have."""
    web = f"web-{unique}"
    own = f"{web}@c13"
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c13", web)
        connector.verdicts[web] = "passing"

        async def places() -> list[tuple[int, dict[str, str]]]:
            return [(each.port, dict(each.meta)) for each in await client.service_instances(web)]

        async with running(connector):
            ours = await until(places, lambda found: [port for port, _ in found] == [LINK.port])
            theirs = Registration(
                service=web,
                instance_id=own,
                address="127.0.0.1",
                port=1,
                meta={"by": "hand"},
                checks=(CheckDefinition(check_id=f"ztna:{own}", name="backend", ttl_s=60.0),),
            )
            await client.register_service(theirs)
            assert (await client.agent_services())[own].port == 1
            await until(places, lambda found: found == ours, ANTI_ENTROPY_SECONDS)
        await connector.registrar.leave()


async def test_survives_a_consul_that_stops(own_consul: ConsulUnderTest, unique: str) -> None:
    web = f"web-{unique}"
    async with ConsulClient(own_consul.config()) as client:
        connector = Connector(client, "c4", web)

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["critical"])
            await asyncio.to_thread(own_consul.stop)
            connector.turn(web, "passing")
            async with asyncio.timeout(WAIT_SECONDS):
                while connector.registrar.problem is None:
                    await asyncio.sleep(0.02)
            assert connector.registrar.trouble == connector.registrar.problem is not None
            await asyncio.to_thread(own_consul.start)

            async def back() -> list[str]:
                return [] if connector.registrar.problem else await status()

            await until(back, lambda found: found == ["passing"], within_s=2 * WAIT_SECONDS)


async def test_one_service_that_consul_refuses_keeps_no_other_out(
    acl_consul: ConsulUnderTest, unique: str, tmp_path: Path
) -> None:
    web, db = f"web-{unique}", f"db-{unique}"
    policy = tmp_path / "web-only.hcl"
    policy.write_text(
        f'service "{web}" {{ policy = "write" }}\n'
        'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }\n'
    )
    token = acl_consul.token_for(policy)
    async with ConsulClient(acl_consul.config(token)) as client:
        connector = Connector(client, "c5", db, web)
        connector.verdicts[web] = "passing"

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["passing"])
            refusal = connector.registrar.refusal(ServiceName(db))
            assert refusal is not None and db in refusal
            assert connector.registrar.is_registered(ServiceName(web))
            assert not connector.registrar.is_registered(ServiceName(db))
            assert f"does not let us register {db}: {refusal}; give the" in str(connector.registrar.trouble)
            assert not connector.registrar.complete.is_set()
        await connector.registrar.leave()
        assert await client.agent_services() == {}


async def test_an_instance_that_may_not_be_removed_keeps_no_other_out_or_in(
    acl_consul: ConsulUnderTest, unique: str, tmp_path: Path
) -> None:
    web, old = f"web-{unique}", f"a-{unique}"
    policy = tmp_path / "web-only.hcl"
    policy.write_text(
        f'service "{web}" {{ policy = "write" }}\n'
        'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }\n'
    )
    async with ConsulClient(acl_consul.config()) as manager:
        predecessor = Connector(manager, "c6", old)
        async with running(predecessor), asyncio.timeout(WAIT_SECONDS):
            await predecessor.registrar.complete.wait()
        async with ConsulClient(acl_consul.config(acl_consul.token_for(policy))) as client:
            connector = Connector(client, "c6", web)
            async with running(connector):
                async with asyncio.timeout(WAIT_SECONDS):
                    await connector.registrar.complete.wait()
                assert set(await client.agent_services()) == {f"{web}@c6", f"{old}@c6"}
                assert connector.registrar.problem is None
                assert f"does not let us remove {old}@c6: " in str(connector.registrar.trouble)
            await connector.registrar.leave()
            assert set(await client.agent_services()) == {f"{old}@c6"}
        await predecessor.registrar.leave()
        assert await manager.agent_services() == {}


async def test_services_that_a_later_token_may_not_report_keep_no_other_out_and_are_told(
    acl_consul: ConsulUnderTest, unique: str, tmp_path: Path
) -> None:
    web, others = f"web-{unique}", [f"a{number}-{unique}" for number in range(CALLS_AT_ONCE + 1)]
    narrow, wide, file = tmp_path / "web.hcl", tmp_path / "all.hcl", tmp_path / "token"
    reads = 'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }\n'
    narrow.write_text(f'service "{web}" {{ policy = "write" }}\n{reads}')
    wide.write_text(f'service_prefix "" {{ policy = "write" }}\n{reads}')
    file.write_text(acl_consul.token_for(wide))
    config = ConsulConfig(address=acl_consul.address, token_file=str(file))
    async with ConsulClient(config) as client:
        connector = Connector(client, "c13", *others, web)
        connector.verdicts = dict.fromkeys(connector.verdicts, "passing")
        registrar = connector.registrar

        async def status() -> list[str]:
            return status_of(await client.service_instances(web))

        async def trouble() -> str | None:
            return registrar.trouble

        async with running(connector):
            async with asyncio.timeout(WAIT_SECONDS):
                await registrar.complete.wait()
            await until(status, lambda found: found == ["passing"])
            assert registrar.trouble is None
            file.write_text(acl_consul.token_for(narrow))
            for each in others:
                connector.turn(each, "critical")
            told = await until(trouble, lambda found: "does not let us" in str(found))
            assert 'policy = "write"' in str(told) and "more); give the connector's token that rule" in str(
                told
            )
            for verdict in ("critical", "passing", "warning"):
                connector.turn(web, verdict)
                await until(status, lambda found, verdict=verdict: found == [verdict])
            assert registrar.problem is None and registrar.is_registered(ServiceName(web))
            file.write_text(acl_consul.token_for(wide))
            await until(trouble, lambda found: found is None)
            assert registrar.status() == {
                "problem": None,
                "refused": {"register": {}, "report": {}, "remove": {}},
            }
        await registrar.leave()


async def test_leaving_a_consul_that_is_away_does_not_hang(own_consul: ConsulUnderTest, unique: str) -> None:
    async with ConsulClient(own_consul.config()) as client:
        connector = Connector(client, "c6", f"web-{unique}")
        await asyncio.to_thread(own_consul.stop)
        async with asyncio.timeout(WAIT_SECONDS):
            await connector.registrar.leave()


async def test_the_lease_book_learns_and_reads_again(consul: ConsulUnderTest, unique: str) -> None:
    web, foreign = ServiceName(f"web-{unique}"), ServiceName(f"foreign-{unique}")
    changes: list[tuple[ServiceName, Lease | None]] = []
    newer = Lease(IPv4Address("10.100.0.3"), 8)
    async with ConsulClient(consul.config()) as client:
        book = LeaseBook(client, {web}, lambda service, lease: changes.append((service, lease)))

        async def said(lease: Lease | None) -> bool:
            return book.lease(web) == lease

        # Without the watch: what is read again is read from Consul itself.
        assert await book.read_again(web, 7) is None
        await client.kv_put(service_key(web), to_json(LEASE))
        first, second = await asyncio.gather(book.read_again(web, 7), book.read_again(web, 7))
        assert first == second == LEASE
        task = asyncio.create_task(book.run())
        try:
            await client.kv_put(service_key(foreign), to_json(Lease(IPv4Address("10.100.0.4"), 8)))
            await client.kv_put(service_key(web), b"not a lease")
            await client.kv_put(service_key(web), to_json(newer))
            async with asyncio.timeout(WAIT_SECONDS):
                while book.lease(web) != newer:
                    await asyncio.sleep(0.02)
            assert changes == [(web, LEASE), (web, newer)]
            assert book.lease(foreign) is None
            # One that vanishes changes nothing, until another has its address; an older one was restored.
            await client.kv_delete(service_key(web))
            assert await book.read_again(web, 9) == newer
            await client.kv_put(service_key(web), to_json(LEASE))
            await until(lambda: said(LEASE), bool)
            await client.kv_delete(service_key(web))
            await client.kv_put(service_key(foreign), to_json(LEASE))
            await until(lambda: said(None), bool)
            assert changes[2:] == [(web, LEASE), (web, None)]
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.kv_delete(service_key(foreign))


async def test_a_verdict_is_in_the_catalog_within_a_second(consul: ConsulUnderTest, unique: str) -> None:
    """While other services are being registered: changed verdicts go first."""
    services = [f"s{number}-{unique}" for number in range(SERVICES_OF_FLIPS)]
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c10", *services)
        loop = asyncio.get_running_loop()
        took_s = []

        async def status() -> list[str]:
            return status_of(await client.service_instances(services[0]))

        async with running(connector):
            await until(status, lambda found: found == ["critical"])
            for verdict in FLIPS:
                for service in services[1:]:
                    connector.leases[service] = Lease(
                        LEASE.ip, connector.leases.get(service, LEASE).epoch + 1
                    )
                connector.registrar.lease_changed()
                began = loop.time()
                connector.turn(services[0], verdict)
                await until(status, lambda found, verdict=verdict: found == [verdict])
                took_s.append(loop.time() - began)
        await connector.registrar.leave()
    assert sorted(took_s)[len(took_s) // 2] < 1.0, took_s


async def test_reporting_a_service_asks_how_no_other_stands(consul: ConsulUnderTest, unique: str) -> None:
    services = [f"s{number}-{unique}" for number in range(SERVICES_OF_FLIPS)]
    async with ConsulClient(consul.config()) as client:
        connector = Connector(client, "c9", *services)

        async def passing() -> int:
            return sum(status == "passing" for status in (await client.agent_checks()).values())

        async with running(connector):
            async with asyncio.timeout(WAIT_SECONDS):
                await connector.registrar.complete.wait()
            for service in services:
                connector.turn(service, "passing")
            await until(passing, lambda found: found == len(services))
        # Some comparisons, and some reports of each: far from one of all for each.
        assert connector.asked < SERVICES_OF_FLIPS * SERVICES_OF_FLIPS / 2
        await connector.registrar.leave()


async def test_what_a_dead_token_kept_from_the_catalog_is_brought_by_the_next(
    acl_consul: ConsulUnderTest, unique: str, tmp_path: Path
) -> None:
    """Consul's agent takes our report, syncs it by the token that registered, is refused, and forgets about it."""
    web = f"web-{unique}"
    policy, file = tmp_path / "web.hcl", tmp_path / "token"
    policy.write_text(f'service "{web}" {{ policy = "write" }}\n')
    first = acl_consul.token_for(policy)
    file.write_text(first)
    config = ConsulConfig(address=acl_consul.address, token_file=str(file))
    async with ConsulClient(config) as client, ConsulClient(acl_consul.config()) as operator:
        connector = Connector(client, "c12", web)
        connector.verdicts[web] = "passing"

        async def status() -> list[str]:
            return status_of(await operator.service_instances(web))

        async with running(connector):
            await until(status, lambda found: found == ["passing"])
            second = acl_consul.token_for(policy)
            acl_consul.revoke(first)
            # By the new token, before anything was registered by it.
            file.write_text(second)
            connector.turn(web, "critical")
            await until(status, lambda found: found == ["critical"])
        await connector.registrar.leave()
        await until(status, lambda found: found == [])
