"""ztna.published: what an instance in Consul says of its ports."""

from __future__ import annotations

import pytest

from ztna.catalog import AgentService
from ztna.errors import BadName
from ztna.leases import Port
from ztna.published import port_text, ports_of, published


def instance(ports: str | None = None, *tags: str, port: int = 8080) -> AgentService:
    meta = {} if ports is None else {"ztna-ports": ports}
    return AgentService(
        service="web", instance_id="web-1", address="", port=port, tags=("ztna", *tags), meta=meta
    )


def test_what_is_published_is_read_back() -> None:
    ports = (Port("icmp", 0), Port("tcp", 8080), Port("udp", 53))
    assert ports_of(instance(published(ports))) == ports
    assert port_text(ports[1]) == "tcp:8080"


def test_meta_comes_before_tags_and_tags_before_the_own_port() -> None:
    assert ports_of(instance("udp:53", "ztna-tcp:81")) == (Port("udp", 53),)
    assert ports_of(instance(None, "ztna-tcp:81", "other")) == (Port("tcp", 81),)
    assert ports_of(instance()) == (Port("tcp", 8080),)
    assert ports_of(instance(port=0)) == ()


@pytest.mark.parametrize("ports", ["", "tcp:0", "icmp:1", "tcp:1,tcp:1", "sctp:1"])
def test_ports_that_nobody_can_read_name_the_instance(ports: str) -> None:
    with pytest.raises(BadName, match="'web-1': expected ztna-ports like"):
        ports_of(instance(ports))
