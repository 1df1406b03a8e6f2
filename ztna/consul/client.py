"""Consul's API as this mesh uses it: python-consul2 over our transport, values in, values out, errors mapped.

It watches nothing and keeps no state; ztna.consul.watch does. Every oddity of Consul's answers ends here.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import msgspec
from consul import base

from ztna.catalog import (
    TXN_OPERATIONS_MAX,
    AgentService,
    CheckDefinition,
    Instance,
    KvCheckIndex,
    KvCheckNotExists,
    KvCheckSession,
    KvDeleteCas,
    KvPair,
    KvSet,
    Probe,
    ProbeDefinition,
    Registration,
    Status,
    TxnOp,
    TxnOutcome,
)
from ztna.config import ConsulConfig
from ztna.consul import shapes
from ztna.consul.transport import NotThere, Say, Transport
from ztna.errors import ConsulAclsOff, ConsulForbidden, ConsulRejected, ConsulUnavailable

SESSION_TTL_SECONDS_MIN = 10.0
SESSION_TTL_SECONDS_MAX = 86_400.0
OUTPUT_CHARACTERS_MAX = 4096
"""Consul itself cuts the output of a check here."""

T = TypeVar("T")


class Read(msgspec.Struct, Generic[T], frozen=True):
    """What a read said: decoded JSON (None for a 404), Consul's index, and who answered."""

    data: T
    index: int
    known_leader: bool
    last_contact_ms: int


class Right(msgspec.Struct, frozen=True):
    """What an ACL token may have: access (`read`, `list` or `write`) to a resource (`key`, `service`, `node`, ...)."""

    resource: str
    segment: str
    access: str

    def __str__(self) -> str:
        return f"{self.resource} {self.segment}: {self.access}"


class _Api(base.Consul):  # type: ignore[misc]
    """python-consul2's client without its constructor, where CONSUL_HTTP_* beats explicit arguments."""

    def __init__(self, http: Transport, datacenter: str | None) -> None:
        self.http = http
        self.dc = datacenter
        self.token = None
        self.scheme = "http"
        self.consistency = "default"
        self.agent = base.Consul.Agent(self)
        self.health = base.Consul.Health(self)
        self.kv = base.Consul.KV(self)
        self.session = base.Consul.Session(self)
        self.status = base.Consul.Status(self)


class ConsulClient:
    """An async context manager. Every method raises ConsulUnavailable (no answer, no leader, 5xx),
    ConsulForbidden (403, naming the rule that the token lacks) or ConsulRejected (Consul said no).

    Reads and what may safely be repeated are tried again within the deadline of the configuration; KV writes,
    session creation and transactions are sent once, so after ConsulUnavailable their effect is unknown.
    """

    def __init__(self, config: ConsulConfig, say: Say | None = None) -> None:
        """`say` hears what is wrong with the token, and None when it is well again."""
        self._http = Transport(config, say)
        self._api = _Api(self._http, config.datacenter)
        self._dc = config.datacenter

    @property
    def address(self) -> str:
        """The base URL that is asked."""
        return self._http.base_uri

    @property
    def token_generation(self) -> int:
        """A number that rises with each other token: what was registered by an earlier one is to be registered anew.

        Consul's agent keeps the token of a registration and syncs it to the catalog by that one alone.
        """
        return self._http.tokens.generation

    async def __aenter__(self) -> ConsulClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    # KV

    async def kv_get(self, key: str, *, consistent: bool = False) -> KvPair | None:
        """Return the pair, or None when there is no such key."""
        consistency = "consistent" if consistent else None
        _, found = await _mapped(
            self._api.kv.get(_path(key), consistency=consistency), f'key "{key}" {{ policy = "read" }}'
        )
        return None if found is None else _shaped(shapes.kv_pair, found)

    async def kv_list(self, prefix: str, *, consistent: bool = False) -> tuple[KvPair, ...]:
        """Return every pair under the prefix, in key order. What the token may not read is left out."""
        consistency = "consistent" if consistent else None
        _, found = await _mapped(
            self._api.kv.get(_path(prefix), recurse=True, consistency=consistency),
            f'key_prefix "{prefix}" {{ policy = "read" }}',
        )
        return _shaped(shapes.kv_pairs, found or ())

    async def kv_put(
        self,
        key: str,
        value: bytes,
        *,
        cas: int | None = None,
        acquire: str | None = None,
        release: str | None = None,
    ) -> bool:
        """Write; False when the index did not match or the lock was not to be had or not held.

        `cas` is the expected modify index (0: there must be none), `acquire` and `release` are session ids.
        """
        needs = f'key "{key}" {{ policy = "write" }}'
        return bool(
            await _mapped(
                self._api.kv.put(_path(key), value, cas=cas, acquire=acquire, release=release), needs
            )
        )

    async def kv_delete(self, key: str, *, cas: int | None = None, recurse: bool = False) -> bool:
        """Delete the key, or with `recurse` all that begin with it; False when the index did not match.

        True also when there is no such key, `cas` or not.
        """
        needs = f'{"key_prefix" if recurse else "key"} "{key}" {{ policy = "write" }}'
        return bool(await _mapped(self._api.kv.delete(_path(key), recurse=recurse, cas=cas), needs))

    async def txn(self, operations: Sequence[TxnOp]) -> TxnOutcome:
        """Carry out all operations or none. At most TXN_OPERATIONS_MAX of them."""
        if len(operations) > TXN_OPERATIONS_MAX:
            raise ConsulRejected(
                f"a transaction of {len(operations)} operations: at most {TXN_OPERATIONS_MAX} are possible"
            )
        body = json.dumps([_operation(operation) for operation in operations])
        keys = ", ".join(sorted({f'key "{operation.key}"' for operation in operations}))
        status, answer = await _mapped(
            self._http.put(_txn_answer, "/v1/txn", params=self._in_datacenter(), data=body),
            f'{keys} {{ policy = "write" }}',
        )
        if status == 200:
            return TxnOutcome(pairs=_shaped(shapes.results, answer))
        failures = _shaped(shapes.failures, answer)
        for failure in failures:
            if failure.what.startswith("Permission denied"):
                key = operations[failure.operation].key
                raise ConsulForbidden(_lacks(failure.what, f'key "{key}" {{ policy = "write" }}'))
        return TxnOutcome(failures=failures)

    # Sessions

    async def session_create(
        self,
        name: str,
        *,
        ttl_s: float,
        behavior: Literal["release", "delete"] = "release",
        lock_delay_s: float = 15.0,
    ) -> str:
        """Return the id of a new session; `ttl_s` is 10 to 86,400, and Consul may let it live twice that.

        On invalidation its locks are released, or with `delete` their keys deleted.
        """
        if not SESSION_TTL_SECONDS_MIN <= ttl_s <= SESSION_TTL_SECONDS_MAX:
            raise ConsulRejected(f"a session TTL of {ttl_s:g} s: Consul wants 10 s to 86400 s")
        made = await _mapped(
            self._api.session.create(name, ttl=ttl_s, behavior=behavior, lock_delay=lock_delay_s),
            'session_prefix "" { policy = "write" }',
        )
        return str(made)

    async def session_renew(self, session: str) -> bool:
        """Extend the session by its TTL; False when Consul no longer has it."""
        try:
            await _mapped(self._api.session.renew(session), 'session_prefix "" { policy = "write" }')
        except NotThere:
            return False
        return True

    async def session_destroy(self, session: str) -> None:
        """End the session; its locks go as its behaviour says. No error when it is gone already."""
        await _mapped(self._api.session.destroy(session), 'session_prefix "" { policy = "write" }')

    # The local Consul agent's services and checks

    async def register_service(self, registration: Registration, *, replace_checks: bool = True) -> None:
        """Register or replace an instance; checks that are not in the registration are removed unless told otherwise.

        Consul keeps the status of a check whose definition did not change. An operator's maintenance mode is such a
        check that nobody registered: with `replace_checks` it ends.
        """
        await self._put_json(
            "/v1/agent/service/register",
            _registration(registration),
            f'service "{registration.service}" {{ policy = "write" }}',
            params=[("replace-existing-checks", "true")] if replace_checks else [],
        )

    async def deregister_service(self, service_id: str) -> bool:
        """Remove an instance from the local Consul agent; False when it has none of that id.

        Without ACLs 1.8 answers 200 either way, so True proves nothing there.
        """
        try:
            await self._put_json(
                f"/v1/agent/service/deregister/{service_id}", None, _writes(f"the service of {service_id!r}")
            )
        except NotThere:
            return False
        return True

    async def maintain_service(self, service_id: str, reason: str | None) -> bool:
        """Make an instance critical whatever its checks say, or with None end that; False when there is none."""
        params = [("enable", "true"), ("reason", reason)] if reason is not None else [("enable", "false")]
        path = f"/v1/agent/service/maintenance/{service_id}"
        try:
            await self._put_json(path, None, _writes(f"the service of {service_id!r}"), params)
        except NotThere:
            return False
        return True

    async def update_check(self, check_id: str, status: Status, output: str = "") -> bool:
        """Report a TTL check; False when the local Consul agent has no such TTL check (reaped, for one)."""
        body = {"Status": status, "Output": output[:OUTPUT_CHARACTERS_MAX]}
        try:
            await self._put_json(
                f"/v1/agent/check/update/{check_id}", body, _writes(f"the service of check {check_id!r}")
            )
        except NotThere:
            return False
        return True

    async def agent_services(self) -> Mapping[str, AgentService]:
        """Return what is registered with the local Consul agent, by service id."""
        found = await _mapped(self._api.agent.services(), 'service_prefix "" { policy = "read" }')
        return _shaped(shapes.agent_services, found)

    async def agent_checks(self) -> Mapping[str, Status]:
        """Return the status of every check of the local Consul agent, by check id."""
        found = await _mapped(self._api.agent.checks(), 'service_prefix "" { policy = "read" }')
        return _shaped(shapes.agent_checks, found)

    async def agent_service_health(self) -> Mapping[str, Status]:
        """Return the worst status of each service of the local Consul agent that has checks, by service id."""
        found = await _mapped(self._api.agent.checks(), 'service_prefix "" { policy = "read" }')
        return _shaped(shapes.agent_service_health, found)

    async def agent_self(self) -> Mapping[str, Any]:
        """Return Consul's own account of its agent (`Config`, `Member`, ...)."""
        found = await _mapped(self._api.agent.self(), 'agent_prefix "" { policy = "read" }')
        return dict(found)

    async def leader(self) -> str | None:
        """Return the leader's address, None when there is none."""
        return await _mapped(self._api.status.leader(), "none") or None

    async def clock(self) -> float:
        """Return Consul's idea of the time, in Unix seconds and whole ones, as the Date of an answer has it."""
        date = await _mapped(
            self._http.get(lambda answer: answer.headers.get("Date"), "/v1/status/leader"), "none"
        )
        return _shaped(lambda text: parsedate_to_datetime(text).timestamp(), date)

    async def may(self, rights: Sequence[Right]) -> tuple[bool, ...]:
        """Return for each right whether the token has it.

        Raises ConsulRejected where ACLs are off. Asks what Consul's own user interface asks, since 1.8.
        """
        wanted = [
            {"Resource": right.resource, "Segment": right.segment, "Access": right.access} for right in rights
        ]
        answer = await _mapped(
            self._http.post(_read_json, "/v1/internal/acl/authorize", data=json.dumps(wanted)), "none"
        )
        allowed = _shaped(lambda found: tuple(bool(each["Allow"]) for each in found), answer)
        if len(allowed) != len(rights):
            raise ConsulUnavailable(f"Consul answered {len(allowed)} of {len(rights)} rights")
        return allowed

    # The catalog

    async def service_instances(
        self, name: str, *, tag: str | None = None, consistent: bool = False
    ) -> tuple[Instance, ...]:
        """Return all instances of a service, critical ones too, by (node, id). `consistent` asks a quorum."""
        params = [("tag", tag)] if tag is not None else []
        if consistent:
            params.append(("consistent", "1"))
        found = await self.read(f"/v1/health/service/{name}", params)
        return _shaped(shapes.instances, found.data)

    async def services(self, *, tag: str | None = None, consistent: bool = False) -> tuple[str, ...]:
        """Return the names in the catalog, sorted; with `tag`, those that have it on some instance."""
        params = [("consistent", "1")] if consistent else []
        found = await self.read("/v1/catalog/services", params, shape=dict[str, frozenset[str]])
        return tuple(sorted(name for name, tags in found.data.items() if tag is None or tag in tags))

    async def read(
        self,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        *,
        shape: Any = Any,
        index: int = 0,
        wait_s: float = 0.0,
    ) -> Read[Any]:
        """Read JSON of a shape that msgspec knows, with its index.

        With `index` it blocks up to `wait_s` for something newer. A KV path that has nothing gives None.
        """
        asked = [*params, *self._in_datacenter()]
        if index:
            asked += [("index", str(index)), ("wait", f"{wait_s:g}s")]
        return await _mapped(
            self._http.get(partial(_read_answer, shape), path, params=asked), _read_rule(path)
        )

    def _in_datacenter(self) -> list[tuple[str, str]]:
        return [("dc", self._dc)] if self._dc else []

    async def _put_json(
        self, path: str, body: object, needs: str, params: Sequence[tuple[str, str]] = ()
    ) -> None:
        data = "" if body is None else json.dumps(body)
        await _mapped(self._http.put(_done, path, params=params, data=data), needs)


async def _mapped(call: Awaitable[T], needs: str) -> T:
    """Turn what python-consul2 raises into ours; `needs` is the ACL rule that a 403 would mean."""
    try:
        return await call
    except base.ACLPermissionDenied as error:
        raise ConsulForbidden(_lacks(str(error), needs)) from error
    except base.ACLDisabled as error:
        raise ConsulAclsOff(f"Consul has ACLs disabled: {error}") from error
    except base.NotFound as error:
        raise NotThere(str(error).strip()) from error
    except base.Timeout as error:
        raise ConsulUnavailable("Consul answered with a timeout") from error
    except (base.BadRequest, base.ClientError) as error:
        raise ConsulRejected(f"Consul refused the request: {str(error).strip()}") from error
    except (KeyError, TypeError, ValueError) as error:  # python-consul2 reads JSON unchecked
        raise ConsulUnavailable(f"Consul's answer has an unknown shape: {error!r}") from error


def _shaped(make: Callable[[Any], T], data: Any) -> T:
    """Make values of an answer; one that is not of the shape we know is no answer."""
    try:
        return make(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConsulUnavailable(f"Consul's answer has an unknown shape: {error!r}") from error


def _lacks(said: str, needs: str) -> str:
    said = said.strip()
    if "ACL not found" in said:
        return "Consul does not know the ACL token that was sent (ACL not found)"
    return f"the Consul ACL token lacks the rule: {needs} (Consul says: {said})"


def _writes(what: str) -> str:
    return f'service {{ policy = "write" }} on {what}'


def _read_rule(path: str) -> str:
    name = path.rpartition("/")[2]
    if path.startswith("/v1/kv/"):
        return f'key_prefix "{path.removeprefix("/v1/kv/")}" {{ policy = "read" }}'
    if path.startswith("/v1/health/node/"):
        return f'node "{name}" {{ policy = "read" }}'
    if path.startswith("/v1/health/service/"):
        return f'service "{name}" {{ policy = "read" }} and node_prefix "" {{ policy = "read" }}'
    return 'service_prefix "" { policy = "read" } and node_prefix "" { policy = "read" }'


def _path(key: str) -> str:
    if key.startswith("/"):
        raise ConsulRejected(f"KV key {key!r}: must not begin with a slash")
    return key


def _check_status(response: base.Response) -> None:
    if response.code == 401:
        raise base.ACLDisabled(response.body)
    """Raise what python-consul2 raises for a 4xx; the transport has dealt with 5xx already."""
    text = response.body.strip()
    if response.code == 404:
        raise base.NotFound(text)
    if response.code == 403:
        raise base.ACLPermissionDenied(text)
    if response.code >= 400:
        raise base.ClientError(f"{response.code} {text}")


def _read_json(response: base.Response) -> Any:
    _check_status(response)
    return json.loads(response.body)


def _done(response: base.Response) -> None:
    _check_status(response)


def _txn_answer(response: base.Response) -> tuple[int, Any]:
    if response.code != 409:
        _check_status(response)
    return response.code, json.loads(response.body)


def _read_answer(shape: Any, response: base.Response) -> Read[Any]:
    headers = response.headers
    # Only a KV read answers 404 for "nothing there", and then with an index to block on.
    nothing = response.code == 404 and "X-Consul-Index" in headers
    if not nothing:
        _check_status(response)
    return Read(
        data=None if nothing else msgspec.json.decode(response.content, type=shape),
        index=int(headers.get("X-Consul-Index", "0")),
        known_leader=headers.get("X-Consul-KnownLeader", "true") == "true",
        last_contact_ms=int(headers.get("X-Consul-LastContact", "0")),
    )


def _operation(operation: TxnOp) -> dict[str, Any]:
    fields: dict[str, Any] = {"Key": operation.key}
    match operation:
        case KvSet(value=value, cas=None):
            fields |= {"Verb": "set", "Value": base64.b64encode(value).decode()}
        case KvSet(value=value, cas=index):
            fields |= {"Verb": "cas", "Value": base64.b64encode(value).decode(), "Index": index}
        case KvDeleteCas(index=index):
            fields |= {"Verb": "delete-cas", "Index": index}
        case KvCheckSession(session=session):
            fields |= {"Verb": "check-session", "Session": session}
        case KvCheckIndex(index=index):
            fields |= {"Verb": "check-index", "Index": index}
        case KvCheckNotExists():
            fields |= {"Verb": "check-not-exists"}
    return {"KV": fields}


def _registration(registration: Registration) -> dict[str, Any]:
    return {
        "ID": registration.instance_id,
        "Name": registration.service,
        "Address": registration.address,
        "Port": registration.port,
        "Tags": list(registration.tags),
        "Meta": dict(registration.meta),
        "TaggedAddresses": {
            name: {"Address": tagged.address, "Port": tagged.port}
            for name, tagged in registration.tagged_addresses.items()
        },
        "Weights": {"Passing": registration.weight_passing, "Warning": registration.weight_warning},
        "Checks": [_check(check) for check in registration.checks],
    }


def _check(check: CheckDefinition | ProbeDefinition) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "CheckID": check.check_id,
        "Name": check.name,
        "Status": check.status,
        "Notes": check.notes,
    }
    match check:
        case CheckDefinition():
            fields["TTL"] = f"{check.ttl_s:g}s"
        case ProbeDefinition():
            fields |= _probe(check.probe)
    if check.deregister_after_s is not None:
        fields["DeregisterCriticalServiceAfter"] = f"{check.deregister_after_s:g}s"
    return fields


def _probe(probe: Probe) -> dict[str, Any]:
    """Return the fields of a probe, and none that it does without: an older Consul refuses those it does not know."""
    fields: dict[str, Any] = {
        "Interval": f"{probe.interval_s:g}s",
        "Timeout": f"{probe.timeout_s:g}s",
        "SuccessBeforePassing": probe.success_before_passing,
        "FailuresBeforeCritical": probe.failures_before_critical,
    }
    if probe.failures_before_warning is not None:
        fields["FailuresBeforeWarning"] = probe.failures_before_warning
    match probe.kind:
        case "http":
            fields |= {"HTTP": probe.target, "Method": probe.method}
            if probe.headers:
                headers: defaultdict[str, list[str]] = defaultdict(list)
                for name, value in probe.headers:
                    headers[name].append(value)
                fields["Header"] = dict(headers)
        case "grpc":
            fields |= {"GRPC": probe.target, "GRPCUseTLS": probe.tls}
        case "script":
            fields["ScriptArgs"] = list(probe.command)
        case _:
            fields[probe.kind.upper()] = probe.target
    if probe.tls_skip_verify:
        fields["TLSSkipVerify"] = True
    if probe.tls_name is not None:
        fields["TLSServerName"] = probe.tls_name
    return fields
