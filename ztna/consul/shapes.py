"""Consul's JSON into the values of ztna.catalog.

Pure. What is absent or null in an answer becomes Consul's default; nothing is asked for here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from ztna.catalog import AgentService, Instance, KvPair, Status, TaggedAddress, TxnFailure

_WORST_FIRST: tuple[Status, ...] = ("critical", "warning", "passing")


def kv_pair(entry: Mapping[str, Any]) -> KvPair:
    """Read an entry of /v1/kv or of a transaction's results; the value may be base64 text, bytes or null."""
    value = entry.get("Value")
    return KvPair(
        key=entry["Key"],
        value=base64.b64decode(value) if isinstance(value, str) else (value or b""),
        modify_index=entry["ModifyIndex"],
        create_index=entry["CreateIndex"],
        lock_index=entry["LockIndex"],
        flags=entry["Flags"],
        session=entry.get("Session") or None,
    )


def kv_pairs(entries: Iterable[Mapping[str, Any]]) -> tuple[KvPair, ...]:
    """Read a recursive answer of /v1/kv."""
    return tuple(map(kv_pair, entries))


def results(answer: Mapping[str, Any]) -> tuple[KvPair, ...]:
    """Read what a transaction that was carried out shows."""
    return tuple(kv_pair(entry["KV"]) for entry in answer["Results"] or ())


def failures(answer: Mapping[str, Any]) -> tuple[TxnFailure, ...]:
    """Read why a transaction was not carried out."""
    return tuple(TxnFailure(error["OpIndex"], error["What"]) for error in answer["Errors"])


def status(text: str) -> Status:
    """Read a check's status; maintenance and anything unknown count as critical."""
    return next((known for known in _WORST_FIRST if known == text), "critical")


def worst(statuses: Iterable[Status]) -> Status:
    """Return the worst of them, passing when there is none."""
    given = set(statuses)
    return next((known for known in _WORST_FIRST if known in given), "passing")


def instances(entries: Iterable[Mapping[str, Any]]) -> tuple[Instance, ...]:
    """Read /v1/health/service/<name>, ordered by (node, instance id)."""
    return tuple(sorted(map(_instance, entries), key=lambda found: (found.node, found.instance_id)))


def agent_services(entries: Mapping[str, Any]) -> Mapping[str, AgentService]:
    """Read /v1/agent/services, by service id."""
    return {service_id: _agent_service(entry) for service_id, entry in entries.items()}


def agent_checks(entries: Mapping[str, Any]) -> Mapping[str, Status]:
    """Read /v1/agent/checks: the status by check id."""
    return {check_id: status(entry["Status"]) for check_id, entry in entries.items()}


def agent_service_health(entries: Mapping[str, Any]) -> Mapping[str, Status]:
    """Read /v1/agent/checks: the worst status of each service id that has a check."""
    found: dict[str, list[Status]] = {}
    for entry in entries.values():
        if entry.get("ServiceID"):
            found.setdefault(entry["ServiceID"], []).append(status(entry["Status"]))
    return {service_id: worst(statuses) for service_id, statuses in found.items()}


def _agent_service(entry: Mapping[str, Any]) -> AgentService:
    weights = entry.get("Weights") or {}
    return AgentService(
        service=entry["Service"],
        instance_id=entry["ID"],
        address=entry["Address"],
        port=entry.get("Port", 0),
        tags=tuple(entry.get("Tags") or ()),
        meta=entry.get("Meta") or {},
        tagged_addresses=_tagged(entry.get("TaggedAddresses")),
        weight_passing=weights.get("Passing", 1),
        weight_warning=weights.get("Warning", 1),
    )


def _instance(entry: Mapping[str, Any]) -> Instance:
    node, service = entry["Node"], entry["Service"]
    weights = service.get("Weights") or {}
    return Instance(
        service=service["Service"],
        instance_id=service["ID"],
        node=node["Node"],
        address=service["Address"] or node["Address"],
        # Consul 1.19 leaves a port of 0 out of the catalog.
        port=service.get("Port", 0),
        tags=tuple(service.get("Tags") or ()),
        meta=service.get("Meta") or {},
        weight_passing=weights.get("Passing", 1),
        weight_warning=weights.get("Warning", 1),
        tagged_addresses=_tagged(service.get("TaggedAddresses")),
        status=worst(status(check["Status"]) for check in entry["Checks"]),
    )


def _tagged(entries: Mapping[str, Any] | None) -> Mapping[str, TaggedAddress]:
    return {name: TaggedAddress(found["Address"], found["Port"]) for name, found in (entries or {}).items()}
