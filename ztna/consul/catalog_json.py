"""The embedded Consul's answers about services, checks and its node, in the shape of Consul 1.19.

Each view of a request is an index to block on and a function that builds the answer; nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aiohttp import web

from ztna.consul.registry import Check, Registry, Service
from ztna.consul.store import Json

NODE_NAME = "embedded"
NODE_ADDRESS = "127.0.0.1"
DATACENTER = "dc1"
VERSION = "1.19.2+ztna.embedded"
BIRTH_INDEX = 10

View = tuple[int, Callable[[], object]]

_CONSUL = Service(
    id="consul",
    name="consul",
    address="",
    port=8300,
    tags=[],
    meta={"version": VERSION},
    tagged_addresses={},
    weights={"Passing": 1, "Warning": 1},
    create_index=BIRTH_INDEX,
    modify_index=BIRTH_INDEX,
)


class CatalogJson:
    """What /v1/catalog, /v1/health and /v1/agent show of a registry."""

    def __init__(self, registry: Registry, node_id: str) -> None:
        self._registry = registry
        self._node_id = node_id
        self.name = NODE_NAME

    # /v1/agent

    def agent_services(self) -> Json:
        """Every registered service by id; Consul's own is not among them."""
        return {
            each.id: {**_agent_service(each), "Datacenter": DATACENTER}
            for each in self._registry.services.values()
        }

    def agent_checks(self) -> Json:
        """Every check by id; the agent knows no indexes."""
        return {
            each.check_id: {**self._check(each), "CreateIndex": 0, "ModifyIndex": 0}
            for each in self._registry.checks.values()
        }

    def agent_self(self, host: str, port: int) -> Json:
        """The agent's account of itself."""
        config = {
            "Datacenter": DATACENTER,
            "PrimaryDatacenter": DATACENTER,
            "NodeName": NODE_NAME,
            "NodeID": self._node_id,
            "Revision": "",
            "Server": True,
            "Version": VERSION,
            "BuildDate": "1970-01-01T00:00:01Z",
        }
        return {
            "Config": config,
            "DebugConfig": {},
            "Coord": {"Vec": [0.0] * 8, "Error": 1.5, "Adjustment": 0, "Height": 1e-05},
            "Member": self.member(host, port),
            "Stats": {},
            "Meta": {"consul-network-segment": "", "consul-version": VERSION},
        }

    def member(self, host: str, port: int) -> Json:
        """The one member of the cluster."""
        tags = {"acls": "0", "build": f"{VERSION}:", "dc": DATACENTER, "id": self._node_id, "role": "consul"}
        versions = {"ProtocolMin": 1, "ProtocolMax": 5, "ProtocolCur": 2}
        delegate = {"DelegateMin": 2, "DelegateMax": 5, "DelegateCur": 4}
        return {
            "Name": NODE_NAME,
            "Addr": host,
            "Port": port,
            "Tags": tags,
            "Status": 1,
            **versions,
            **delegate,
        }

    # /v1/catalog

    def services(self, request: web.Request) -> View:
        """Names with the tags of all their instances."""

        def build() -> object:
            tags: dict[str, dict[str, None]] = {}
            for each in self._services():
                tags.setdefault(each.name, {}).update(dict.fromkeys(each.tags))
            return {name: list(found) for name, found in sorted(tags.items())}

        return self._registry.services_index, build

    def service(self, request: web.Request) -> View:
        """The instances of a service, flat, without their checks."""
        name = request.match_info["name"]
        return self._service_index(name), lambda: [
            self._flat(each) for each in self._chosen(name, request.query.getall("tag", []))
        ]

    def nodes(self, request: web.Request) -> View:
        """The one node."""
        return BIRTH_INDEX, lambda: [self._node()]

    def node(self, request: web.Request) -> View:
        """The node with its services."""
        if request.match_info["node"] != NODE_NAME:
            return self._registry.services_index, lambda: None
        return self._registry.services_index, lambda: {
            "Node": self._node(),
            "Services": {each.id: _catalog_service(each) for each in self._services()},
        }

    # /v1/health

    def health_service(self, request: web.Request) -> View:
        """The instances of a service, each with its node and all checks that concern it."""
        name = request.match_info["name"]
        passing_only = request.query.get("passing", "false") not in ("false", "0")

        def build() -> object:
            return [
                {"Node": self._node(), "Service": _catalog_service(each), "Checks": checks}
                for each in self._chosen(name, request.query.getall("tag", []))
                for checks in [[_SERF_HEALTH, *map(self._check, self._registry.checks_of(each.id))]]
                if not passing_only or all(check["Status"] == "passing" for check in checks)
            ]

        return self._service_index(name), build

    def health_checks(self, request: web.Request) -> View:
        """The checks of a service, without its node's."""
        name = request.match_info["name"]
        return self._service_index(name), lambda: [
            self._check(check) for each in self._named(name) for check in self._registry.checks_of(each.id)
        ]

    def health_node(self, request: web.Request) -> View:
        """Every check on the node."""
        known = request.match_info["node"] == NODE_NAME
        return self._registry.checks_index, lambda: self._all_checks() if known else []

    def health_state(self, request: web.Request) -> View:
        """Every check in a state, or with `any` every check."""
        state = request.match_info["state"]
        return self._registry.checks_index, lambda: [
            check for check in self._all_checks() if state in ("any", check["Status"])
        ]

    def _services(self) -> list[Service]:
        return [_CONSUL, *self._registry.services.values()]

    def _named(self, name: str) -> list[Service]:
        return [_CONSUL] if name == _CONSUL.name else self._registry.named(name)

    def _chosen(self, name: str, tags: Iterable[str]) -> list[Service]:
        wanted = {tag.lower() for tag in tags}
        return [each for each in self._named(name) if wanted <= {tag.lower() for tag in each.tags}]

    def _service_index(self, name: str) -> int:
        return BIRTH_INDEX if name == _CONSUL.name else self._registry.service_index(name)

    def _all_checks(self) -> list[Json]:
        return [_SERF_HEALTH, *map(self._check, self._registry.checks.values())]

    def _node(self) -> Json:
        return {
            "ID": self._node_id,
            "Node": NODE_NAME,
            "Address": NODE_ADDRESS,
            "Datacenter": DATACENTER,
            "TaggedAddresses": dict.fromkeys(("lan", "lan_ipv4", "wan", "wan_ipv4"), NODE_ADDRESS),
            "Meta": {"consul-network-segment": "", "consul-version": VERSION},
            "CreateIndex": BIRTH_INDEX,
            "ModifyIndex": BIRTH_INDEX,
        }

    def _flat(self, service: Service) -> Json:
        node = self._node()
        return {
            **{key: node[key] for key in ("ID", "Node", "Address", "Datacenter", "TaggedAddresses")},
            "NodeMeta": node["Meta"],
            "ServiceKind": "",
            "ServiceID": service.id,
            "ServiceName": service.name,
            "ServiceTags": service.tags,
            "ServiceAddress": service.address,
            "ServiceTaggedAddresses": service.tagged_addresses,
            "ServiceWeights": service.weights,
            "ServiceMeta": service.meta,
            "ServicePort": service.port,
            "ServiceSocketPath": "",
            "ServiceEnableTagOverride": service.enable_tag_override,
            "ServiceProxy": _PROXY,
            "ServiceConnect": {},
            "ServiceLocality": None,
            "CreateIndex": service.create_index,
            "ModifyIndex": service.modify_index,
        }

    def _check(self, check: Check) -> Json:
        service = self._registry.services[check.service_id]
        return {
            "Node": NODE_NAME,
            "CheckID": check.check_id,
            "Name": check.name,
            "Status": check.status,
            "Notes": check.notes,
            "Output": check.output,
            "ServiceID": service.id,
            "ServiceName": service.name,
            "ServiceTags": service.tags,
            "Type": check.kind,
            "Interval": "",
            "Timeout": "",
            "ExposedPort": 0,
            "Definition": {},
            "CreateIndex": check.create_index,
            "ModifyIndex": check.modify_index,
        }


_PROXY: Json = {"Mode": "", "MeshGateway": {}, "Expose": {}}

_SERF_HEALTH: Json = {
    "Node": NODE_NAME,
    "CheckID": "serfHealth",
    "Name": "Serf Health Status",
    "Status": "passing",
    "Notes": "",
    "Output": "Agent alive and reachable",
    "ServiceID": "",
    "ServiceName": "",
    "ServiceTags": [],
    "Type": "",
    "Interval": "",
    "Timeout": "",
    "ExposedPort": 0,
    "Definition": {},
    "CreateIndex": BIRTH_INDEX,
    "ModifyIndex": BIRTH_INDEX,
}


def _agent_service(service: Service) -> Json:
    shown: Json = {
        "ID": service.id,
        "Service": service.name,
        "Tags": service.tags,
        "Meta": service.meta,
        "Port": service.port,
        "Address": service.address,
        "TaggedAddresses": service.tagged_addresses,
        "Weights": service.weights,
        "EnableTagOverride": service.enable_tag_override,
    }
    if not service.tagged_addresses:
        del shown["TaggedAddresses"]
    return shown


def _catalog_service(service: Service) -> Json:
    shown = _agent_service(service)
    if not service.port:
        del shown["Port"]
    return {
        **shown,
        "Proxy": _PROXY,
        "Connect": {},
        "PeerName": "",
        "CreateIndex": service.create_index,
        "ModifyIndex": service.modify_index,
    }
