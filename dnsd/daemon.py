"""ztna-dnsd put together: watches feed the zone, the server answers from it, and one of all keeps the leases."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from ipaddress import AddressValueError, IPv4Address, IPv4Network, ip_address
from pathlib import Path

import msgspec

from dnsd import local, seen
from dnsd.answer import Options
from dnsd.cookies import SECRET_BYTES
from dnsd.feed import Setup
from dnsd.keeping import Keeping, check_schema
from dnsd.plans import WITHOUT_LEASE, PoolUse, Problem, Rules
from dnsd.pool import Pool
from dnsd.secondaries import Secondaries
from dnsd.server import Server, configured
from dnsd.services import describe_all
from dnsd.serving import Age, aged, renewed
from dnsd.settling import Settled
from dnsd.shelf import Shelf
from dnsd.workers import Workers
from dnsd.zone import RelayHost, Settings, ZoneData, rebuilt
from ztna.config import DnsdConfig, RelayRecordConfig
from ztna.consul.client import ConsulClient
from ztna.consul.watch import CatalogWatch, KvWatch
from ztna.dns_keys import load_keys
from ztna.errors import ConfigError, ConsulUnavailable
from ztna.leases import SERVICE_PREFIX, ULA, ULA_PREFIX_BITS, Table, is_ula, read_table
from ztna.runtime import CONSUL_TOKEN, Daemon, sleep_or_stop
from ztna.telemetry import CONFIRMED, POOL, SERVED, UNLEASED, ZONE_SERVICES, logger

THREAD_SWITCH_SECONDS = 0.0005
"""How soon the thread that writes the names gives way to answering; Python's own is ten times as long."""
SAVE_SECONDS = 5.0
"""How often the names on disk are brought up to date."""
LOOPBACK = IPv4Network("127.0.0.0/8")
TICK_SECONDS = 1.0
REBUILD_COST_FACTOR = 4.0
"""Pause between two rebuilds of the zone: this many times what the last one took, so queries have the rest."""
CONSUL_RETRY_SECONDS = 1.0
PROBLEMS_SHOWN_MAX = 5
NSID_BYTES_MAX = 128
RELOADED = frozenset({"pool", "grace_s", "quarantine_s"})
"""Keys of the section that SIGHUP puts in force."""

_log = logger(__name__)


async def run(daemon: Daemon) -> None:
    """Be ztna-dnsd until told to stop. Raises ZtnaError for what cannot work."""
    config = daemon.config.dnsd
    assert config is not None, "the command line checks that the section is there"
    _check(config)
    sys.setswitchinterval(THREAD_SWITCH_SECONDS)
    daemon.readiness.awaiting("catalog", "the first read of Consul's catalog")
    daemon.readiness.awaiting("leases", "the first read of the leases in Consul's KV")
    keys = load_keys(config.keys, "dnsd.keys")
    secondaries = Secondaries(config.transfer, keys)
    server = configured(config, keys, secondaries.publication)
    options = _options(config)
    workers = None
    if config.workers > 1:
        setup = Setup(config, daemon.config.log, keys, options)
        workers = Workers(config.listen, config.workers, setup, server.adopt, daemon.readiness)
        secondaries.served = workers.follow
    host, port = workers.address if workers else server.listen(config.listen)
    _log.info("listening", address=f"{host}:{port}", zone=daemon.config.domain, pool=_rules(config).pool)
    async with ConsulClient(daemon.config.consul, daemon.readiness.shower(CONSUL_TOKEN)) as client:
        dnsd = _Dnsd(daemon, config, server, workers, secondaries, client, options, host)
        await dnsd.run()


class _Dnsd:
    """The parts of one running dnsd."""

    def __init__(
        self,
        daemon: Daemon,
        config: DnsdConfig,
        server: Server,
        workers: Workers | None,
        secondaries: Secondaries,
        client: ConsulClient,
        options: Options,
        host: str,
    ) -> None:
        """With workers, these answer, and the server transfers zones on the connections that they hand over."""
        self._daemon = daemon
        self._server = server
        self._workers = workers
        self._socket = config.socket
        self._secondaries = secondaries
        self._client = client
        self._catalog = CatalogWatch(client)
        self._leases = KvWatch(client, SERVICE_PREFIX)
        self._table = Table()
        self._changed = asyncio.Event()
        self._stale_max_s = config.stale_max_s
        self._shelf = Shelf(Path(config.snapshot) if config.snapshot else None, daemon.config.domain)
        self._shelved_at = 0.0
        self._unreachable: str | None = None
        self._config = config
        self._keeping = Keeping(
            client,
            self._catalog,
            _rules(config),
            session_ttl_s=config.keeper_session_ttl_s,
            report=self._hear_problems,
        )
        self._keeping.follow(self._leases)
        self._may_keep = config.keeper
        self._problems: tuple[Problem, ...] = ()
        settings = Settings(
            daemon.config.domain,
            config.pool.cidr,
            config.ttl_s,
            config.negative_ttl_s,
            _nameserver(host),
            config.pool.more,
            config.pool.ula,
            _relays(config.relays),
        )
        self._zone = ZoneData(settings, {}, {}, int(time.time()))
        self._options = msgspec.structs.replace(options, bounds=self._zone)
        self._settled = Settled()
        self._show_who_may_ask(config.allow)
        self._renew_answers()
        self._catalog.subscribe(lambda _: self._changed.set())
        self._leases.subscribe(lambda _: self._changed.set())
        daemon.status_sources["dns"] = self._dns_status
        daemon.status_sources["keeper"] = self._keeper_status
        daemon.status_sources["secondaries"] = secondaries.status
        daemon.status_sources["pool"] = self._pool_status
        daemon.status_sources["names"] = lambda: seen.names(self._zone)
        daemon.status_sources["leases"] = lambda: seen.leases(self._keeping.table, time.time())
        daemon.on_reload.append(self._reload)

    async def run(self) -> None:
        """Serve at once, and from Consul as soon as it can be read, until the daemon is to stop."""
        self._unshelve()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._server.run(), name="dns-server"),
                group.create_task(self._tick(), name="tick"),
                group.create_task(self._secondaries.run(self._serve), name="secondaries"),
            ]
            if self._socket is not None:
                tasks.append(group.create_task(local.run(Path(self._socket), self._server), name="dns-local"))
            if self._workers is not None:
                tasks.append(group.create_task(self._workers.run(), name="workers"))
            if await self._schema_is_known():
                tasks += [
                    group.create_task(self._catalog.run(), name="catalog-watch"),
                    group.create_task(self._leases.run(), name="lease-watch"),
                    group.create_task(self._follow_changes(), name="zone"),
                    group.create_task(self._save(), name="save"),
                ]
                if self._may_keep:
                    tasks.append(group.create_task(self._keeping.run(), name="keeper"))
            await self._daemon.stopping.wait()
            for task in tasks:
                task.cancel()
        await self._shelve()

    def _unshelve(self) -> None:
        """Answer from the names of the last run, as stale ones, until Consul has been read."""
        snapshot = self._shelf.read(time.time())
        if snapshot is None:
            return
        # Not below what secondaries may have seen since the file was written: serials follow the time.
        serial = max(snapshot.serial, self._zone.serial)
        self._zone = ZoneData(self._zone.settings, snapshot.services, snapshot.leases, serial)
        self._shelved_at = snapshot.confirmed_at
        _log.info("names_from_disk", services=len(snapshot.services), confirmed_at=int(snapshot.confirmed_at))
        self._renew_answers()
        if self._is_served:
            self._daemon.readiness.done("catalog")
            self._daemon.readiness.done("leases")

    def _reload(self) -> None:
        """Go on with the pool, grace and quarantine of the configuration as it is now; say what else changed.

        Raises ConfigError, and keeps what it had, when that cannot be used.
        """
        if self._daemon.reread is None:
            return
        config = self._daemon.reread().dnsd
        if config is None:
            raise ConfigError("dnsd: the configuration has no such section any more")
        _check(config)
        kept = [
            name
            for name in DnsdConfig.__struct_fields__
            if name not in RELOADED and getattr(config, name) != getattr(self._config, name)
        ]
        self._warn(
            "reload", f"only a restart changes {', '.join(f'dnsd.{name}' for name in kept)}" if kept else None
        )
        rules = _rules(config)
        _log.info("reloaded", pool=rules.pool, grace_s=rules.grace_s, quarantine_s=rules.quarantine_s)
        self._keeping.change_rules(rules)
        settings = self._zone.settings
        changed = msgspec.structs.replace(
            settings, pool=config.pool.cidr, more=config.pool.more, ula=config.pool.ula
        )
        if changed != settings:
            zone = self._zone
            serial = max(zone.serial + 1, int(time.time())) & 0xFFFFFFFF
            self._zone = ZoneData(changed, zone.services, zone.leases, serial, zone.fresh_at)
            self._options = msgspec.structs.replace(self._options, bounds=self._zone)
            self._renew_answers()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self._shelve()

    async def _shelve(self) -> None:
        """Keep what Consul said on disk."""
        if self._is_live and self._server.answers.zone is not None:
            await self._shelf.keep(self._zone, self._confirmed_at)

    async def _schema_is_known(self) -> bool:
        """Wait for Consul and check what its KV holds; False when told to stop meanwhile."""
        while True:
            try:
                await check_schema(self._client)
            except ConsulUnavailable as error:
                if self._server.answers.zone is None:
                    self._daemon.readiness.awaiting("catalog", f"Consul: {error}")
                self._unreachable = str(error)
                if await sleep_or_stop(self._daemon, CONSUL_RETRY_SECONDS):
                    return False
            else:
                self._unreachable = None
                return True

    async def _follow_changes(self) -> None:
        """Rebuild the zone whenever the catalog or the leases changed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            started = time.monotonic()
            self._rebuild()
            await asyncio.sleep(REBUILD_COST_FACTOR * (time.monotonic() - started))

    def _rebuild(self) -> None:
        catalog, leases = self._catalog.latest, self._leases.latest
        if catalog is not None:
            self._daemon.readiness.done("catalog")
        if leases is not None:
            self._daemon.readiness.done("leases")
        if catalog is None or leases is None:
            return
        self._table = read_table(leases.pairs, self._table)
        zone = rebuilt(
            self._zone,
            describe_all(catalog.services, self._zone.services),
            {name: stored.record for name, stored in self._table.leases.items()},
            time.time(),
        )
        if zone is not self._zone or self._server.answers.zone is None:
            self._zone = zone
            self._renew_answers()

    async def _tick(self) -> None:
        """Let the answers age, and show what stands in the way."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            age = self._age
            CONFIRMED.set(age.confirmed_at)
            ZONE_SERVICES.set(len(self._zone.services))
            if aged(self._server.answers, age, time.time()):
                self._renew_answers()
            elif self._workers is not None:
                self._workers.show(self._zone, age)
            self._server.count()
            if self._secondaries.is_due(self._confirmed_at):
                self._serve(self._secondaries.freshened(self._confirmed_at))
            self._show_warnings()

    def _serve(self, zone: ZoneData) -> None:
        self._zone = zone
        self._renew_answers()

    def _renew_answers(self) -> None:
        """Answer from the zone as it is now; what did not change keeps its ready answers."""
        age, now = self._age, time.time()
        if age.is_served(now):
            self._zone = self._secondaries.numbered(self._zone, age.confirmed_at)
        else:
            self._secondaries.withdraw()
        answers = renewed(self._server.answers, self._zone, age, self._options, now)
        self._server.answers = answers
        if self._workers is not None:
            self._workers.show(self._zone, age)
        self._settled.grow(len(self._zone.services))
        SERVED.set((1 if answers.is_stale else 2) if answers.zone else 0)

    @property
    def _age(self) -> Age:
        return Age(self._confirmed_at, self._is_live, self._stale_max_s)

    @property
    def _confirmed_at(self) -> float:
        """When Consul last confirmed both the services and the leases, Unix seconds; 0: never."""
        catalog, leases = self._catalog.latest, self._leases.latest
        return min(catalog.confirmed_at, leases.confirmed_at) if catalog and leases else self._shelved_at

    @property
    def _is_live(self) -> bool:
        """Whether Consul has been read in this run."""
        return self._catalog.latest is not None and self._leases.latest is not None

    @property
    def _is_stale(self) -> bool:
        return self._age.is_stale(time.time())

    @property
    def _is_served(self) -> bool:
        return self._age.is_served(time.time())

    def _show_warnings(self) -> None:
        problem = self._catalog.problem or self._leases.problem
        self._warn("consul", str(problem) if problem else self._unreachable)
        self._warn("names", self._age_told())
        self._warn("snapshot", self._shelf.trouble)
        self._warn("keeper", self._keeping.trouble)
        self._show_pool(self._keeping.pool)
        shown = [f"{each.service}: {each.what}" for each in self._problems[:PROBLEMS_SHOWN_MAX]]
        more = len(self._problems) - len(shown)
        self._warn("services", "; ".join(shown) + (f"; and {more} more" if more else "") if shown else None)

    def _show_pool(self, use: PoolUse | None) -> None:
        POOL.clear()
        for state, count in self._pool_status().items():
            if state != "size":
                POOL.labels(state).set(count)
        told = None
        if use is not None and use.is_scarce:
            told = (
                f"{use.leased + use.resting} of {use.size} addresses are in use ({use.resting} of them rest): "
                "enlarge dnsd.pool and reload"
            )
        self._warn("pool", told)

    def _pool_status(self) -> Mapping[str, int]:
        """Return how many addresses are in which state; nothing while another is the keeper."""
        use = self._keeping.pool
        if use is None:
            return {}
        free = use.size - use.leased - use.resting
        return {"size": use.size, "leased": use.leased, "resting": use.resting, "free": free}

    def _show_who_may_ask(self, allow: Sequence[IPv4Network]) -> None:
        wide = [str(network) for network in allow if not network.subnet_of(LOOPBACK)]
        if wide:
            self._warn("allow", f"who is in {', '.join(wide)} may ask, and learn every service's name")

    def _age_told(self) -> str | None:
        """Say how old the names are when that is more than they should be."""
        if not self._confirmed_at or not self._is_stale:
            return None
        age = f"last confirmed by Consul {time.time() - self._confirmed_at:.0f} s ago"
        if self._is_served:
            return f"{age}: served as stale"
        return f"{age}: not served any more (dnsd.stale_max_s)"

    def _warn(self, name: str, detail: str | None) -> None:
        if detail is None:
            self._daemon.readiness.unwarn(name)
        else:
            self._daemon.readiness.warn(name, detail)

    def _hear_problems(self, problems: tuple[Problem, ...]) -> None:
        """Log each problem once while it lasts."""
        for problem in sorted(set(problems) - set(self._problems)):
            _log.warning(problem.kind, service=problem.service, error=problem.what)
        self._problems = problems
        UNLEASED.set(sum(1 for problem in problems if problem.kind in WITHOUT_LEASE))

    def _dns_status(self) -> Mapping[str, object]:
        own = self._server.status
        return {
            **(self._workers.status(own) if self._workers else own),
            "zone": self._zone.settings.domain,
            "serial": self._zone.serial,
            "services": len(self._zone.services),
            "leases": len(self._zone.leases),
            "unreadable": dict(self._table.unreadable),
            "confirmed_at": self._confirmed_at,
            "stale": self._server.answers.is_stale,
        }

    def _keeper_status(self) -> Mapping[str, object]:
        return {
            "elected": self._keeping.session is not None,
            "trouble": self._keeping.trouble,
            "problems": {problem.service: problem.what for problem in self._problems},
        }


def _options(config: DnsdConfig) -> Options:
    return Options(
        version=f"ztna-dnsd {version('ztna-mesh')}".encode() if config.version_bind else b"",
        nsid=(config.nsid or "").encode(),
        secret=secrets.token_bytes(SECRET_BYTES),
        forwards=bool(config.upstreams),
    )


def _rules(config: DnsdConfig) -> Rules:
    pool = Pool(config.pool.cidr, config.pool.reserved, config.pool.more)
    return Rules(pool, config.grace_s, config.quarantine_s)


def _check(config: DnsdConfig) -> None:
    """Refuse settings that contradict each other."""
    networks = (config.pool.cidr, *config.pool.more)
    for first, second in itertools.combinations(networks, 2):
        if first.overlaps(second):
            raise ConfigError(f"dnsd.pool: {first} and {second} overlap; name each address once")
    if config.quarantine_s <= config.ttl_s:
        raise ConfigError(
            f"dnsd.quarantine_s: expected more than dnsd.ttl_s ({config.ttl_s}), got {config.quarantine_s:g}: "
            "a freed address must rest for longer than anybody remembers whose it was"
        )
    ula = config.pool.ula
    if ula is not None and not is_ula(ula):
        raise ConfigError(f"dnsd.pool.ula: expected a /{ULA_PREFIX_BITS} in {ULA} (RFC 4193), got {ula}")
    if len((config.nsid or "").encode()) > NSID_BYTES_MAX:
        raise ConfigError(f"dnsd.nsid: expected at most {NSID_BYTES_MAX} bytes")
    for upstream in config.upstreams:
        try:
            ip_address(upstream.host)
        except ValueError:
            raise ConfigError(f"dnsd.upstreams: expected numeric addresses, got {upstream.host!r}") from None
        if upstream == config.listen:
            raise ConfigError(f"dnsd.upstreams: {upstream} is where dnsd itself listens")


def _relays(configured: Sequence[RelayRecordConfig]) -> tuple[RelayHost, ...]:
    try:
        return tuple(
            RelayHost(each.name, IPv4Address(each.address.ip), each.address.port) for each in configured
        )
    except ValueError as error:
        raise ConfigError(f"dnsd.relays: expected IPv4 addresses: {error}") from None


def _nameserver(host: str) -> IPv4Address | None:
    """Return the address for the zone's own `ns` name, when the one we listen on is one."""
    try:
        address = IPv4Address(host)
    except AddressValueError:
        return None
    return None if address.is_unspecified else address
