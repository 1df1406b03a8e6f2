"""At which addresses of this host a leased service is served: its lease, the IPv6 address beside it, an override.

Pure. Which networks the host lets the agent have is sidecar.agent.ranges'; listening there is
sidecar.agent.listeners'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from ztna.conflicts import AnyNetwork
from ztna.leases import Lease, beside


@dataclass(frozen=True)
class Places:
    """The networks that the agent has now, and the overrides that hold."""

    had: frozenset[AnyNetwork]
    overrides: Mapping[str, IPv4Address]

    def of(self, service: str, lease: Lease) -> tuple[IPv4Address | IPv6Address, ...]:
        """Return where a service is served, nowhere when its address is in no network that the agent has."""
        override = self.overrides.get(service)
        if override is not None:
            return (override,)
        if not self.has(lease.ip):
            return ()
        besides = [beside(network, lease.ip) for network in self.had if isinstance(network, IPv6Network)]
        return (lease.ip, *besides)

    def has(self, address: IPv4Address | IPv6Address) -> bool:
        """Say whether an address may be bound and given to programs: it is in a network that the agent has."""
        return address in self.overrides.values() or any(
            network.version == address.version and address in network for network in self.had
        )
