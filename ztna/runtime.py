"""What every daemon has in common: loop, signals, limits, readiness, the admin pages and the exit status.

A daemon is one coroutine `body(daemon)`. It declares what it awaits before its first `await`, owns its
tasks through `daemon.tasks`, and returns when `daemon.stopping` is set and it has drained. Knows nothing
of what a daemon does.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click
import uvloop

from ztna import config as configuration
from ztna import log_lines, telemetry
from ztna.admin import serving
from ztna.config import Config, Endpoint
from ztna.errors import ConfigError, ZtnaError
from ztna.listening import endpoint_text
from ztna.sd_notify import ServiceManager

CONSUL_TOKEN = "consul_token"  # noqa: S105 - no token but a name
"""What is wrong with the token for Consul stands under this name in /readyz."""
LAG_SECONDS = 1.0
"""How often the loop is asked how late it is."""
EXIT_FINE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

_log = telemetry.logger(__name__)


class Readiness:
    """What the daemon still waits for, and what an operator should know although it works."""

    def __init__(self) -> None:
        self._awaiting: dict[str, str] = {}
        self._warnings: dict[str, str] = {}
        self._said_ready = False
        self.on_change: Callable[[], None] = lambda: None
        """Called when what is awaited has changed."""

    @property
    def ready(self) -> bool:
        """Whether nothing is awaited."""
        return not self._awaiting

    def awaiting(self, name: str, detail: str = "") -> None:
        """Be not ready until `done(name)`; again with another detail to say how it goes."""
        self._awaiting[name] = detail
        self._said_ready = False
        telemetry.READY.set(0)
        self.on_change()

    def done(self, name: str) -> None:
        """End one wait; logs once when it was the last."""
        self._awaiting.pop(name, None)
        if self.ready and not self._said_ready:
            self._said_ready = True
            telemetry.READY.set(1)
            _log.info("ready", **self._warnings)
        self.on_change()

    def warn(self, name: str, detail: str) -> None:
        """Show something under its name that is wrong or risky, while being ready."""
        self._warnings[name] = detail

    def unwarn(self, name: str) -> None:
        """Take a warning back."""
        self._warnings.pop(name, None)

    def show(self, name: str, detail: str | None) -> None:
        """Warn, or with None take the warning back."""
        if detail is None:
            self.unwarn(name)
        else:
            self.warn(name, detail)

    def shower(self, name: str) -> Callable[[str | None], None]:
        """Return `show` for one name."""
        return partial(self.show, name)

    def told(self) -> str:
        """Return in one line what is awaited."""
        if self.ready:
            return "ready"
        named = (f"{name} ({detail})" if detail else name for name, detail in self._awaiting.items())
        return f"waiting for {', '.join(named)}"

    def report(self) -> dict[str, Any]:
        """Return what /readyz shows."""
        return {"ready": self.ready, "awaiting": dict(self._awaiting), "warnings": dict(self._warnings)}


@dataclass
class Daemon:
    """What the body of a daemon is given."""

    name: str
    config: Config
    tasks: asyncio.TaskGroup
    readiness: Readiness = field(default_factory=Readiness)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    on_reload: list[Callable[[], None]] = field(default_factory=list)
    status_sources: dict[str, Callable[[], object]] = field(default_factory=dict)
    measures: list[Callable[[], None]] = field(default_factory=list)
    """What sets gauges that nobody keeps up to date, each called when the metrics are asked for."""
    actions: dict[str, Callable[[str], bool]] = field(default_factory=dict)
    """What the admin socket can do to a subject, by name; each says whether there was such a subject."""
    probes: dict[str, Callable[[str], Awaitable[object]]] = field(default_factory=dict)
    """What the admin socket can try out on a subject, by name; each returns what it found, as JSON."""
    admin_address: tuple[str, int] = ("", 0)
    started_at: float = field(default_factory=time.monotonic)
    reread: Callable[[], Config] | None = None
    """Reads the configuration again, from where it came. Raises ConfigError; None when it came from nowhere."""
    file: Path | None = None
    """The file that the configuration came from, for who watches it."""
    manager: ServiceManager = field(default_factory=lambda: ServiceManager(None))


Body = Callable[[Daemon], Awaitable[None]]


class _Finished(Exception):
    """The body has returned: what still runs in its task group is cancelled."""


def daemon_command(name: str, section: str, body: Body) -> click.Command:
    """Return the command line of a daemon: `--config`, `--set`, `--log-level`, `--version`."""

    @click.command(name=name.rpartition(" ")[2], context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--config", "file", type=click.Path(path_type=Path), help="YAML or JSON file.")
    @click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"One key, e.g. {section}.admin=HOST:PORT.",
    )
    @click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="What is logged: this and what is worse.",
    )
    @click.version_option(version("ztna-mesh"), prog_name=name)
    def command(file: Path | None, settings: tuple[str, ...], log_level: str | None) -> None:
        def read() -> Config:
            return configuration.load(file, os.environ, dict(_pairs(settings, log_level)), section)

        def reread() -> Config:
            if not is_kept:
                raise ConfigError(
                    f"{file}: no file but a pipe or device, whose text is gone once it was read; to have changes "
                    "taken while it runs, start with --config and a file"
                )
            return read()

        is_kept = file is None or file.is_file()
        try:
            config = read()
            own = getattr(config, section)
            if own is None:
                raise ConfigError(
                    f"{section}: the configuration has no such section; name a file that has one with --config"
                )
        except ConfigError as error:
            click.echo(f"{name}: {error}", err=True)
            sys.exit(EXIT_USAGE)
        admin_socket = getattr(own, "admin_socket", None)
        sys.exit(
            run(
                name,
                body,
                config=config,
                admin=own.admin,
                admin_socket=admin_socket,
                reread=reread,
                file=file,
            )
        )

    command.help = f"Run {name} until SIGTERM; SIGHUP reads certificates, routes or dnsd's pool again."
    return command


def run(
    daemon_name: str,
    body: Body,
    *,
    config: Config,
    admin: Endpoint,
    admin_socket: str | None = None,
    reread: Callable[[], Config] | None = None,
    file: Path | None = None,
) -> int:
    """Run a daemon until its body returns; return the exit status.

    0 after a clean end, 2 for a ConfigError, 1 for anything else. A ZtnaError is one line in the log; only
    an error that nobody foresaw has its traceback there.
    """
    log_lines.configure(config.log)
    telemetry.BUILD.labels(daemon_name, version("ztna-mesh")).set(1)
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(daemon_name, body, config, admin, admin_socket, reread, file))


async def sleep_or_stop(daemon: Daemon, seconds: float) -> bool:
    """Wait, but not past the start of the stop; return whether the daemon is stopping."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await daemon.stopping.wait()
    return daemon.stopping.is_set()


def raise_file_limit() -> None:
    """Allow as many open files as the hard limit does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run(
    daemon_name: str,
    body: Body,
    config: Config,
    admin: Endpoint,
    admin_socket: str | None,
    reread: Callable[[], Config] | None,
    file: Path | None,
) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unexpected)
    try:
        async with asyncio.TaskGroup() as tasks:
            daemon = Daemon(daemon_name, config, tasks, reread=reread, file=file)
            _install_signals(loop, daemon)
            tasks.create_task(_mind_lag(), name="loop lag")
            async with _managed(daemon), serving(daemon, admin, admin_socket):
                _log.info("started", daemon=daemon_name, admin=endpoint_text(daemon.admin_address))
                await body(daemon)
            raise _Finished
    except BaseExceptionGroup as group:
        return _exit_status(daemon_name, group)


async def _mind_lag() -> None:
    """Measure by how much the loop is late, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        telemetry.LOOP_LAG.observe(max(0.0, loop.time() - due))


@asynccontextmanager
async def _managed(daemon: Daemon) -> AsyncIterator[None]:
    """Tell the service manager, if one listens, how the daemon is; last, that it ends."""
    manager = daemon.manager = ServiceManager.from_environment(os.environ, os.getpid())
    readiness = daemon.readiness
    readiness.on_change = lambda: manager.changed(ready=readiness.ready, status=readiness.told())
    keeping = daemon.tasks.create_task(manager.keep(), name="service manager")
    try:
        yield
    finally:
        manager.stopping("ended")
        keeping.cancel()
        manager.close()


def _exit_status(daemon_name: str, group: BaseExceptionGroup[BaseException]) -> int:
    """Log what ended the daemon, once each, and return the exit status."""
    status = EXIT_FINE
    for error in _leaves(group):
        if isinstance(error, _Finished):
            continue
        if isinstance(error, ZtnaError):
            _log.error("failed", daemon=daemon_name, error=error)
            status = max(status, EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
        else:
            _log_unexpected(f"{daemon_name} failed", error)
            status = max(status, EXIT_FAILED)
    if status == EXIT_FINE:
        _log.info("stopped", daemon=daemon_name)
    return status


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _install_signals(loop: asyncio.AbstractEventLoop, daemon: Daemon) -> None:
    loop.add_signal_handler(signal.SIGTERM, _stop, daemon, "SIGTERM")
    loop.add_signal_handler(signal.SIGINT, _stop, daemon, "SIGINT")
    loop.add_signal_handler(signal.SIGHUP, _reload, daemon)


def _stop(daemon: Daemon, name: str) -> None:
    if daemon.stopping.is_set():
        _exit_now(name)
    _log.info("stopping", signal=name)
    daemon.readiness.awaiting("stopping", f"{name} was received")
    daemon.manager.stopping(f"draining: {name} was received")
    daemon.stopping.set()


def _exit_now(name: str) -> NoReturn:
    _log.warning("exit_at_once", signal=name)
    os._exit(EXIT_FAILED)


def _reload(daemon: Daemon) -> None:
    """Tell each who wants to read its files again; one that cannot keeps what it had."""
    _log.info("reloading")
    daemon.manager.reloading(time.monotonic_ns() // 1000)
    for callback in daemon.on_reload:
        try:
            callback()
        except ZtnaError as error:
            _log.error("reload_failed", error=error)
    daemon.manager.reloaded()


def _unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log and count an error in a callback of the loop.

    It cost the one connection or packet whose callback it was; ending the daemon would hand whoever can
    provoke it everybody else's connections as well.
    """
    _log_unexpected(str(context.get("message", "")), context.get("exception"))


def _log_unexpected(message: str, error: BaseException | None) -> None:
    telemetry.UNEXPECTED.inc()
    _log.exception("unexpected", error, message=message)


def _pairs(settings: tuple[str, ...], log_level: str | None) -> Iterator[tuple[str, str]]:
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE")
        yield key, value
    if log_level is not None:
        yield "log.level", log_level
