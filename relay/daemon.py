"""ztna-relay put together: QUIC and TLS connections in, relay.sessions' commands out, SRV records and the forwarder.

Decides nothing about who may do what: relay.admission, relay.policy and relay.sessions do.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, assert_never

from relay import looking_in, v1_peers
from relay.admission import Doorkeeper
from relay.asking import Names
from relay.audit import AuditLog
from relay.commands import (
    AddLink,
    AdmitAgent,
    AdmitConnector,
    AskDns,
    Command,
    ConnectionKey,
    EndSession,
    Event,
    Refusal,
    RemoveLink,
    Send,
    SendHealth,
    Told,
)
from relay.dialled import Owner
from relay.forwarder import Forwarder
from relay.kernel import local_address_towards
from relay.notified import Notified
from relay.peers import WHERE, ControlPeer
from relay.policy import SrvTable
from relay.reporting import Reports
from relay.sessions import Sessions
from relay.splicer import Splicer
from relay.srv import SrvPuller
from relay.startup import (
    advertised,
    check_name,
    check_resolvers,
    control_sockets,
    forwarder_sockets,
    link_limits,
    load_credentials,
    reset_key,
    rules,
)
from relay.tls_door import TlsDoor
from ztna import quic
from ztna.config import RelayConfig
from ztna.credentials import Credentials
from ztna.dns_keys import load_key
from ztna.errors import BadName, ZtnaError
from ztna.identity import Identity
from ztna.jsontypes import Binary
from ztna.names import ServiceName, SessionId, Zone
from ztna.reasons import Reason
from ztna.renewal import Renewal
from ztna.resolver import Resolver
from ztna.runtime import Daemon, sleep_or_stop
from ztna.telemetry import logger, refused
from ztna.tls_control import TlsConnection
from ztna.tsig import Key
from ztna.udp import SockAddr
from ztna.wire import control
from ztna.wire.control import Address

ALPN = "ztna-v2"
ALPNS = (ALPN, v1_peers.ALPN)
"""What is spoken here; who can speak both is better off with the first."""
UDP_PAYLOAD_BYTES = 1200
UDP_PAYLOAD_PROBED_BYTES = 1350
PING_SECONDS = 10.0
RESOLVER_SECONDS = 3.0
TICK_SECONDS = 1.0
GATHER_SECONDS = 0.1
"""How long news of services' health wait for more: what an agent is told at once shares packets."""
GONE_SECONDS = 5.0
"""A connector pings each 3 s: so much silence ends its sessions as `peer_gone`, long before the idle timeout."""

Peer = ControlPeer | v1_peers.AgentPeer
AnyPeer = TypeVar("AnyPeer", ControlPeer, v1_peers.AgentPeer)

_log = logger(__name__)


async def run(daemon: Daemon) -> None:
    """Be ztna-relay until told to stop, then drain. Raises ZtnaError for what cannot work."""
    config = daemon.config.relay
    assert config is not None, "the command line checks that the section is there"
    daemon.readiness.awaiting("dns", "the first confirmed answer of a DNS server")
    check_resolvers(config, daemon.readiness)
    credentials = load_credentials(config)
    relay = Relay(config, daemon.config.domain, credentials)
    try:
        daemon.status_sources.update(looking_in.sources(relay))
        renewal = Renewal(
            config.tls,
            credentials,
            daemon.readiness,
            check=lambda renewed: check_name(config, renewed),
            accept=relay.server.use_credentials,
        )
        daemon.on_reload.append(renewal.reload)
        daemon.actions["close-session"] = relay.close_session
        if relay.reports.audit is not None:
            daemon.on_reload.append(relay.reports.audit.reopen)
        daemon.status_sources["certificate"] = renewal.status
        daemon.tasks.create_task(renewal.run(), name="certificates")
        daemon.tasks.create_task(relay.run(), name="relay")
        await _watch_readiness(daemon, relay)
        await relay.drain(config.drain_s)
    finally:
        relay.close()


async def _watch_readiness(daemon: Daemon, relay: Relay) -> None:
    while not await sleep_or_stop(daemon, TICK_SECONDS / 4):
        if relay.puller.failing:
            daemon.readiness.warn("dns", relay.puller.failing)
        elif relay.puller.fresh_at is not None:
            daemon.readiness.unwarn("dns")
            daemon.readiness.done("dns")
        audit = relay.reports.audit
        if audit is not None and audit.problem:
            daemon.readiness.warn("audit", audit.problem)
        else:
            daemon.readiness.unwarn("audit")
        if relay.forwarder.problem:
            daemon.readiness.warn("forwarding", f"in user space: {relay.forwarder.problem}")


class Relay:
    """The parts of one running relay; sockets are bound when it exists."""

    def __init__(self, config: RelayConfig, zone: Zone, credentials: Credentials) -> None:
        """Bind everything. Raises ZtnaError naming what cannot be had."""
        self.config = config
        self._advertised = advertised(config)
        self._doorkeeper = Doorkeeper()
        self._sessions = Sessions(rules(config), os.urandom, version("ztna-mesh"))
        self.reports = Reports(AuditLog(Path(config.audit_log)) if config.audit_log else None)
        self._peers: dict[ConnectionKey, Peer] = {}
        self._legs = v1_peers.Legs(self._sessions, self._peers)
        self._next_key = 0
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Handle | None = None
        self._is_closing = False
        self._idle = asyncio.Event()
        """Set once it drains and no session is left."""
        self._loop = asyncio.get_running_loop()
        settings = quic.Settings(
            alpn=ALPNS,
            udp_payload=UDP_PAYLOAD_BYTES,
            udp_payload_probe=UDP_PAYLOAD_PROBED_BYTES,
            ping_interval_s=PING_SECONDS,
            retry=config.retry,
            half_open_max=config.half_open_max,
            half_open_per_source=config.half_open_per_source,
            reset_key=reset_key(config.reset_key_file, credentials),
            where=WHERE,
        )
        key = load_key(config.dns_key, "relay.dns_key") if config.dns_key else None
        resolver = Resolver(config.resolvers, RESOLVER_SECONDS, key)
        self.names = Names(resolver, zone)
        self.puller = SrvPuller(resolver, zone, config.srv_hold_s, self._table_changed)
        self._socket, control_listener = control_sockets(config.listen, self._packets_received)
        self.notified: Notified | None = None
        try:
            self.notified = self._hear_changes(zone, key)
            listener, raw = forwarder_sockets(config.forwarder, shared=config.forwarder_workers > 1)
        except ZtnaError:
            self._close_sockets()
            control_listener.close()
            raise
        self.door = TlsDoor(
            lambda: self.server.credentials,
            half_open_max=config.half_open_max,
            half_open_per_source=config.half_open_per_source,
            admit=self._admit,
            factory=self._established_tls,
        )
        self.forwarder = Forwarder(raw, link_limits(config), config.forwarding, config.forwarder_workers)
        # TLS and dials may come to either port: whichever a firewall leaves open is enough.
        self.splicer = Splicer(
            listener,
            self._agent_waiting,
            link_limits(config),
            self.forwarder.charge,
            others=(control_listener,),
            on_tls=self.door.take,
        )
        self.server = quic.Server(
            self._socket, credentials, settings, admit=self._admit, factory=self._established
        )
        self._measures = looking_in.Measures(self)
        _log.info(
            "listening",
            relay=config.name,
            control="{}:{}".format(*self.address),
            forwarder="{}:{}".format(*self.forwarder.address),
        )

    def _hear_changes(self, zone: Zone, key: Key | None) -> Notified | None:
        listen = self.config.notify_listen
        if listen is None:
            return None
        sources = [resolver.host for resolver in self.config.resolvers]
        return Notified(listen, zone, sources, key, self.puller.ask_all_soon)

    def _close_sockets(self) -> None:
        self._socket.close()
        if self.notified is not None:
            self.notified.close()

    @property
    def address(self) -> SockAddr:
        """Where agents and connectors connect."""
        return self._socket.address

    @property
    def sessions(self) -> Sessions:
        """The sessions, to be read only."""
        return self._sessions

    @property
    def peers(self) -> Mapping[ConnectionKey, Peer]:
        """The live connections, to be read only."""
        return self._peers

    @property
    def draining(self) -> bool:
        """Whether it lets nobody new in."""
        return self._doorkeeper.draining

    async def run(self) -> None:
        """Pull SRV records and mind the time until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.puller.run(), name="srv")
            tasks.create_task(self.door.run(), name="tls")
            tasks.create_task(self.names.run(), name="names")
            while True:
                await asyncio.sleep(TICK_SECONDS)
                self._mind_silence()
                self._mind_crls()
                self._tick()
                self._measure()

    async def drain(self, deadline_s: float) -> None:
        """Let nobody new in, tell all, wait for the sessions to end at most `deadline_s`, then close.

        Of sessions that are left then nobody is told: their flows are detached, and go on over another relay.
        """
        self._doorkeeper.draining = True
        self.carry_out(self._sessions.drain(deadline_s, self.config.others))
        _log.info("draining", sessions=len(self._sessions.sessions), deadline_s=deadline_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        self._is_closing = True
        self.carry_out(self._sessions.abandon(time.monotonic()))
        await self.server.close_all(quic.CLOSE_OK, quic.SHUTTING_DOWN)
        await self.door.close_all(quic.CLOSE_OK, quic.SHUTTING_DOWN)

    def close(self) -> None:
        """Close every socket; harmless twice."""
        for handle in (self._timer, self._telling):
            if handle is not None:
                handle.cancel()
        self.server.close()
        self.door.close(quic.CLOSE_OK, quic.SHUTTING_DOWN)
        self._close_sockets()
        self.forwarder.close()
        self.splicer.close()
        self.reports.close()

    def carry_out(self, commands: Iterable[Command]) -> None:
        """Do what relay.sessions decided, in order."""
        for command in commands:
            self._do(command)
        self._arm()
        if self._sessions.has_news and self._telling is None:
            self._telling = self._loop.call_later(GATHER_SECONDS, self._tell_health)
        if self._doorkeeper.draining and not self._sessions.sessions:
            self._idle.set()

    # What comes in.

    def _packets_received(self, packets: list[tuple[bytes, SockAddr]]) -> None:
        self.server.packets_received(packets)

    def _admit(self, identity: Identity, alpn: str) -> None:
        self._doorkeeper.admit(identity)

    def _established(self, connection: quic.Connection) -> Peer:
        if connection.alpn == v1_peers.ALPN:
            return self._enter(v1_peers.AgentPeer(self, self._legs, self._new_key(), connection))
        return self._enter(ControlPeer(self, self._new_key(), connection))

    def _established_tls(self, connection: TlsConnection) -> ControlPeer:
        return self._enter(ControlPeer(self, self._new_key(), connection))

    def _new_key(self) -> ConnectionKey:
        self._next_key += 1
        return self._next_key

    def _enter(self, peer: AnyPeer) -> AnyPeer:
        """Take a connection in, alike whatever it is spoken over."""
        connection = peer.connection
        self._peers[peer.key] = peer
        identity = connection.identity
        self._doorkeeper.entered(identity)
        try:
            forwarder = self._forwarder_for(connection)
        except OSError:
            # No descriptor left, or no way back: this peer goes, and the others of the batch are served.
            forwarder = Address(*self.forwarder.address)
            peer.disconnect(Reason.LIMIT_REACHED)
        datagrams = isinstance(connection, quic.Connection)
        self.carry_out(self._sessions.connected(peer.key, identity, forwarder, datagrams=datagrams))
        peer.begin()
        return peer

    def _forwarder_for(self, connection: quic.Connection | TlsConnection) -> Address | None:
        """Return the forwarder's address as this peer reaches it, None for v1. Raises OSError."""
        if connection.alpn == v1_peers.ALPN:
            return None
        if self._advertised is not None:
            return self._advertised
        return Address(local_address_towards(connection.peer_address[0]), self.forwarder.address[1])

    def message_received(self, peer: Peer, message: control.AnyMessage) -> None:
        """Take a whole message of a connection. Raises ProtocolError."""
        self.carry_out(self._sessions.message(peer.key, message, time.monotonic()))
        if isinstance(message, control.Register):
            self._ask_about({offering.name for offering in message.services}, peer)
            if message.withdrawn:
                self.puller.watch(self._sessions.looked_up)

    def _ask_about(self, named: set[ServiceName], peer: Peer) -> None:
        """Have DNS asked for what a peer has registered, and never for what it only named."""
        registrant = self._sessions.peers.get(peer.key)
        if registrant is None or registrant.connector_id is None:
            return
        served = named & registrant.services
        if served:
            self.puller.watch(self._sessions.looked_up)
            for service in served:
                self.puller.expect(service, registrant.connector_id)

    def datagram_received(self, peer: ControlPeer, data: bytes) -> None:
        """Take a packet that a connector sends to a v1 agent."""
        self._legs.to_agent(peer.key, data)

    def refusal(self, refusal: Refusal) -> None:
        """Tell what a v1 agent was refused."""
        self._refused(refusal)

    def connection_closed(self, peer: Peer, reason: Reason) -> None:
        """Hear that a connection is over."""
        if self._is_closing:
            del self._peers[peer.key]
            return
        self._doorkeeper.left(peer.connection.identity)
        served = bool(self._sessions.peers[peer.key].services)
        self.carry_out(self._sessions.disconnected(peer.key, reason, time.monotonic()))
        del self._peers[peer.key]
        if served:
            self.puller.watch(self._sessions.looked_up)

    def _agent_waiting(self, session: SessionId, waiter: int) -> None:
        self.carry_out(self._sessions.agent_waiting(session, waiter))

    def _table_changed(self, table: SrvTable) -> None:
        self.carry_out(self._sessions.policy_changed(table, time.monotonic()))

    # Time.

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.carry_out(self._sessions.tick(time.monotonic()))

    def _arm(self) -> None:
        """Have `tick` called when the next offer runs out; the offers' order never changes."""
        at = self._sessions.next_timer()
        if at is not None and self._timer is None:
            self._timer = self._loop.call_later(max(0.0, at - time.monotonic()), self._tick)

    def _tell_health(self) -> None:
        """Tell agents of services' health; what is too much for one turn in further ones, with others between."""
        self._telling = None
        commands = self._sessions.tell(time.monotonic())
        if self._sessions.has_news:
            self._telling = self._loop.call_soon(self._tell_health)
        self.carry_out(commands)

    def _mind_silence(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            silent = now - peer.connection.heard_at >= GONE_SECONDS
            self.carry_out(self._sessions.silence(peer.key, silent, peer.connection.heard_at, now))

    def _mind_crls(self) -> None:
        """Have no session begin for or with those of whom CRLs do not tell whether they were revoked."""
        verdicts = self.server.credentials.verdicts
        unvouched: list[ConnectionKey] = []
        if verdicts.goes_by_crls:
            peers = self._peers.items()
            unvouched = [key for key, peer in peers if verdicts.unknown(peer.connection.identity)]
        self._sessions.unvouched(unvouched)

    # What goes out.

    def _do(self, command: Command) -> None:
        match command:
            case Send(to, message):
                self._send(to, message)
            case SendHealth(to, news):
                peer = self._peers.get(to)
                if isinstance(peer, ControlPeer):
                    peer.send_all(news)
            case AskDns(by, query, in_pace):
                self._ask_dns(by, query, in_pace)
            case AddLink(link, agent, connector, peers):
                self.forwarder.add_link(
                    link, (agent.bind_id, agent.secret), (connector.bind_id, connector.secret), peers
                )
            case RemoveLink(link):
                self.forwarder.remove_link(link)
                self.splicer.end_link(link)
            case AdmitAgent(to, message, agent, link):
                if self.splicer.admit_agent(message.session, message.token, Owner(agent, link)):
                    self._send(to, message)
                else:
                    refused(WHERE, Reason.LIMIT_REACHED)
            case AdmitConnector(to, waiter, message):
                if self.splicer.admit_connector(message.session, waiter, message.token):
                    self._send(to, message)
            case EndSession(session):
                self.splicer.end_session(session)
            case _:
                self._tell(command)

    def _ask_dns(self, by: ConnectionKey, query: control.DnsQuery, in_pace: bool) -> None:
        """Answer an agent's question about names, if the connection still stands by then. Raises ProtocolError."""

        def tell(response: bytes) -> None:
            self._send(by, control.DnsResponse(query.request, Binary(response)))

        self.names.ask(by, self._peers[by].connection.identity, query.message, tell, in_pace=in_pace)

    def _send(self, to: ConnectionKey, message: control.AnyMessage) -> None:
        peer = self._peers.get(to)
        if peer is not None:
            peer.send(message)

    # What is told.

    def close_session(self, session: str) -> bool:
        """End a session for an operator; False when there is no such session."""
        try:
            commands = self._sessions.close(SessionId(session), time.monotonic())
        except BadName:
            return False
        self.carry_out(commands)
        return bool(commands)

    def _measure(self) -> None:
        self.reports.tick(time.monotonic())
        self.server.tell_left_out()
        self._measures.take()

    def _tell(self, command: Refusal | Told | Event) -> None:
        match command:
            case Refusal():
                self._refused(command)
            case Told():
                self._told(command)
            case Event():
                self.reports.event(command, time.monotonic())
            case _:
                assert_never(command)

    def _told(self, told: Told) -> None:
        more: dict[str, object] = {"agent_address": self._address_of(told.link[0])}
        if told.event == "session_closed":
            more |= looking_in.carried(self, told.session, told.link, told.path, told.v1_bytes)
        self.reports.session(told, more, time.monotonic())

    def _refused(self, refusal: Refusal) -> None:
        more: dict[str, object] = {"agent_address": self._address_of(refusal.by)}
        self.reports.refusal(refusal, more, time.monotonic())

    def _address_of(self, key: ConnectionKey) -> str:
        peer = self._peers.get(key)
        return "{}:{}".format(*peer.connection.peer_address) if peer is not None else ""
