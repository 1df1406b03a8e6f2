"""What /status of dnsd shows of names and leases, as Consul has them.

Pure. Of thousands some are shown, with how many there are: those that come first, as sorting all would keep
questions waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from dnsd.services import Service
from dnsd.zone import ZoneData
from ztna.leases import Lease, Table
from ztna.published import META_CONNECTOR

SERVICES_MAX = 1_000
INSTANCES_MAX = 50
LEASES_MAX = 1_000


def names(zone: ZoneData) -> Mapping[str, object]:
    """Return services of the catalog, in the order of their names, each with its lease and its instances."""
    shown = sorted(islice(zone.services, SERVICES_MAX))
    return {
        "services_total": len(zone.services),
        "services": [_service(zone.services[name], zone.leases.get(name)) for name in shown],
    }


def _service(service: Service, lease: Lease | None) -> Mapping[str, object]:
    return {
        "service": service.name,
        "ip": None if lease is None else str(lease.ip),
        "ports": [{"protocol": port.protocol, "port": port.port} for port in service.ports],
        "problem": service.problem,
        "instances_total": len(service.instances),
        "instances": [
            {
                "id": instance.instance_id,
                "node": instance.node,
                "connector": instance.meta.get(META_CONNECTOR),
                "address": f"{instance.address}:{instance.port}",
                "status": instance.status,
            }
            for instance in service.instances[:INSTANCES_MAX]
        ],
    }


def leases(table: Table, now: float) -> Mapping[str, object]:
    """Return who has which address at `now` (Unix seconds), and which addresses rest, in the order of the addresses."""
    shown = sorted(islice(table.holdings.items(), LEASES_MAX), key=lambda item: int(item[0]))
    return {
        "total": len(table.holdings),
        "holdings": [
            {
                "ip": str(address),
                "service": stored.record.service,
                "state": stored.record.state,
                "pinned": stored.record.pinned,
                "epoch": stored.record.epoch,
                "since_s": round(now - (stored.record.released_at or stored.record.leased_at), 1),
            }
            for address, stored in shown
        ],
    }
