"""What local programs call, in each mode: sockets a port, one listener for all by nftables, or a TUN device as well.

| Mode | TCP | UDP | Pings |
|---|---|---|---|
| listen | a socket each | a socket each | the kernel answers them |
| anyip | redirected to one socket | brought to one socket as it is | the kernel answers them |
| tun | redirected to one socket | by the device | by the device |

What has an override is called at an address that the host has anyway: always a socket each. Where anyip cannot redirect
it has a socket each too, and says so. Which users may is asked of the kernel: by its rules, or socket by socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address

from sidecar.agent.listeners import Accept, Listeners, Receive, VirtualPort, virtual_ports
from sidecar.agent.owners import Owners
from sidecar.agent.places import Places
from sidecar.agent.raw import RawSockets
from sidecar.agent.redirect import REFUSED_WHERE, Redirect
from sidecar.agent.ruleset import table_name
from sidecar.agent.tun import Tun
from sidecar.agent.tunnel import Tunnel
from ztna.config import AgentConfig
from ztna.errors import ZtnaError
from ztna.leases import Lease, Protocol
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.telemetry import logger, refused
from ztna.udp import SockAddr

Warn = Callable[[str, str | None], None]
"""Tells readiness of something by name that is not as it should be, and with None that it is again."""

UIDS_TOLD_MAX = 64
"""Each refused user is logged once; the counter has the rest."""

_ALL: frozenset[Protocol] = frozenset({"tcp", "udp", "icmp"})
_log = logger(__name__)


class Front:
    """Agrees with the leases by `apply`. Made on the running loop."""

    def __init__(
        self, config: AgentConfig, accept: Accept, receive: Receive, warn: Warn, *, tun: Tun | None
    ) -> None:
        """Open what the mode needs. Raises ZtnaError saying what is missing."""
        self._config = config
        self._warn = warn
        self._owners = Owners() if config.allow_uids is not None else None
        self._uids = frozenset(config.allow_uids or ())
        self._told: set[int | None] = set()
        try:
            self._raw: RawSockets | None = RawSockets()
        except PermissionError:
            self._raw = None  # then UDP programs learn of a dead service by their own timeouts
        self.listeners = Listeners(
            accept,
            receive,
            warn,
            write=self._raw.write if self._raw is not None else None,
            may_use=self._may_use if self._owners is not None else None,
        )
        self._redirect = self._make_redirect(accept, receive)
        self._tunnel: Tunnel | None = None
        if tun is not None:
            self._tunnel = Tunnel(tun.write, receive)
            tun.start(self._tunnel.received)

    @property
    def bound(self) -> frozenset[VirtualPort]:
        """The ports that are served."""
        redirected = self._redirect.bound if self._redirect is not None else frozenset()
        tunnelled = self._tunnel.bound if self._tunnel is not None else frozenset()
        return self.listeners.bound | redirected | tunnelled

    @property
    def held(self) -> Mapping[VirtualPort, str]:
        """The ports that could not be had, and why."""
        return self.listeners.held

    def status(self) -> dict[str, object]:
        """Return what `/status` shows."""
        if self._redirect is not None:
            self._redirect.count()
        uids = self._config.allow_uids
        return {
            "listeners": "one" if self._redirect is not None else "each",
            "allow_uids": "all" if uids is None else sorted(uids),
        }

    def apply(self, leases: Mapping[ServiceName, Lease], places: Places) -> None:
        """Serve every leased service where `places` says, and nothing else."""
        if self._redirect is None:
            self.listeners.apply(leases, lambda service, lease: [str(at) for at in places.of(service, lease)])
            return
        overridden = frozenset(places.overrides.values())
        self.listeners.apply(
            leases, lambda service, lease: _at(places, service, lease, overridden.__contains__)
        )
        wanted = [
            port
            for service, lease in leases.items()
            for port in virtual_ports(
                service, lease, _at(places, service, lease, lambda at: at not in overridden), _ALL
            )
        ]
        if self._tunnel is not None:
            self._tunnel.apply(wanted)
        try:
            self._redirect.apply(wanted, places.had)
        except ZtnaError as error:
            _log.error("redirect_failed", detail=error)
            self._warn("redirect", f"programs cannot be led here: {error}; start the agent again")
        else:
            self._warn("redirect", None)  # what was refused before was wanted still, and taken now

    async def run(self) -> None:
        """Try again what could not be had, and count what was refused, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.listeners.run(), name="held ports")
            if self._redirect is not None:
                tasks.create_task(self._redirect.run(), name="refused users")

    def close(self) -> None:
        """Give everything back but the device; what runs breaks."""
        self.listeners.close()
        if self._redirect is not None:
            self._redirect.close()
        if self._raw is not None:
            self._raw.close()
        if self._owners is not None:
            self._owners.close()

    def _make_redirect(self, accept: Accept, receive: Receive) -> Redirect | None:
        mode = self._config.mode
        if mode == "listen":
            return None
        try:
            if mode == "anyip" and self._raw is None:
                raise ZtnaError("UDP takes CAP_NET_RAW")
            return Redirect(
                table_name(self._config.pool),
                accept,
                receive,
                write=self._raw.write if mode == "anyip" and self._raw is not None else None,
                has_ipv6=self._config.ula is not None,
                uids=self._uids if self._owners is not None else None,
            )
        except ZtnaError as error:
            if mode == "tun":
                raise ZtnaError(f"agent.mode: tun needs nftables for TCP: {error}") from None
            self._warn("redirect", f"a socket for each port, as nftables cannot be had: {error}")
            return None

    def _may_use(self, protocol: Protocol, program: SockAddr, called: SockAddr) -> bool:
        uid = self._owners.uid(protocol, program, called) if self._owners is not None else None
        if uid in self._uids:
            return True
        refused(REFUSED_WHERE, Reason.NO_GRANT)
        if uid not in self._told and len(self._told) < UIDS_TOLD_MAX:
            self._told.add(uid)
            _log.info("user_refused", uid=uid, called=f"{called[0]}:{called[1]}", reason=Reason.NO_GRANT)
        return False


def _at(
    places: Places,
    service: ServiceName,
    lease: Lease,
    is_meant: Callable[[IPv4Address | IPv6Address], bool],
) -> list[str]:
    return [str(at) for at in places.of(service, lease) if is_meant(at)]
