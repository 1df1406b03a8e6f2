"""What the mesh keeps in Consul: keys and values, sessions, an instance as a connector registers it, policies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address

import msgspec

from sidecar.agent.ranges import SESSION_SECONDS
from sidecar.connector.registrar import Desired, Registrant, registration
from sidecar.connector.routes import RouteTable
from tests.reference import markdown
from ztna.catalog import MESH_TAG
from ztna.config import ConnectorConfig, DnsdConfig, RouteConfig
from ztna.conflicts import CONFLICT_PREFIX, Report
from ztna.consul.client import _registration
from ztna.jsontypes import to_json
from ztna.leases import (
    ADDRESS_PREFIX,
    KEEPER_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    SERVICE_PREFIX,
    WISH_PREFIX,
    Holding,
    Lease,
    Port,
    Wish,
)
from ztna.names import ConnectorId, ServiceName
from ztna.published import META_CONNECTOR, META_FRONTED_BY, META_PORTS, META_VIRTUAL_IP, META_WILDCARD
from ztna.sections import Endpoint
from ztna.wire.control import Address

EPOCH = 1_796_045_272_108
LEASED_AT = 1_796_045_272.1
VALUES: tuple[tuple[str, msgspec.Struct, str], ...] = (
    (f"{SERVICE_PREFIX}<service>", Lease(IPv4Address("10.100.0.2"), EPOCH, (Port("tcp", 80),)), "keeper"),
    (f"{ADDRESS_PREFIX}<address>", Holding("web-app", EPOCH, "leased", leased_at=LEASED_AT), "keeper"),
    (
        f"{WISH_PREFIX}<service>",
        Wish("pin", "9f0c", IPv4Address("10.100.0.80"), asked_by="ops@host-7", asked_at=LEASED_AT),
        "`ztna leases`; the keeper puts its answer in",
    ),
    (
        f"{CONFLICT_PREFIX}<agent>",
        Report("10.100.0.0/16", "route 10.100.4.0/24 dev tun7", seen_at=LEASED_AT),
        "that agent, under a session of its own",
    ),
)
META = (
    (META_CONNECTOR, "the connector's id; relays route only to instances that have it"),
    (
        META_PORTS,
        "what it publishes, as `tcp:80,udp:53`; without it tags `ztna-tcp:80` count, then the own port",
    ),
    (
        META_FRONTED_BY,
        "of an instance that others registered: the id of the one connector that is to front it",
    ),
    (META_VIRTUAL_IP, "the virtual address it asks for (`virtual_ip` of a route)"),
    (META_WILDCARD, "`true`: every name under the service's leads to it (`wildcard` of a route)"),
)
INTRODUCTION = """Consul is the only shared state. [Consul](../consul.md) says what becomes of it and why,
[backup](../backup.md) how to keep it. The relay is not here: it has no token and never talks to Consul."""


def page() -> str:
    """Return the page."""
    return markdown.page(
        "What is kept in Consul",
        "the code that writes it",
        INTRODUCTION,
        *_kept(),
        *_instance(),
        *_policies(),
    )


def _kept() -> Iterator[str]:
    yield "## Keys"
    rows = [
        (markdown.code(key), who, markdown.sentence(type(value).__doc__).partition("`: ")[2])
        for key, value, who in VALUES
    ]
    rows += [
        (
            markdown.code(KEEPER_KEY),
            "whoever wants to be keeper",
            "the lock of the one dnsd that writes leases; its value is a heartbeat",
        ),
        (
            markdown.code(SCHEMA_KEY),
            "keeper",
            f"`{SCHEMA_VERSION}`; a daemon that finds a newer one refuses it",
        ),
    ]
    yield markdown.table(("Key", "Written by", "Holds"), rows)
    yield "Values, one of each (times are Unix seconds):"
    yield "```json\n" + "\n".join(to_json(value).decode() for _, value, _ in VALUES) + "\n```"
    yield "## Sessions"
    sessions = (
        (
            "`ztna-keeper`",
            f"{DnsdConfig().keeper_session_ttl_s:g} s (`dnsd.keeper_session_ttl_s`)",
            "release",
            markdown.code(KEEPER_KEY),
        ),
        ("`ztna-conflict`", f"{SESSION_SECONDS:g} s", "delete", f"`{CONFLICT_PREFIX}<agent>`"),
    )
    yield markdown.table(("Name", "TTL", "Behaviour", "Holds"), sessions)


def _instance() -> Iterator[str]:
    yield "## Instances"
    yield f"An instance belongs to the mesh by its tag `{MESH_TAG}`, whoever registered it. Its Meta:"
    yield markdown.table(("Meta", "Means"), [(markdown.code(key), meaning) for key, meaning in META])
    yield "One as a connector `rack-7` registers it, with its lease:"
    route = RouteConfig(service=ServiceName("web-app"), backend=Endpoint("127.0.0.1", 8080), port=80)
    defaults = {field.name: field.default for field in msgspec.structs.fields(ConnectorConfig)}
    registrant = Registrant(
        ConnectorId("rack-7"),
        Address("192.0.2.10", 4435),
        defaults["ttl_s"],
        defaults["deregister_critical_after_s"],
    )
    lease = Lease(IPv4Address("10.100.0.2"), EPOCH, (Port("tcp", 80),))
    desired = Desired(RouteTable([route]).services[ServiceName("web-app")], 1, "passing", 0.0, "", lease)
    yield f"```json\n{json.dumps(_registration(registration(desired, registrant)), indent=2)}\n```"
    yield "Checks of `runner: consul` stand beside that TTL check."


def _policies() -> Iterator[str]:
    yield "## Policies"
    yield "The smallest ACL policy of each daemon; the tests run with exactly these and `default_policy = deny`."
    for path in sorted((markdown.ROOT / "docs/policies").glob("*.hcl")):
        yield f"### {path.name}"
        yield f"```hcl\n{path.read_text().strip()}\n```"
