"""What dnsd shows of names and leases is bounded, and says how many there are."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from dnsd import seen
from dnsd.services import describe
from dnsd.zone import Settings, ZoneData
from ztna.catalog import Instance
from ztna.leases import Holding, Lease, Port, Stored, Table
from ztna.names import Zone
from ztna.published import META_CONNECTOR, META_PORTS

SETTINGS = Settings(Zone("ztna.local"), IPv4Network("10.100.0.0/16"), 30, 10)


def instance(service: str, number: int = 1, **meta: str) -> Instance:
    meta = {META_PORTS: "tcp:8080"} | {name.replace("_", "-"): value for name, value in meta.items()}
    return Instance(
        service=service,
        instance_id=f"{service}-{number}",
        node="n",
        address="10.0.0.1",
        port=4435,
        meta=meta,
    )


def zone(*names: str, instances: int = 1) -> ZoneData:
    services = {
        name: describe(
            name, tuple(instance(name, at, **{META_CONNECTOR: "alpha"}) for at in range(instances))
        )
        for name in names
    }
    leases = {"web": Lease(IPv4Address("10.100.0.2"), 5, (Port("tcp", 8080),))}
    return ZoneData(SETTINGS, services, leases)


def test_each_service_has_its_lease_and_its_instances() -> None:
    told: Any = seen.names(zone("web", "db"))
    assert told["services_total"] == 2 and [each["service"] for each in told["services"]] == ["db", "web"]
    assert told["services"][0]["ip"] is None
    assert told["services"][1] == {
        "service": "web",
        "ip": "10.100.0.2",
        "ports": [{"protocol": "tcp", "port": 8080}],
        "problem": None,
        "instances_total": 1,
        "instances": [
            {
                "id": "web-0",
                "node": "n",
                "connector": "alpha",
                "address": "10.0.0.1:4435",
                "status": "passing",
            }
        ],
    }


def test_a_part_of_thousands_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICES_MAX", "INSTANCES_MAX", "LEASES_MAX"):
        monkeypatch.setattr(seen, name, 1)
    told: Any = seen.names(zone("web", "db", instances=3))
    assert told["services_total"] == 2 and len(told["services"]) == 1
    assert told["services"][0]["instances_total"] == 3 and len(told["services"][0]["instances"]) == 1


def test_leases_say_since_when_and_what_rests() -> None:
    holdings = {
        IPv4Address("10.100.0.3"): Stored(Holding("old", 4, "quarantined", False, 50.0, 90.0), 1),
        IPv4Address("10.100.0.2"): Stored(Holding("web", 5, "leased", True, 60.0), 2),
    }
    told: Any = seen.leases(Table(holdings=holdings), 100.0)
    assert told["total"] == 2
    assert told["holdings"] == [
        {
            "ip": "10.100.0.2",
            "service": "web",
            "state": "leased",
            "pinned": True,
            "epoch": 5,
            "since_s": 40.0,
        },
        {
            "ip": "10.100.0.3",
            "service": "old",
            "state": "quarantined",
            "pinned": False,
            "epoch": 4,
            "since_s": 10.0,
        },
    ]
