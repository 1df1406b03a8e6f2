"""The embedded Consul's services and checks on its one node, as state that is told the time.

Agent and catalog are one thing here, so there is no anti-entropy: what is registered is in the catalog at
once. It runs TTL checks only, and refuses the others rather than pretending.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import msgspec

from ztna.consul.durations import duration_s
from ztna.consul.store import Clock, Json, Refusal

DEREGISTER_SECONDS_MIN = 60.0
"""Consul raises anything smaller to a minute (check_deregister_interval_min)."""
TTL_EXPIRED = "TTL expired"
STATUSES = ("passing", "warning", "critical")

SERVICE_FIELDS = frozenset(
    [
        "id",
        "name",
        "tags",
        "address",
        "port",
        "meta",
        "taggedaddresses",
        "weights",
        "check",
        "checks",
        "enabletagoverride",
        "kind",
    ]
)
CHECK_FIELDS = frozenset(
    [
        "id",
        "checkid",
        "name",
        "ttl",
        "status",
        "notes",
        "deregistercriticalserviceafter",
        "successbeforepassing",
        "failuresbeforecritical",
        "serviceid",
        "interval",
        "timeout",
    ]
)
KINDS_NOT_RUN = frozenset(
    [
        "http",
        "tcp",
        "udp",
        "grpc",
        "args",
        "scriptargs",
        "dockercontainerid",
        "aliasservice",
        "aliasnode",
        "h2ping",
    ]
)


MAINTENANCE = "maintenance"


class Check(msgspec.Struct, kw_only=True):
    """A TTL check and what it said last; or, of the kind maintenance, that its service is not to be used."""

    check_id: str
    name: str
    service_id: str
    ttl_s: float
    status: str
    kind: str = "ttl"
    notes: str = ""
    output: str = ""
    deregister_after_s: float | None = None
    expires_at: float = 0.0
    critical_since: float | None = None
    create_index: int = 0
    modify_index: int = 0


class Service(msgspec.Struct, kw_only=True):
    """A service as it was registered, defaults filled in as Consul does."""

    id: str
    name: str
    address: str
    port: int
    tags: list[str]
    meta: dict[str, str]
    tagged_addresses: dict[str, Json]
    weights: dict[str, int]
    enable_tag_override: bool = False
    create_index: int = 0
    modify_index: int = 0


class Registry(msgspec.Struct):
    """The services of one node. Times are seconds of any one clock that only rises."""

    clock: Clock
    services: dict[str, Service] = {}
    checks: dict[str, Check] = {}
    services_index: int = 10
    checks_index: int = 10
    index_of: dict[str, int] = {}
    extinction_index: int = 0
    ids_of: dict[str, list[str]] = {}
    check_ids_of: dict[str, list[str]] = {}

    def register(self, sent: Json, now: float, *, replace_checks: bool = False) -> None:
        """Register or replace a service of the JSON that was sent, with its checks."""
        service, checks = _service(sent), _checks(sent)
        known = self.services.get(service.id)
        if known is not None:
            service.create_index, service.modify_index = known.create_index, known.modify_index
            if known.name != service.name:
                self._drop(service.id)
                known = None
        if service != known:
            index = self._touch_services(service.name)
            service.create_index, service.modify_index = (
                (known.create_index, index) if known is not None else (index, index)
            )
            self.services[service.id] = service
            if known is None:
                self.ids_of.setdefault(service.name, []).append(service.id)
        for check in checks:
            self._add_check(check, now)
        if replace_checks:
            kept = {check.check_id for check in checks}
            for check in [each for each in self.checks_of(service.id) if each.check_id not in kept]:
                self._drop_check(check)

    def deregister(self, service_id: str) -> None:
        """Remove a service and its checks."""
        if service_id not in self.services:
            raise Refusal(
                404,
                f'Unknown service ID "{service_id}". '
                "Ensure that the service ID is passed, not the service name.",
            )
        self._drop(service_id)

    def maintain(self, service_id: str, enable: bool, reason: str, now: float) -> None:
        """Mark a service as not to be used, or end that."""
        service = self.services.get(service_id)
        if service is None:
            raise Refusal(404, f'Unknown service ID "{service_id}"')
        check_id = f"_service_maintenance:{service_id}"
        known = self.checks.get(check_id)
        if not enable and known is not None:
            self._drop_check(known)
        elif enable and known is None:
            self._add_check(
                Check(
                    check_id=check_id,
                    name="Service Maintenance Mode",
                    service_id=service_id,
                    ttl_s=0.0,
                    status="critical",
                    kind=MAINTENANCE,
                    notes=reason,
                ),
                now,
            )

    def report(self, check_id: str, status: str, output: str, now: float) -> None:
        """Take a TTL check's report; the TTL begins anew."""
        if status not in STATUSES:
            raise Refusal(400, f"Invalid check status: '{status}'")
        check = self.checks.get(check_id)
        if check is None or check.kind == MAINTENANCE:
            raise Refusal(
                404, f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.'
            )
        check.expires_at = now + check.ttl_s
        self._set_status(check, status, output, now)

    def checks_of(self, service_id: str) -> list[Check]:
        """Return a service's checks, by id."""
        return [self.checks[each] for each in sorted(self.check_ids_of.get(service_id, ()))]

    def named(self, name: str) -> list[Service]:
        """Return the instances of a service, by id."""
        return [self.services[each] for each in sorted(self.ids_of.get(name, ()))]

    def service_index(self, name: str) -> int:
        """Return the index to block on for one service; a missing one may wake for others' sake."""
        return self.index_of.get(name) or self.extinction_index or max(self.services_index, self.checks_index)

    def restart_timers(self, now: float) -> None:
        """Give every check its full TTL again, as an agent does that comes back."""
        for check in self.checks.values():
            check.expires_at = now + check.ttl_s
            if check.critical_since is not None:
                check.critical_since = now

    def expire(self, now: float) -> None:
        """Turn checks critical whose TTL has passed without a report."""
        for check in self.checks.values():
            if check.kind != MAINTENANCE and check.expires_at <= now and check.status != "critical":
                follows = f" (last output before timeout follows): {check.output}" if check.output else ""
                self._set_status(check, "critical", TTL_EXPIRED + follows, now)

    def reap(self, now: float) -> None:
        """Remove the services that have been critical for longer than a check of theirs allows."""
        over = {
            check.service_id
            for check in self.checks.values()
            if check.deregister_after_s is not None
            and check.critical_since is not None
            and now - check.critical_since > check.deregister_after_s
        }
        for service_id in over:
            self._drop(service_id)

    def _add_check(self, check: Check, now: float) -> None:
        known = self.checks.get(check.check_id)
        check.expires_at = now + check.ttl_s
        check.critical_since = now if check.status == "critical" else None
        if known is not None:
            # A check that is registered again keeps what it said (agent.go, restoreCheckState).
            check.status, check.output, check.critical_since = (
                known.status,
                known.output,
                known.critical_since,
            )
            check.create_index, check.modify_index = known.create_index, known.modify_index
            if msgspec.structs.replace(check, expires_at=known.expires_at) == known:
                known.expires_at = check.expires_at
                return
        self._forget_check(check.check_id)
        self.checks[check.check_id] = check
        self.check_ids_of.setdefault(check.service_id, []).append(check.check_id)
        index = self._touch_checks(check)
        check.create_index = check.create_index or index

    def _set_status(self, check: Check, status: str, output: str, now: float) -> None:
        if status == "critical":
            check.critical_since = now if check.critical_since is None else check.critical_since
        else:
            check.critical_since = None
        if (check.status, check.output) != (status, output):
            check.status, check.output = status, output
            self._touch_checks(check)

    def _touch_checks(self, check: Check) -> int:
        index = self.clock.next()
        check.modify_index = index
        self.checks_index = self.index_of[self.services[check.service_id].name] = index
        return index

    def _touch_services(self, name: str) -> int:
        index = self.clock.next()
        self.services_index = self.index_of[name] = index
        return index

    def _forget_check(self, check_id: str) -> None:
        if (known := self.checks.pop(check_id, None)) is not None:
            self.check_ids_of[known.service_id].remove(check_id)

    def _drop_check(self, check: Check) -> None:
        self._forget_check(check.check_id)
        self.checks_index = self.clock.next()
        self.index_of[self.services[check.service_id].name] = self.checks_index

    def _drop(self, service_id: str) -> None:
        for check in self.checks_of(service_id):
            self._drop_check(check)
        self.check_ids_of.pop(service_id, None)
        gone = self.services.pop(service_id)
        index = self._touch_services(gone.name)
        self.ids_of[gone.name].remove(service_id)
        if not self.ids_of[gone.name]:
            del self.index_of[gone.name], self.ids_of[gone.name]
            self.extinction_index = index


def _service(sent: Json) -> Service:
    given = _lowered(sent, SERVICE_FIELDS)
    name = given.get("name") or ""
    if not name:
        raise Refusal(400, "Missing service name")
    weights = _lowered(given.get("weights") or {}, frozenset(("passing", "warning")))
    address, port = given.get("address") or "", given.get("port") or 0
    tagged = {
        label: _tagged(_lowered(found, frozenset(("address", "port"))))
        for label, found in (given.get("taggedaddresses") or {}).items()
    }
    return Service(
        id=given.get("id") or name,
        name=name,
        address=address,
        port=port,
        tags=list(given.get("tags") or ()),
        meta=dict(given.get("meta") or {}),
        tagged_addresses=dict(sorted((_own_tagged_addresses(address, port) | tagged).items())),
        weights={"Passing": weights.get("passing", 1), "Warning": weights.get("warning", 1)},
        enable_tag_override=given.get("enabletagoverride", False),
    )


def _tagged(given: Json) -> Json:
    return {"Address": given.get("address", ""), "Port": given.get("port", 0)}


def _own_tagged_addresses(address: str, port: int) -> dict[str, Json]:
    """Consul notes a numeric service address by family (agent.go, addServiceLocked)."""
    try:
        family = f"ipv{ip_address(address).version}"
    except ValueError:
        return {}
    return {f"{scope}_{family}": {"Address": address, "Port": port} for scope in ("lan", "wan")}


def _checks(sent: Json) -> list[Check]:
    given = _lowered(sent, SERVICE_FIELDS)
    service_id = given.get("id") or given["name"]
    asked = [*([given["check"]] if given.get("check") else ()), *(given.get("checks") or ())]
    return [
        _check(each, service_id, given["name"], f"service:{service_id}" + (f":{n}" if len(asked) > 1 else ""))
        for n, each in enumerate(asked, 1)
    ]


def _check(sent: Json, service_id: str, service: str, default_id: str) -> Check:
    kinds = sorted(key for key in sent if key.lower() in KINDS_NOT_RUN and sent[key])
    if kinds:
        raise Refusal(400, f"Invalid check: the embedded Consul runs TTL checks only, not {kinds[0]}")
    given = _lowered(sent, CHECK_FIELDS | KINDS_NOT_RUN)
    ttl_s = _duration(given.get("ttl") or 0)
    if ttl_s <= 0:
        raise Refusal(400, "Invalid check: TTL must be > 0 for TTL checks")
    status = given.get("status") or "critical"
    if status not in STATUSES:
        raise Refusal(400, f"Status for checks must 'passing', 'warning', 'critical', got {status!r}")
    after = given.get("deregistercriticalserviceafter")
    return Check(
        check_id=given.get("checkid") or given.get("id") or default_id,
        name=given.get("name") or f"Service '{service}' check",
        service_id=service_id,
        ttl_s=ttl_s,
        status=status,
        notes=given.get("notes") or "",
        deregister_after_s=max(_duration(after), DEREGISTER_SECONDS_MIN) if after else None,
    )


def _duration(given: Any) -> float:
    try:
        return duration_s(given)
    except ValueError as error:
        raise Refusal(400, f"Request decode failed: {error}") from error


def _lowered(sent: Json, known: Iterable[str]) -> Json:
    """Match field names as Go's JSON does, without case, and refuse what is unknown."""
    for key in sent:
        if key.lower() not in known:
            raise Refusal(400, f'Request decode failed: json: unknown field "{key}"')
    return {key.lower(): value for key, value in sent.items()}
